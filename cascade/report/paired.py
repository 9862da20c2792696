"""Whether one model is better than another on the same held-out blocks, with several seeds of each.

Shapes: S = seeds, B = blocks, R = resamples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES = 2000
_LEVEL = 0.95


@dataclass(frozen=True)
class Difference:
    """Mean over seeds of a metric's difference, and the interval that holds it with 95%."""

    value: float
    low: float
    high: float
    num_seeds: int
    num_below: int
    """Seeds whose own difference is below 0."""

    @property
    def verdict(self) -> str:
        """Win where the first is surely smaller, which is better; loss where it is surely larger; else tie."""
        return "win" if self.high < 0 else "loss" if self.low > 0 else "tie"

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return vars(self) | {"verdict": self.verdict}


def paired_difference(
    first: Sequence[Sequence[float]],
    second: Sequence[Sequence[float]],
    tokens: Sequence[Sequence[float]],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Difference:
    """`first` minus `second` per token, over all seeds, with a hierarchical bootstrap: seeds, then blocks.

    Each argument has the sums of S seeds over the same B blocks. Blocks are drawn once for all the seeds of a resample:
    they are the same text for all of them, and drawing them apart would take its share of chance to average out. With
    one seed only blocks are drawn, and the interval says nothing of other seeds.

    Raises:
        ValueError: the three have different shapes, or there is nothing to compare.
    """
    difference_SB = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    tokens_SB = np.asarray(tokens, dtype=np.float64)
    if difference_SB.shape != tokens_SB.shape or difference_SB.ndim != 2 or not difference_SB.size:
        raise ValueError(f"sums of seeds over blocks: {difference_SB.shape} and {tokens_SB.shape}")
    num_seeds, num_blocks = difference_SB.shape
    draw = np.random.default_rng(seed)
    blocks_RB = draw.multinomial(num_blocks, np.full(num_blocks, 1 / num_blocks), size=resamples).astype(np.float64)
    seeds_RS = draw.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=resamples) / num_seeds
    counted_RS = blocks_RB @ tokens_SB.T
    usable_R = (counted_RS > 0).all(1)  # of chats, a block may have no token that counts
    means_RS = (blocks_RB @ difference_SB.T)[usable_R] / counted_RS[usable_R]
    drawn_R = (seeds_RS[usable_R] * means_RS).sum(1)
    low, high = np.quantile(drawn_R, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    means_S = difference_SB.sum(1) / tokens_SB.sum(1)
    return Difference(float(means_S.mean()), float(low), float(high), num_seeds, int((means_S < 0).sum()))
