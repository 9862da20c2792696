"""The long tail: how a student does where its teacher is unsure, and on which slices it has lost most.

Shapes: N = tokens or examples.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

PARTS = 10
SLICES = 5
"""Slices that the tail names, those that lost most first."""

_BINS = 15


def calibration_error(confidence: Tensor, right: Tensor, bins: int = _BINS) -> float:
    """Mean gap between confidence [N] and accuracy over bins of equal width, weighted by what is in them.

    Guo et al. 2017 (https://arxiv.org/abs/1706.04599).
    """
    place = (confidence * bins).ceil().clamp(1, bins).long() - 1
    sums = torch.zeros(2, bins, dtype=torch.float64)
    sums[0].scatter_add_(0, place, confidence)
    sums[1].scatter_add_(0, place, right)
    return float((sums[0] - sums[1]).abs().sum() / len(confidence))


def long_tail(
    entropy: Tensor, teacher_loss: Tensor, loss: Tensor, slices: Tensor, names: Sequence[str]
) -> dict[str, Any]:
    """Losses [N] by decile of the teacher's entropy [N], and on the slices [N] (places in `names`) that lost most.

    Deciles go by entropy, not by the teacher's loss: chosen by what it got wrong, the teacher would look worse, and the
    student better, than they are.
    """
    values = torch.stack([entropy, teacher_loss, loss]).double()
    order = values[0].argsort(stable=True)
    deciles = [values[:, rows].mean(1).tolist() + [len(rows)] for rows in order.tensor_split(PARTS) if len(rows)]
    sums = torch.zeros(3, len(names), dtype=torch.float64).index_add_(1, slices, values)
    counts = torch.bincount(slices, minlength=len(names)).double()
    means = sums / counts.clamp_min(1)
    lost = torch.where(counts > 0, means[2] - means[1], -torch.inf)
    worst = [place for place in lost.argsort(descending=True, stable=True).tolist() if counts[place]][:SLICES]
    keys = ("entropy", "teacher_loss", "loss", "count")
    return {
        "deciles": [dict(zip(keys, decile, strict=True)) for decile in deciles],
        "slices": [
            {"slice": names[place]} | dict(zip(keys, [*means[:, place].tolist(), int(counts[place])], strict=True))
            for place in worst
        ],
    }
