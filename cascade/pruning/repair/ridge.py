"""Ridge regression of a linear map, from running second moments in float64.

Shapes: N = tokens, K = inputs, D = outputs.
"""

from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Tried for every weight, as shares of the Gram matrix's mean diagonal."""


@dataclass
class Fit:
    """A refitted linear map."""

    weight: Tensor
    """[D, K]"""
    bias: Tensor | None
    """[D]"""
    ridge: float
    errors: tuple[float, float]
    """Share of the target's energy that is missed on the tokens kept aside: by the map as it was, and refitted."""


def add_apart(
    halves: "tuple[Moments, Moments]",
    first_block: int,
    num_blocks: int,
    inputs: Tensor,
    targets: Tensor,
    *,
    biased: bool,
) -> None:
    """Add a batch whose blocks are numbered from `first_block`: every fourth block to the second half.

    Inputs [..., K] and targets [..., D] hold the batch's tokens block by block.
    """
    by_block = [values.reshape(num_blocks, -1, values.shape[-1]) for values in (inputs, targets)]
    aside = (torch.arange(num_blocks, device=inputs.device) + first_block) % 4 == 3
    for half, rows in zip(halves, (~aside, aside), strict=True):
        if rows.any():
            half.add(by_block[0][rows].flatten(0, 1), by_block[1][rows].flatten(0, 1), biased)


class Moments:
    """Sums over tokens: inputs by inputs, targets by inputs, the target's energy."""

    def __init__(self) -> None:
        self.gram = self.cross = self.energy = torch.zeros((), dtype=torch.float64)

    def add(self, inputs: Tensor, targets: Tensor, biased: bool) -> None:
        """Inputs [N, K] and targets [N, D]; with a bias, an input that is always 1 is added."""
        inputs, targets = inputs.double(), targets.double()
        if biased:
            inputs = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=inputs.dtype, device=inputs.device)], 1)
        self.gram = self.gram + inputs.T @ inputs
        self.cross = self.cross + targets.T @ inputs
        self.energy = self.energy + targets.square().sum()

    def error(self, weight: Tensor) -> float:
        """Share of the targets' energy that `weight` [D, K] misses."""
        missed = self.energy - 2 * (weight * self.cross).sum() + ((weight @ self.gram) * weight).sum()
        return float(missed / self.energy)

    def __add__(self, other: "Moments") -> "Moments":
        both = Moments()
        both.gram, both.cross, both.energy = (
            self.gram + other.gram,
            self.cross + other.cross,
            self.energy + other.energy,
        )
        return both

    def solve(self, start: Tensor, ridge: float, biased: bool) -> Tensor | None:
        """The [D, K] that misses least, plus `ridge` times the squared distance from `start`; None if singular."""
        weighed = self.gram.diagonal()[: len(self.gram) - biased]
        penalty = torch.full(
            (len(self.gram),), float(ridge * weighed.mean()), dtype=torch.float64, device=weighed.device
        )
        if biased:
            penalty[-1] = 0.0
        factor, info = torch.linalg.cholesky_ex(self.gram + penalty.diag())
        if int(info) != 0 or not torch.isfinite(factor).all():
            return None
        return start + torch.cholesky_solve((self.cross - start @ self.gram).T, factor).T

    @staticmethod
    def fit(halves: "tuple[Moments, Moments]", weight: Tensor, bias: Tensor | None) -> Optional["Fit"]:
        """Choose the ridge on the second half, fit on both; None if the Gram matrix is singular."""
        biased = bias is not None
        start = weight if bias is None else torch.cat([weight, bias[:, None]], 1)
        first, second = halves
        aside = second if second.gram.ndim else first  # too few blocks to keep any aside
        tried = []
        for ridge in RIDGES:
            solved = first.solve(start, ridge, biased)
            if solved is not None:
                tried.append((aside.error(solved), ridge))
        both = first + second
        best = min(tried, default=None)
        solved = None if best is None else both.solve(start, best[1], biased)
        if best is None or solved is None or not torch.isfinite(solved).all():
            return None
        return Fit(
            weight=solved[:, :-1] if biased else solved,
            bias=solved[:, -1] if biased else None,
            ridge=best[1],
            errors=(aside.error(start), best[0]),
        )
