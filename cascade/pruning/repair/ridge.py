"""Ridge regression of a linear map, from running second moments in float64.

Shapes: N = tokens, K = inputs, D = outputs.
"""

from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Ridges to choose from for every weight, as shares of the Gram matrix's mean diagonal."""


@dataclass
class Fit:
    """A refitted linear map."""

    weight: Tensor
    """[D, K]"""
    bias: Tensor | None
    """[D]"""
    ridge: float
    errors: tuple[float, float]
    """Share of the target's energy that is missed on the second half's tokens: by the map as it was, and refitted."""


def add_to_halves(
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
    """Sums over tokens: inputs by inputs [K, K], targets by inputs [D, K], the energy of the targets."""

    def __init__(self) -> None:
        self.gram = self.cross = self.energy = torch.zeros((), dtype=torch.float64)

    def add(self, inputs: Tensor, targets: Tensor, biased: bool) -> None:
        """Add tokens, inputs [N, K] and targets [N, D]; with a bias, an input that is always 1 is appended."""
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

    def __add__(self, moments: "Moments") -> "Moments":
        total = Moments()
        total.gram = self.gram + moments.gram
        total.cross = self.cross + moments.cross
        total.energy = self.energy + moments.energy
        return total

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
        """The map that is fitted on both halves with the ridge that is best on the second; None if singular."""
        biased = bias is not None
        start = weight if bias is None else torch.cat([weight, bias[:, None]], 1)
        first, second = halves
        aside = second if second.gram.ndim else first  # with fewer than four blocks the second half is empty
        errors = []
        for ridge in RIDGES:
            solved = first.solve(start, ridge, biased)
            if solved is not None:
                errors.append((aside.error(solved), ridge))
        both = first + second
        best = min(errors, default=None)
        solved = None if best is None else both.solve(start, best[1], biased)
        if best is None or solved is None or not torch.isfinite(solved).all():
            return None
        return Fit(
            weight=solved[:, :-1] if biased else solved,
            bias=solved[:, -1] if biased else None,
            ridge=best[1],
            errors=(aside.error(start), best[0]),
        )
