"""What a frozen teacher has read it need not read again: its last hidden states are kept, within a limit.

The same few batches come back: each try of a learning rate reads the first ones, every look at the selection loss the
same blocks, every row of a report the same held-out text. Whole batches are kept, as they were computed, so that
nothing depends on what was in memory, not even rounding.

Shapes: B = batch, S = block size, D = hidden size.
"""

import hashlib
from collections import OrderedDict
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from cascade.distillation import parallel
from cascade.distillation.head import last_hidden

LIMIT_BYTES = 1 << 28


class _Memory:
    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes, self.num_bytes = limit_bytes, 0
        self.states: OrderedDict[bytes, Tensor] = OrderedDict()

    def keep(self, key: bytes, hidden: Tensor) -> None:
        size = hidden.numel() * hidden.element_size()
        if size > self.limit_bytes:
            return
        self.states[key], self.num_bytes = hidden, self.num_bytes + size
        while self.num_bytes > self.limit_bytes:
            _, oldest = self.states.popitem(last=False)
            self.num_bytes -= oldest.numel() * oldest.element_size()

    def find(self, key: bytes) -> Tensor | None:
        if key in self.states:
            self.states.move_to_end(key)
        return self.states.get(key)


_memories: WeakKeyDictionary[nn.Module, _Memory] = WeakKeyDictionary()


def remember(teacher: nn.Module, limit_bytes: int = LIMIT_BYTES) -> nn.Module:
    """From now on keep what `teacher_hidden` computes with this model, whose weights must not change any more."""
    _memories[teacher] = _Memory(limit_bytes)
    return teacher


@torch.no_grad()
def teacher_hidden(teacher: nn.Module, **inputs: Tensor) -> Tensor:
    """[B, S, D]: what the teacher's head would read of `inputs`, from memory where the same batch was read before."""
    memory = _memories.get(teacher)
    if memory is None or parallel.world_size() > 1:  # a sharded teacher is asked by all processes or by none
        return last_hidden(teacher, **inputs, use_cache=False)
    key = _key(inputs)
    hidden = memory.find(key)
    if hidden is None:
        hidden = last_hidden(teacher, **inputs, use_cache=False)
        memory.keep(key, hidden)
    return hidden


def _key(inputs: dict[str, Tensor]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(inputs.items()):
        digest.update(f"{name}:{tuple(value.shape)}:{value.dtype}:".encode())
        digest.update(value.cpu().contiguous().numpy().tobytes())
    device = inputs["input_ids"].device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    digest.update(f"{autocast}:{torch.get_num_threads()}".encode())
    return digest.digest()
