"""Repeats an action with smaller parts where it runs out of memory."""

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from cascade.runtime.errors import RunError
from cascade.runtime.failpoints import failpoint

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error says that memory ran out, on the CPU or the GPU."""
    # On the CPU it is a plain RuntimeError of the allocator.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        words in str(error)
        for words in (
            "allocate memory",
            "out of memory",
            "CUBLAS_STATUS_ALLOC_FAILED",
            "std::bad_alloc",
            "bad allocation",
        )
    )


def in_parts_that_fit(action: Callable[[int], _T], size: int, what: str) -> _T:
    """What `action(size)` returns; the size is halved for as long as the action runs out of memory.

    Raises:
        RunError: memory runs out even with a size of one.
    """
    while True:
        try:
            failpoint(f"{what}.part")
            return action(size)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError, RunError) as error:
            if not (is_out_of_memory(error) or is_out_of_memory(error.__cause__)):
                raise
            if size == 1:
                raise RunError(f"{what}: out of memory even one by one; a larger machine would help") from error
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        size //= 2
        logger.warning("%s: out of memory; going on with %d at a time, which changes nothing else", what, size)
