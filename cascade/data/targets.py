"""What a teacher that is not here has said of each token, as far as it is told.

Shapes: T = tokens, N = blocks, S = block size, K = ids listed at a place, at most.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

Listed = list[tuple[int, float]]
"""Of one token: ids and their log-probabilities."""


@dataclass(frozen=True)
class ListedTargets:
    """What a teacher that is not here says of each token; the mass that is not listed is somewhere else."""

    ids: Tensor
    """Whole numbers [N, S, K], or [T, K], of the token that stands there, as labels are; -1: none."""
    log_p: Tensor
    """float32, as many; -inf where there is no id."""

    def rows(self, rows: Tensor | slice) -> "ListedTargets":
        """Of the blocks, or tokens, of these numbers."""
        return ListedTargets(self.ids[rows], self.log_p[rows])


def as_tensors(listed: Sequence[Listed]) -> ListedTargets:
    """Lists, one a token, as [T, K] tensors: a tenth of the lists' memory."""
    width = max(1, max((len(one) for one in listed), default=0))
    padded = [[*one, *[(-1, -math.inf)] * (width - len(one))] for one in listed]
    ids = torch.tensor([[number for number, _ in one] for one in padded], dtype=torch.int32).view(-1, width)
    return ListedTargets(ids, torch.tensor([[value for _, value in one] for one in padded]).view(-1, width))


def as_targets(documents: Sequence[ListedTargets], count: int, block_size: int) -> ListedTargets:
    """[T, K] of documents one after another, each with a K of its own, as those of `count` blocks."""
    width = max(one.ids.shape[1] for one in documents)

    def joined(parts: list[Tensor], fill: float) -> Tensor:
        padded = [pad(part, (0, width - part.shape[1]), value=fill) for part in parts]
        return torch.cat(padded)[: count * block_size].view(count, block_size, width)

    return ListedTargets(
        joined([one.ids for one in documents], -1), joined([one.log_p for one in documents], -math.inf)
    )
