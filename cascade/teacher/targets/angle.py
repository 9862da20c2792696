"""How far the gradient from what was kept of a teacher is from the exact one.

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
    """Degrees between the gradients of a step's B blocks towards all parameters: from `batch.known`, and live.

    The student is left as it was, without dropout meanwhile.
    """
    training = student.training
    student.eval()
    parts = batch.split(microbatch_size)
    exact: dict[str, Tensor] = {}
    kept: dict[str, Tensor] = {}
    for part in parts:
        live = TokenBlocks(part.input_ids, part.labels, part.bytes_per_token, part.position_ids, None, part.masked)
        for sums, own in ((exact, live), (kept, part)):
            _add_gradients(sums, student, teacher, own, objective)
    student.train(training)
    dot, lengths = 0.0, [0.0, 0.0]
    for name, value in exact.items():
        dot += float((value * kept[name]).sum(dtype=torch.float64))
        lengths[0] += float(value.square().sum(dtype=torch.float64))
        lengths[1] += float(kept[name].square().sum(dtype=torch.float64))
    cosine = dot / max(1e-300, math.sqrt(lengths[0] * lengths[1]))
    return math.degrees(math.acos(max(-1.0, min(1.0, cosine))))


def _add_gradients(
    sums: dict[str, Tensor], student: nn.Module, teacher: nn.Module, batch: TokenBlocks, objective: Objective
) -> None:
    weights = {name: weight for name, weight in student.named_parameters() if weight.requires_grad}
    loss = batch_losses(student, teacher, batch, objective, keep=False).fused.loss
    found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    for name, gradient in zip(weights, found, strict=True):
        if gradient is not None:
            sums[name] = gradient if name not in sums else sums[name] + gradient
