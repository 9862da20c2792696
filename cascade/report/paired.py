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
    """The difference of a metric between two models, as the mean over seeds, with its 95% interval."""

    value: float
    low: float
    high: float
    num_seeds: int
    num_below: int
    """Seeds whose own difference is below 0."""

    @property
    def verdict(self) -> str:
        """win: the whole interval is below 0, which is better; loss: it is above 0; tie: it holds 0."""
        return "win" if self.high < 0 else "loss" if self.low > 0 else "tie"

    def record(self) -> dict[str, Any]:
        """The fields and the verdict, for JSON."""
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

    Each argument has the sums of S seeds over the same B blocks. A resample draws its blocks once for all seeds: every
    seed is measured on the same text, and separate draws would average out the chance that lies in the text. With one
    seed only blocks are drawn, and the interval says nothing about other seeds.

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
