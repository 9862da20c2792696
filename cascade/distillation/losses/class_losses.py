"""The loss of a batch of labelled examples: the divergences of token losses, over class probabilities.

Hinton et al. 2015 (https://arxiv.org/abs/1503.02531): soft labels at a temperature, beside the hard ones.

Shapes: N = examples, C = classes, B = batch, S = tokens.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from cascade.data.blocks import IGNORE_INDEX
from cascade.data.examples import Examples
from cascade.distillation.losses.features import FeatureLoss, Seen
from cascade.distillation.losses.fused import FusedLoss, fused_loss
from cascade.distillation.options import Objective
from cascade.distillation.teacher_memory import remembered
from cascade.models.architecture.head import Head


def example_losses(
    student: Any,
    teacher: nn.Module | None,
    batch: Examples,
    objective: Objective,
    features: FeatureLoss | None = None,
    *,
    keep: bool = True,
) -> tuple[FusedLoss, dict[str, Tensor]]:
    """(loss and its parts, feature losses by name), summed over the examples.

    An example without a label has no cross-entropy; its divergence keeps its share of the loss.

    Raises:
        ValueError: an example has neither label nor teacher.
    """
    inputs = batch.inputs(next(student.parameters()).device)
    labels = batch.labels.to(inputs[next(iter(inputs))].device)
    ours, theirs, inside = both_outputs(student, teacher, inputs, _logits, "classes", features, keep)
    return class_losses(ours, theirs, labels, objective), inside


def both_outputs(
    student: Any,
    teacher: Any,
    inputs: dict[str, Tensor],
    read: Callable[[Any, dict[str, Tensor]], Tensor],
    what: str,
    features: FeatureLoss | None,
    keep: bool,
) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    """(the student's output, the teacher's without a gradient, feature losses by name).

    `read(model, inputs)` gives an output [N, ...]; a teacher that remembers keeps it under the name `what`.
    """
    theirs, theirs_inside = None, Seen()
    if teacher is not None:
        theirs, theirs_inside = _of_teacher(teacher, inputs, read, what, features, keep)
    if features is None:
        return read(student, inputs), theirs, {}
    with features.watching(student, teacher=False) as ours_inside:
        ours = read(student, inputs)
    mask_BS = inputs["attention_mask"].bool()
    sees = lambda: mask_BS[:, None, :].expand(-1, mask_BS.shape[1], -1)  # noqa: E731
    return ours, theirs, features.losses(ours_inside, theirs_inside, mask_BS, sees)


def _logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    logits: Tensor = model(**inputs).logits
    return logits.float()


def class_losses(ours: Tensor, theirs: Tensor | None, labels: Tensor, objective: Objective) -> FusedLoss:
    """Losses of logits [N, C] against the teacher's [N, C] and labels [N]: `fused_loss` with a head that does nothing.

    Raises:
        ValueError: an example has neither label nor teacher.
    """
    head = Head(torch.eye(ours.shape[1], device=ours.device), None)
    known = labels != IGNORE_INDEX
    parts: dict[bool, FusedLoss] = {}
    for labelled in (True, False):
        rows = known if labelled else ~known
        if not rows.any():
            continue
        if theirs is None and not labelled:
            raise ValueError("an example without a label needs a teacher")
        fused = fused_loss(
            ours[rows],
            head,
            labels[rows].clamp_min(0),
            objective if labelled else replace(objective, cross_entropy_weight=0.0),
            teacher_hidden=None if theirs is None else theirs[rows],
            teacher_head=None if theirs is None else head,
        )
        if not labelled:
            none = torch.zeros_like(fused.cross_entropy)
            fused = fused._replace(loss=fused.loss * (1 - objective.cross_entropy_weight), cross_entropy=none)
        parts[labelled] = fused
    loss = torch.stack([part.loss for part in parts.values()]).sum()
    columns = []
    for number in range(1, len(FusedLoss._fields)):
        column = torch.zeros(len(labels), device=ours.device)
        for labelled, part in parts.items():
            column[known if labelled else ~known] = part[number]
        columns.append(column)
    return FusedLoss(loss, *columns)


@torch.no_grad()
def _of_teacher(
    teacher: Any,
    inputs: dict[str, Tensor],
    read: Callable[[Any, dict[str, Tensor]], Tensor],
    what: str,
    features: FeatureLoss | None,
    keep: bool,
) -> tuple[Tensor, Seen]:
    def look() -> dict[str, Tensor]:
        if features is None:
            return {what: read(teacher, inputs)}
        with features.watching(teacher, teacher=True) as seen:
            output = read(teacher, inputs)
        return {what: output} | seen.tensors()

    name = what if features is None else f"{what} {features.teacher_tensors()}"
    tensors = remembered(teacher, inputs, name, look, keep=keep)
    return tensors[what], Seen.of(tensors)
