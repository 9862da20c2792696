"""How well a classifier does on examples that nothing else has read.

Shapes: N = examples, C = classes.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from cascade.data.examples import Examples
from cascade.distillation.classes import class_losses
from cascade.distillation.options import Objective
from cascade.evaluation.record import heldout_record
from cascade.evaluation.tail import calibration_error, long_tail


@torch.no_grad()
def class_metrics(
    model: Any, teacher: nn.Module | None, examples: Examples, *, batch_size: int = 64
) -> tuple[list[dict[str, Any]], dict[str, list[float]], dict[str, Any] | None]:
    """(records as in family.json, 'task/metric/filter' -> score of each example, `long_tail` by class with a teacher).

    Accuracy (chance: always the commonest class), loss in nats, expected calibration error, and with a teacher the KL
    to it and how often both say the same.
    """
    examples = examples.labelled()
    ours = class_logits(model, examples, batch_size=batch_size)
    theirs = None if teacher is None else class_logits(teacher, examples, batch_size=batch_size)
    found = class_losses(ours, theirs, examples.labels, Objective())
    right = (ours.argmax(1) == examples.labels).double()
    sure = torch.softmax(ours.double(), 1).amax(1)
    chance = float(torch.bincount(examples.labels).max() / len(examples))
    metrics = [
        _mean("accuracy", right, higher=True) | {"chance": chance},
        _mean("loss", found.cross_entropy.double()),
        _mean("calibration_error", right) | {"value": calibration_error(sure, right), "stderr": None},
    ]
    tail = None
    if theirs is not None:
        losses = torch.nn.functional.cross_entropy(theirs, examples.labels, reduction="none")
        known = getattr(getattr(model, "config", None), "id2label", {})
        names = [str(known.get(one, one)) for one in range(ours.shape[1])]
        tail = long_tail(found.teacher_entropy, losses, found.cross_entropy, examples.labels, names)
        metrics.append(_mean("kl_to_teacher", found.divergence.double()))
        metrics.append(_mean("top1_agreement", found.agrees.double(), higher=True))
    return metrics, {"heldout/accuracy/None": right.tolist()}, tail


@torch.no_grad()
def class_logits(model: Any, examples: Examples, *, batch_size: int = 64) -> Tensor:
    """float32 [N, C], on the CPU."""
    device = next(model.parameters()).device
    return torch.cat([model(**part.inputs(device)).logits.float().cpu() for part in examples.split(batch_size)])


def _mean(name: str, values: Tensor, *, higher: bool = False) -> dict[str, Any]:
    count = len(values)
    stderr = float(values.std() / math.sqrt(count)) if count > 1 else None
    return heldout_record(name, float(values.mean()), stderr, count, higher=higher)
