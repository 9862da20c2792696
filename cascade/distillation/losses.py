"""Losses, one value per token, in nats. The mask and the mean are the loop's business.

Shapes: N = tokens, V = vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cascade.data.blocks import IGNORE_INDEX


def forward_kl(student_logits_NV: Tensor, teacher_logits_NV: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KL(teacher ‖ student) per token [N], in nats, times temperature squared.

    The student must cover what the teacher does. The factor keeps the gradient on cross-entropy's scale when
    the temperature changes (section 2 of Hinton et al. 2015, https://arxiv.org/abs/1503.02531). Exactly 0, with
    a gradient of exactly 0, where the logits are equal.
    """
    return _ForwardKL.apply(student_logits_NV, teacher_logits_NV, temperature)  # type: ignore[no-untyped-call, no-any-return]


def cross_entropy(student_logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """-log p(target) per token [N], in nats; 0 where the target is IGNORE_INDEX."""
    return F.cross_entropy(student_logits_NV.float(), targets_N, ignore_index=IGNORE_INDEX, reduction="none")


LOSSES: dict[str, Callable[..., Tensor]] = {"forward_kl": forward_kl}
"""Losses between student and teacher logits, by their name in a recipe."""


class _ForwardKL(torch.autograd.Function):
    """The gradient is known in closed form, T (q - p): written out, it costs one pass instead of autograd's four."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        log_q = F.log_softmax(student.float() / temperature, dim=-1)
        log_p = F.log_softmax(teacher.float() / temperature, dim=-1)
        p = log_p.exp()
        divergence: Tensor = torch.linalg.vecdot(p, log_p - log_q)
        ctx.save_for_backward(log_q.exp_().sub_(p).mul_(temperature))
        ctx.dtype = student.dtype
        return divergence * temperature**2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (difference,) = ctx.saved_tensors
        return (difference * grad[:, None]).to(ctx.dtype), None, None
