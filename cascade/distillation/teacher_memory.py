"""A frozen teacher's outputs, kept in memory up to a limit for batches that come back.

The same few batches come back: each try of a learning rate reads the first ones, every measurement of the selection
loss the same blocks, every row of a report the same held-out text. Whole batches are kept, as they were computed, so
that nothing depends on what was in memory, not even rounding.

Shapes: B = batch, S = block size, D = hidden size.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from cascade.models.architecture.head import last_hidden
from cascade.runtime import ranks

LIMIT_BYTES = 1 << 28


class _Memory:
    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes, self.num_bytes = limit_bytes, 0
        self.batches: OrderedDict[bytes, dict[str, Tensor]] = OrderedDict()

    def keep(self, key: bytes, tensors: dict[str, Tensor]) -> None:
        if _size(tensors) > self.limit_bytes:
            return
        self.batches[key], self.num_bytes = tensors, self.num_bytes + _size(tensors)
        while self.num_bytes > self.limit_bytes:
            _, oldest = self.batches.popitem(last=False)
            self.num_bytes -= _size(oldest)

    def find(self, key: bytes) -> dict[str, Tensor] | None:
        if key in self.batches:
            self.batches.move_to_end(key)
        return self.batches.get(key)


_memories: WeakKeyDictionary[nn.Module, _Memory] = WeakKeyDictionary()


def remember(teacher: nn.Module, limit_bytes: int = LIMIT_BYTES) -> nn.Module:
    """Have this model's outputs kept from now on; its weights must not change any more."""
    _memories[teacher] = _Memory(limit_bytes)
    return teacher


def teacher_hidden(teacher: nn.Module, inputs: dict[str, Tensor], *, keep: bool = True) -> Tensor:
    """[B, S, D]: the hidden states that the teacher's head reads; `keep` as in `remembered`."""

    def look() -> dict[str, Tensor]:
        return {"hidden": last_hidden(teacher, **inputs, use_cache=False)}

    return remembered(teacher, inputs, "hidden", look, keep=keep)["hidden"]


@torch.no_grad()
def remembered(
    teacher: nn.Module, inputs: dict[str, Tensor], what: str, look: Callable[[], dict[str, Tensor]], *, keep: bool
) -> dict[str, Tensor]:
    """The tensors that `look` computes of the teacher on `inputs`, from memory where they are kept under `what`.

    Without `keep` nothing new is kept: a batch that is read once must not push out those that come back.
    """
    memory = _memories.get(teacher)
    if memory is None or ranks.world_size() > 1:  # a sharded teacher is asked by all processes or by none
        return look()
    key = _key(inputs, what)
    tensors = memory.find(key)
    if tensors is None:
        tensors = look()
        if keep:
            memory.keep(key, tensors)
    return tensors


def _size(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _key(inputs: dict[str, Tensor], what: str) -> bytes:
    digest = hashlib.blake2b(what.encode(), digest_size=16)
    for name, tensor in sorted(inputs.items()):
        digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype}:".encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    device = next(iter(inputs.values())).device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    digest.update(f"{autocast}:{torch.get_num_threads()}".encode())
    return digest.digest()
