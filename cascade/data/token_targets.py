"""A teacher's outputs for each token without the teacher: listed by an endpoint, or cached by an earlier stage.

Shapes: T = tokens, N = blocks, S = block size, P = places of a block that predict, K = ids at a place, at most,
D = the teacher's hidden size, V = vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from cascade.models.architecture.head import Head


@dataclass(frozen=True)
class ListedTargets:
    """A teacher's probabilities of a few ids for each token; the rest of the mass is on ids that are not listed."""

    ids: Tensor
    """Whole numbers [N, S, K], or [T, K], for the token at that place, as labels are; -1: none."""
    log_p: Tensor
    """float32, as many; -inf where there is no id."""

    def rows(self, rows: Tensor | slice) -> "ListedTargets":
        """The targets of blocks, or tokens, picked by their numbers."""
        return ListedTargets(self.ids[rows], self.log_p[rows])

    def within(self, vocab_size: int) -> "ListedTargets":
        """Probabilities under the condition that the id is below `vocab_size`: p_i / (1 - mass of the other ids)."""
        beyond = self.ids >= vocab_size
        if not beyond.any():
            return self
        left = 1 - torch.where(beyond, self.log_p.exp(), 0.0).sum(-1, keepdim=True)
        log_p = (self.log_p - left.clamp_min(torch.finfo(left.dtype).eps).log()).clamp_max(0.0)
        return ListedTargets(self.ids.masked_fill(beyond, -1), log_p.masked_fill(beyond, -math.inf))


@dataclass(frozen=True)
class DrawnTargets:
    """An unbiased sample of a teacher's probabilities: each id's share is on average its probability."""

    ids: Tensor
    """Whole numbers [N, P, K], or [T, K]; -1: none."""
    shares: Tensor
    """float32, as many, of sum 1; 0 where there is no id."""
    entropy: Tensor
    """float32 [N, P], or [T]: of all the teacher's probabilities, in nats."""

    def rows(self, rows: Tensor | slice) -> "DrawnTargets":
        """The targets of blocks, or tokens, picked by their numbers."""
        return DrawnTargets(self.ids[rows], self.shares[rows], self.entropy[rows])


@dataclass(frozen=True)
class HiddenTargets:
    """A teacher's last hidden states, from which its head gives all logits."""

    hidden: Tensor
    """[N, P, D]"""
    head: Head
    points: dict[int, Tensor] = field(default_factory=dict)
    """[N, P, D] each: what enters the layer of that number (the number of layers: what leaves the last)."""

    def rows(self, rows: Tensor | slice) -> "HiddenTargets":
        """The targets of blocks picked by their numbers."""
        points = {number: value[rows] for number, value in self.points.items()}
        return HiddenTargets(self.hidden[rows], self.head, points)


@dataclass(frozen=True)
class StoredTargets:
    """Targets on the disk, read for each batch."""

    numbers: Tensor
    """int64 [N]: numbers of the blocks among all those that were labelled."""
    read: Callable[[Tensor], "KnownTargets"]

    def rows(self, rows: Tensor | slice) -> "StoredTargets":
        """The targets of blocks picked by their numbers."""
        return StoredTargets(self.numbers[rows], self.read)

    def load(self) -> "KnownTargets":
        """Read the targets of all blocks."""
        return self.read(self.numbers)


KnownTargets = ListedTargets | DrawnTargets | HiddenTargets

Listed = list[tuple[int, float]]
"""Ids of one token with their log-probabilities."""


def as_tensors(listed: Sequence[Listed]) -> ListedTargets:
    """Lists of ids, one for each token, as [T, K] tensors, which take a tenth of the lists' memory."""
    width = max(1, max((len(entries) for entries in listed), default=0))
    padded = [[*entries, *[(-1, -math.inf)] * (width - len(entries))] for entries in listed]
    ids = torch.tensor([[number for number, _ in entries] for entries in padded], dtype=torch.int32).view(-1, width)
    return ListedTargets(ids, torch.tensor([[log_p for _, log_p in entries] for entries in padded]).view(-1, width))


def as_targets(documents: Sequence[ListedTargets], index: Tensor) -> ListedTargets:
    """[T, K] of documents one after another, each with a K of its own, as blocks; `index` [N, S] is -1: nothing."""
    width = max(targets.ids.shape[1] for targets in documents)

    def joined(parts: list[Tensor], fill: float) -> Tensor:
        whole = torch.cat([pad(part, (0, width - part.shape[1]), value=fill) for part in parts])
        return whole[index.clamp(min=0)].masked_fill((index < 0)[..., None], fill)

    return ListedTargets(
        joined([targets.ids for targets in documents], -1), joined([targets.log_p for targets in documents], -math.inf)
    )
