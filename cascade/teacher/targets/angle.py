"""The angle between a step's gradient from kept targets and the one from the teacher itself.

Shapes: B = blocks of a step.
"""

import math

import torch
from torch import Tensor, nn

from cascade.data.blocks import TokenBlocks
from cascade.distillation.losses.batch import batch_losses
from cascade.distillation.options import Objective


def gradient_angle(
    student: nn.Module, teacher: nn.Module, batch: TokenBlocks, objective: Objective, *, microbatch_size: int
) -> float:
    """Degrees between two gradients of a step's B blocks, over all parameters: from `batch.known`, and from `teacher`.

    The gradients are taken without dropout; the student is left as it was.
    """
    training = student.training
    student.eval()
    parts = batch.split(microbatch_size)
    exact: dict[str, Tensor] = {}
    from_targets: dict[str, Tensor] = {}
    for part in parts:
        live = TokenBlocks(part.input_ids, part.labels, part.bytes_per_token, part.position_ids, None, part.masked)
        for sums, blocks in ((exact, live), (from_targets, part)):
            _add_gradients(sums, student, teacher, blocks, objective)
    student.train(training)
    dot, lengths = 0.0, [0.0, 0.0]
    for name, gradient in exact.items():
        dot += float((gradient * from_targets[name]).sum(dtype=torch.float64))
        lengths[0] += float(gradient.square().sum(dtype=torch.float64))
        lengths[1] += float(from_targets[name].square().sum(dtype=torch.float64))
    cosine = dot / max(1e-300, math.sqrt(lengths[0] * lengths[1]))
    return math.degrees(math.acos(max(-1.0, min(1.0, cosine))))


def _add_gradients(
    sums: dict[str, Tensor], student: nn.Module, teacher: nn.Module, batch: TokenBlocks, objective: Objective
) -> None:
    weights = {name: weight for name, weight in student.named_parameters() if weight.requires_grad}
    loss = batch_losses(student, teacher, batch, objective, keep=False).fused.loss
    gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    for name, gradient in zip(weights, gradients, strict=True):
        if gradient is not None:
            sums[name] = gradient if name not in sums else sums[name] + gradient
