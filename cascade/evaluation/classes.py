"""How well a classifier does on examples that nothing else has read.

Shapes: N = examples, C = classes.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from cascade.data.examples import Examples
from cascade.distillation.classes import class_losses
from cascade.distillation.fused import Objective
from cascade.evaluation.record import heldout_record

_BINS = 15


@torch.no_grad()
def class_metrics(
    model: nn.Module, teacher: nn.Module | None, examples: Examples, *, batch_size: int = 64
) -> tuple[list[dict[str, Any]], dict[str, list[float]]]:
    """(records as in family.json, 'task/metric/filter' -> score of each example).

    Accuracy (chance: always the commonest class), loss in nats, expected calibration error, and with a teacher the KL
    to it and how often both say the same.
    """
    examples = examples.labelled()
    ours = class_logits(model, examples, batch_size=batch_size)
    theirs = None if teacher is None else class_logits(teacher, examples, batch_size=batch_size)
    found = class_losses(ours, theirs, examples.labels, Objective())
    right = (ours.argmax(1) == examples.labels).double()
    chance = float(torch.bincount(examples.labels).max() / len(examples))
    metrics = [
        _mean("accuracy", right, higher=True) | {"chance": chance},
        _mean("loss", found.cross_entropy.double()),
        _mean("calibration_error", right) | {"value": calibration_error(ours, examples.labels), "stderr": None},
    ]
    if teacher is not None:
        metrics.append(_mean("kl_to_teacher", found.divergence.double()))
        metrics.append(_mean("top1_agreement", found.agrees.double(), higher=True))
    return metrics, {"heldout/accuracy/None": right.tolist()}


@torch.no_grad()
def class_logits(model: Any, examples: Examples, *, batch_size: int = 64) -> Tensor:
    """float32 [N, C], on the CPU."""
    device = next(model.parameters()).device
    return torch.cat([model(**part.inputs(device)).logits.float().cpu() for part in examples.split(batch_size)])


def calibration_error(logits: Tensor, labels: Tensor, bins: int = _BINS) -> float:
    """Mean gap between confidence and accuracy over bins of equal width, weighted by their examples.

    Guo et al. 2017 (https://arxiv.org/abs/1706.04599).
    """
    confidence, said = torch.softmax(logits.double(), 1).max(1)
    right = (said == labels).double()
    place = (confidence * bins).ceil().clamp(1, bins).long() - 1
    sums = torch.zeros(2, bins, dtype=torch.float64)
    sums[0].scatter_add_(0, place, confidence)
    sums[1].scatter_add_(0, place, right)
    return float((sums[0] - sums[1]).abs().sum() / len(labels))


def _mean(name: str, values: Tensor, *, higher: bool = False) -> dict[str, Any]:
    count = len(values)
    stderr = float(values.std() / math.sqrt(count)) if count > 1 else None
    return heldout_record(name, float(values.mean()), stderr, count, higher=higher)
