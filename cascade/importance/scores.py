"""Statistics -> one float32 score per unit; higher = keep.

Shapes: L = layers, H = query heads, I = neurons, D = hidden channels.
"""

from dataclasses import dataclass

from torch import Tensor

from cascade.importance.statistics import Statistics


@dataclass(frozen=True)
class Scores:
    """Importance of every unit, comparable within one row only."""

    layers: Tensor
    """[L]"""
    heads: Tensor
    """[L, H]; compared inside each key/value group"""
    neurons: Tensor
    """[L, I]; compared inside each layer"""
    hidden: Tensor
    """[D]; one ranking for the whole network, as every layer reads and writes the same stream"""


def score_importance(statistics: Statistics) -> Scores:
    """Minitron's scores (https://arxiv.org/abs/2407.14679, section 2.2), layers by block influence."""
    return Scores(
        layers=statistics.block_influence,
        heads=statistics.head_norms,
        neurons=statistics.neuron_norms,
        hidden=statistics.hidden_norms.sum(0),
    )
