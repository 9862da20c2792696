"""Which block is read at which position: a pure function of (seed, epoch, index), so nothing is ever skipped."""

import hashlib
from functools import lru_cache

import torch
from torch import Tensor


def blocks_at(start: int, count: int, *, num_blocks: int, seed: int) -> Tensor:
    """Block numbers at stream positions start .. start+count-1, int64 [count].

    Each epoch (one pass over all blocks) has its own permutation; a position far into the stream costs no more
    than the first.
    """
    epochs, offsets = zip(*(divmod(position, num_blocks) for position in range(start, start + count)), strict=True)
    return torch.stack(
        [_permutation(seed, epoch, num_blocks)[offset] for epoch, offset in zip(epochs, offsets, strict=True)]
    )


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, num_blocks: int) -> Tensor:
    digest = hashlib.sha256(f"{seed}:{epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randperm(num_blocks, generator=generator)
