"""The processes that torchrun starts: their number, and what they say to each other.

In a single process every function here is the identity, or does nothing.
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
"""The longest time that processes wait for the process that evaluates."""


def join() -> None:
    """Join the processes that torchrun started; does nothing in a process that it did not start."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=_TIMEOUT)


def leave() -> None:
    """Leave the processes that `join` has joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


_alone = False
"""Whether this process works on its own at present: a property of the process, as its rank is."""


@contextmanager
def alone() -> Iterator[None]:
    """Let this process work on its own inside: `world_size` is 1, and nothing waits for the other processes."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes that work together at present."""
    return dist.get_world_size() if dist.is_initialized() and not _alone else 1


def send(number: int) -> None:
    """Send a number from the first process to the others, which wait for it in `receive`."""
    if world_size() > 1:
        dist.broadcast(torch.tensor([number]), src=0)


def receive() -> int:
    """The number that the first process sends next; waits for it."""
    number = torch.zeros(1, dtype=torch.int64)
    dist.broadcast(number, src=0)
    return int(number)


def require_even(batch_size: int) -> None:
    """Refuse a batch that cannot be shared out evenly to the processes.

    Raises:
        UserError: `batch_size` is no multiple of the number of processes.
    """
    if batch_size % world_size():
        raise UserError(f"batch_size: {batch_size} blocks cannot be shared out evenly to {world_size()} processes")


def barrier() -> None:
    """Wait until all processes have come to this call."""
    if world_size() > 1:
        dist.barrier()


def broadcast_flag(flag: bool) -> bool:
    """The first process's flag, in every process."""
    if world_size() == 1:
        return flag
    answer = torch.tensor([int(flag)])
    dist.broadcast(answer, src=0)
    return bool(answer)


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process, in every process."""
    if world_size() == 1:
        return flag
    answer = torch.tensor([int(flag)])
    dist.all_reduce(answer, op=dist.ReduceOp.MAX)
    return bool(answer)


def broadcast_ints(values: Tensor) -> Tensor:
    """int64 [n]: the first process's values, in every process; the lengths before may differ."""
    if world_size() == 1:
        return values
    length = torch.tensor([len(values)])
    dist.broadcast(length, src=0)
    sent = values if rank() == 0 else torch.zeros(int(length), dtype=torch.int64)
    dist.broadcast(sent, src=0)
    return sent


def sum_numbers(values: dict[str, float], device: torch.device) -> dict[str, float]:
    """The sum of each number over all processes, in every process."""
    if world_size() == 1:
        return values
    sums = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return dict(zip(values, sums.tolist(), strict=True))


def sum_tensors(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The sum of each tensor over all processes, on the CPU; a tensor that a process lacks counts as zeros there.

    All processes have to make this call.
    """
    if world_size() == 1:
        return values
    shapes: list[dict[str, Any]] = [{} for _ in range(world_size())]
    dist.all_gather_object(shapes, {name: (tuple(value.shape), value.dtype) for name, value in values.items()})
    known = {name: shape for of_process in shapes for name, shape in of_process.items()}
    sums = {}
    for name, (shape, dtype) in sorted(known.items()):
        total = values[name].to("cpu", torch.float64) if name in values else torch.zeros(shape, dtype=torch.float64)
        dist.all_reduce(total)
        sums[name] = total.to(dtype)
    return {name: sums[name] for name in [*values, *sorted(known.keys() - values.keys())]}
