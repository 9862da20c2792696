"""How well a classifier does on examples that nothing else has read.

Shapes: N = examples, C = classes.
"""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from cascade.data.examples import Examples
from cascade.distillation.losses.class_losses import class_losses
from cascade.distillation.options import Objective
from cascade.evaluation.long_tail import calibration_error, long_tail
from cascade.evaluation.metric import heldout_metric
from cascade.report.records import Metric


@torch.no_grad()
def class_metrics(
    model: Any, teacher: nn.Module | None, examples: Examples, *, batch_size: int = 64
) -> tuple[list[Metric], dict[str, list[float]], dict[str, Any] | None]:
    """(metrics, 'task/metric/filter' -> score of each example, `long_tail` by class with a teacher).

    Accuracy (chance: always the commonest class), loss in nats, expected calibration error, and with a teacher the KL
    to it and how often both say the same.
    """
    examples = examples.labelled()
    logits_NC = class_logits(model, examples, batch_size=batch_size)
    teacher_NC = None if teacher is None else class_logits(teacher, examples, batch_size=batch_size)
    losses = class_losses(logits_NC, teacher_NC, examples.labels, Objective())
    correct_N = (logits_NC.argmax(1) == examples.labels).double()
    confidence_N = torch.softmax(logits_NC.double(), 1).amax(1)
    chance = float(torch.bincount(examples.labels).max() / len(examples))
    error = calibration_error(confidence_N, correct_N)
    metrics = [
        replace(_mean("accuracy", correct_N, higher=True), chance=chance),
        _mean("loss", losses.cross_entropy.double()),
        heldout_metric("calibration_error", error, None, len(correct_N), higher=False),
    ]
    tail = None
    if teacher_NC is not None:
        teacher_losses_N = torch.nn.functional.cross_entropy(teacher_NC, examples.labels, reduction="none")
        classes = getattr(getattr(model, "config", None), "id2label", {})
        names = [str(classes.get(number, number)) for number in range(logits_NC.shape[1])]
        tail = long_tail(losses.teacher_entropy, teacher_losses_N, losses.cross_entropy, examples.labels, names)
        metrics.append(_mean("kl_to_teacher", losses.divergence.double()))
        metrics.append(_mean("top1_agreement", losses.agrees.double(), higher=True))
    return metrics, {"heldout/accuracy/None": correct_N.tolist()}, tail


@torch.no_grad()
def class_logits(model: Any, examples: Examples, *, batch_size: int = 64) -> Tensor:
    """The model's logits, float32 [N, C], on the CPU."""
    device = next(model.parameters()).device
    return torch.cat([model(**part.inputs(device)).logits.float().cpu() for part in examples.split(batch_size)])


def _mean(name: str, values: Tensor, *, higher: bool = False) -> Metric:
    count = len(values)
    stderr = float(values.std() / math.sqrt(count)) if count > 1 else None
    return heldout_metric(name, float(values.mean()), stderr, count, higher=higher)
