"""What a batch of labelled examples costs a student: class probabilities instead of tokens', the same divergences.

Hinton et al. 2015 (https://arxiv.org/abs/1503.02531): soft labels at a temperature, beside the hard ones.

Shapes: N = examples, C = classes, B = batch, S = tokens.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from cascade.data.blocks import IGNORE_INDEX
from cascade.data.examples import Examples
from cascade.distillation.features import FeatureLoss, Seen
from cascade.distillation.fused import FusedLoss, Objective, fused_loss
from cascade.distillation.head import Head
from cascade.distillation.memory import remembered


def example_losses(
    student: Any,
    teacher: nn.Module | None,
    batch: Examples,
    objective: Objective,
    features: FeatureLoss | None = None,
    *,
    keep: bool = True,
) -> tuple[FusedLoss, dict[str, Tensor]]:
    """(loss and its parts, losses on what happens inside), summed over the examples.

    Where an example has no label the divergence counts with its own share, and there is no cross-entropy.

    Raises:
        ValueError: an example has neither label nor teacher.
    """
    inputs = batch.inputs(next(student.parameters()).device)
    labels = batch.labels.to(inputs[next(iter(inputs))].device)
    theirs_NC, theirs = None, Seen()
    if teacher is not None:
        theirs_NC, theirs = _teacher(teacher, inputs, features, keep)
    inside: dict[str, Tensor] = {}
    if features is None:
        ours_NC = student(**inputs).logits.float()
    else:
        with features.watching(student, teacher=False) as ours:
            ours_NC = student(**inputs).logits.float()
        mask_BS = inputs["attention_mask"].bool()
        inside = features.losses(ours, theirs, mask_BS, lambda: mask_BS[:, None, :].expand(-1, mask_BS.shape[1], -1))
    return class_losses(ours_NC, theirs_NC, labels, objective), inside


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
        wanted = objective if labelled else replace(objective, cross_entropy_weight=0.0)
        found = fused_loss(
            ours[rows],
            head,
            labels[rows].clamp_min(0),
            wanted,
            teacher_hidden=None if theirs is None else theirs[rows],
            teacher_head=None if theirs is None else head,
        )
        if not labelled:
            none = torch.zeros_like(found.cross_entropy)
            found = found._replace(loss=found.loss * (1 - objective.cross_entropy_weight), cross_entropy=none)
        parts[labelled] = found
    loss = torch.stack([part.loss for part in parts.values()]).sum()
    columns = []
    for number in range(1, len(FusedLoss._fields)):
        column = torch.zeros(len(labels), device=ours.device)
        for labelled, part in parts.items():
            column[known if labelled else ~known] = part[number]
        columns.append(column)
    return FusedLoss(loss, *columns)


@torch.no_grad()
def _teacher(teacher: Any, inputs: dict[str, Tensor], features: FeatureLoss | None, keep: bool) -> tuple[Tensor, Seen]:
    def look() -> dict[str, Tensor]:
        if features is None:
            return {"logits": teacher(**inputs).logits.float()}
        with features.watching(teacher, teacher=True) as seen:
            logits = teacher(**inputs).logits.float()
        return {"logits": logits} | seen.tensors()

    what = "classes" if features is None else f"classes {features.wanted()}"
    found = remembered(teacher, inputs, what, look, keep=keep)
    return found["logits"], Seen.of(found)
