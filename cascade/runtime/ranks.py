"""Several processes, one training step: parameters sharded with FSDP2, each process with its share of the blocks.

Everything here is the identity in a single process.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cascade.runtime.errors import UserError

_TIMEOUT = timedelta(hours=12)
"""The longest that processes wait for the one that evaluates."""


def join() -> None:
    """Join the processes that torchrun started; nothing to do in one of its own."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=_TIMEOUT)


def leave() -> None:
    """Undo `join`."""
    if dist.is_initialized():
        dist.destroy_process_group()


_alone = False


@contextmanager
def alone() -> Iterator[None]:
    """What this process does meanwhile is no work of all: it does not wait for the others."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def rank() -> int:
    """This process's number."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes work together."""
    return dist.get_world_size() if dist.is_initialized() and not _alone else 1


def tell(message: int) -> None:
    """Say a number to the others, who wait for it in `told`."""
    if world_size() > 1:
        dist.broadcast(torch.tensor([message]), src=0)


def told() -> int:
    """The number that the first process says."""
    message = torch.zeros(1, dtype=torch.int64)
    dist.broadcast(message, src=0)
    return int(message)


def require_even(batch_size: int) -> None:
    """Refuse a batch that cannot be shared out evenly.

    Raises:
        UserError: it cannot.
    """
    if batch_size % world_size():
        raise UserError(f"batch_size: {batch_size} blocks cannot be shared out evenly to {world_size()} processes")


def barrier() -> None:
    """Wait until all processes are here."""
    if world_size() > 1:
        dist.barrier()


def agreed(value: bool) -> bool:
    """What the first process says."""
    if world_size() == 1:
        return value
    answer = torch.tensor([int(value)])
    dist.broadcast(answer, src=0)
    return bool(answer)


def anyone(value: bool) -> bool:
    """Whether any process says so."""
    if world_size() == 1:
        return value
    answer = torch.tensor([int(value)])
    dist.all_reduce(answer, op=dist.ReduceOp.MAX)
    return bool(answer)


def same(values: Tensor) -> Tensor:
    """int64 [n]: what the first process has, whatever its length."""
    if world_size() == 1:
        return values
    length = torch.tensor([len(values)])
    dist.broadcast(length, src=0)
    sent = values if rank() == 0 else torch.zeros(int(length), dtype=torch.int64)
    dist.broadcast(sent, src=0)
    return sent


def total(values: dict[str, float], device: torch.device) -> dict[str, float]:
    """Each value's sum over all processes."""
    if world_size() == 1:
        return values
    sums = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return dict(zip(values, sums.tolist(), strict=True))


def summed(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor's sum over all processes, on the CPU; one that a process does not have counts as zeros there.

    All processes have to ask.
    """
    if world_size() == 1:
        return values
    shapes: list[dict[str, Any]] = [{} for _ in range(world_size())]
    dist.all_gather_object(shapes, {name: (tuple(value.shape), value.dtype) for name, value in values.items()})
    known = {name: shape for one in shapes for name, shape in one.items()}
    found = {}
    for name, (shape, dtype) in sorted(known.items()):
        total = values[name].to("cpu", torch.float64) if name in values else torch.zeros(shape, dtype=torch.float64)
        dist.all_reduce(total)
        found[name] = total.to(dtype)
    return {name: found[name] for name in [*values, *sorted(known.keys() - values.keys())]}
