"""Evidence -> one float32 score per unit; higher = keep.

`table.py` has the names of all scores; those of layers and by gradients are in `layers.py` and `gradients.py`.

Shapes: L = layers, H = query heads, I = neurons, D = hidden channels.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cascade.data.blocks import TokenBlocks
from cascade.pruning.importance.statistics import Statistics
from cascade.pruning.importance.table import HEAD_SCORES, HIDDEN_SCORES, LAYER_SCORES, NEURON_SCORES
from cascade.runtime.by_name import function_at


@dataclass(frozen=True)
class Scores:
    """Importance of every unit; only scores of the same row can be compared."""

    layers: Tensor
    """[L]"""
    heads: Tensor
    """[L, H]; compared inside each key/value group"""
    neurons: Tensor
    """[L, I]; compared inside each layer"""
    hidden: Tensor
    """[D]; one ranking for the whole network, as every layer reads and writes the same stream"""
    rotation: Tensor | None = None
    """[D, D]: the matrix Q by which the stream is rotated (x -> x Q) before `hidden` counts; None without a rotation"""


def head_norms(statistics: Statistics) -> Tensor:
    """[L, H]: (L2, mean) of the head's output; Minitron, https://arxiv.org/abs/2407.14679, section 2.2."""
    return statistics.head_norms


def head_contributions(statistics: Statistics) -> Tensor:
    """[L, H]: ||(head's output) W_o||, mean over tokens: the length of what the head writes into the stream.

    Raises:
        ValueError: the statistics were collected without head contributions.
    """
    if not statistics.head_contributions.numel():
        raise ValueError("these statistics have no head contributions; collect them with head_contributions=True")
    return statistics.head_contributions


def neuron_norms(statistics: Statistics) -> Tensor:
    """[L, I]: (L2, mean) of the neuron's activation; Minitron, https://arxiv.org/abs/2407.14679, section 2.2."""
    return statistics.neuron_norms


def neuron_contributions(statistics: Statistics) -> Tensor:
    """[L, I]: (L2, mean) of the activation times the length of what it writes, ||W_down[:, i]||."""
    return statistics.neuron_norms * statistics.neuron_weights


def hidden_norms(statistics: Statistics) -> Tensor:
    """[D]: (L2, mean) of what attention and MLPs read, summed over layers; Minitron, section 2.2."""
    return statistics.hidden_norms.sum(0)


def pca(statistics: Statistics) -> Tensor:
    """[D]: the stream's variance along its principal axes, descending; Ministral 3, https://arxiv.org/abs/2601.08584.

    Raises:
        ValueError: the statistics were collected without a rotation.
    """
    if not statistics.rotation.numel():
        raise ValueError("these statistics have no rotation; collect them with covariance_blocks > 0")
    return torch.arange(len(statistics.rotation), 0, -1, dtype=torch.float32)


def score_importance(
    statistics: Statistics,
    *,
    layers: str = "block_influence",
    heads: str = "activation_norm",
    neurons: str = "activation_norm",
    hidden: str = "activation_norm",
    model: nn.Module | None = None,
    blocks: TokenBlocks | None = None,
    num_removed: int | None = None,
) -> Scores:
    """Every unit's score, each kind by the name of a score; the defaults are Minitron's, layers by block influence.

    Scores that cost forward passes need `model` and `blocks`, contiguous ones the number of layers to remove.

    Raises:
        ValueError: an unknown name, or evidence that a score needs is missing.
    """
    evidence: dict[str, Any] = {"statistics": statistics, "model": model, "blocks": blocks, "num_removed": num_removed}
    return Scores(
        layers=_score("layers", layers, LAYER_SCORES, evidence),
        heads=_score("heads", heads, HEAD_SCORES, evidence),
        neurons=_score("neurons", neurons, NEURON_SCORES, evidence),
        hidden=_score("hidden", hidden, HIDDEN_SCORES, evidence),
        rotation=statistics.rotation if hidden == "pca" else None,
    )


def _score(kind: str, name: str, table: dict[str, str], evidence: dict[str, Any]) -> Tensor:
    """float32: the score with this name, computed from the evidence that its parameters name."""
    if name not in table:
        raise ValueError(f"unknown score '{name}' of {kind}; known: {', '.join(sorted(table))}")
    score = function_at(table[name])
    parameters = [key for key in inspect.signature(score).parameters if key in evidence]
    missing = [key for key in parameters if evidence[key] is None]
    if missing:
        raise ValueError(f"the score '{name}' of {kind} needs {' and '.join(missing)}")
    values: Tensor = score(**{key: evidence[key] for key in parameters})
    return values.float()
