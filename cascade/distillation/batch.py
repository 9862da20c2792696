"""What a batch of text costs a student: both models run to their heads, the fused loss does the rest.

Shapes: B = batch, S = block size, N = tokens that count for the loss, D = hidden size (each model its own).
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from cascade.data.blocks import IGNORE_INDEX, TokenBlocks
from cascade.distillation.fused import FusedLoss, Objective, fused_loss
from cascade.distillation.head import head_of, last_hidden
from cascade.distillation.memory import teacher_hidden

FORWARD_KL = Objective()


def batch_losses(
    student: nn.Module, teacher: nn.Module | None, ids_BS: Tensor, labels_BS: Tensor, objective: Objective
) -> FusedLoss:
    """Losses of the tokens that count; both models stop before their heads, which the loss takes chunk by chunk."""
    device = next(student.parameters()).device
    ids_BS, next_BS = ids_BS.to(device), labels_BS[:, 1:].to(device)
    counted = (next_BS != IGNORE_INDEX).flatten().nonzero()[:, 0]

    def of_counted(hidden_BSD: Tensor) -> Tensor:
        return hidden_BSD[:, :-1].flatten(0, 1)[counted]

    teacher_ND, teacher_head = None, None
    with _autocast(device):
        if teacher is not None:
            with torch.no_grad():
                teacher_ND, teacher_head = of_counted(teacher_hidden(teacher, ids_BS)), head_of(teacher)
        student_ND = of_counted(last_hidden(student, input_ids=ids_BS, use_cache=False))
    return fused_loss(
        student_ND,
        head_of(student),
        next_BS.flatten()[counted],
        objective,
        teacher_hidden=teacher_ND,
        teacher_head=teacher_head,
    )


def sums_of(found: FusedLoss, with_teacher: bool) -> dict[str, float]:
    """A batch's losses summed over its tokens."""
    sums = {"loss": found.loss.item(), "cross_entropy": found.cross_entropy.sum().item()}
    if not with_teacher:
        return sums
    return sums | {
        "divergence": found.divergence.sum().item(),
        "teacher_entropy": found.teacher_entropy.sum().item(),
        "agreement": found.agrees.sum().item(),
    }


@torch.no_grad()
def selection_losses(
    student: nn.Module, teacher: nn.Module | None, blocks: TokenBlocks, batch_size: int
) -> dict[str, float]:
    """{'selection_loss', 'selection_kl' (with a teacher)}: nats per token over `blocks`; student left in train mode."""
    student.eval()
    sums, count = [0.0, 0.0], 0
    for ids, labels in blocks.batches(batch_size):
        found = batch_losses(student, teacher, ids, labels, FORWARD_KL)
        sums[0] += found.cross_entropy.sum().item()
        sums[1] += found.divergence.sum().item()
        count += len(found.divergence)
    student.train()
    losses = {"selection_loss": sums[0] / count}
    return losses if teacher is None else losses | {"selection_kl": sums[1] / count}


def _autocast(device: torch.device) -> Any:
    # CPUs of the common kind have no fast bfloat16; there float32 is both faster and exact.
    return torch.autocast(device.type, dtype=torch.bfloat16) if device.type == "cuda" else nullcontext()
