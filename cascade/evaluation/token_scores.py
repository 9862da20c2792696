"""What a model's logits say of each token, from one product with its head: loss, confidence, distance to a teacher.

Shapes: N = tokens, C = tokens of a chunk, D = hidden size (each model its own), V = vocabulary (each model its own).
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from cascade.distillation.losses.fused import (
    CPU_ROWS_BYTES,
    chunk_rule,
    forward_kl_in_place,
    raw_logits,
    transform_logits,
)
from cascade.distillation.options import Objective
from cascade.models.architecture.head import Head, logits_of
from cascade.runtime.errors import UserError

_FORWARD_KL = Objective()


class Comparison(NamedTuple):
    """A model beside its teacher, over the ids that both have."""

    kl: Tensor
    """float32 [N]: KL(teacher || model) in nats."""
    agrees: Tensor
    """float32 [N]: 1 where both models' likeliest token is the same."""
    teacher_entropy: Tensor
    """float32 [N], nats: entropy of the teacher's probabilities."""
    teacher_loss: Tensor
    """float32 [N], nats: the teacher's own cross-entropy, over all of its rows."""


class TokenScores(NamedTuple):
    """Scores of N tokens."""

    loss: Tensor
    """float32 [N]: cross-entropy in nats, over all of the model's rows."""
    confidence: Tensor
    """float64 [2, N], on the CPU: probability of the likeliest token, and 1 where that is the target."""
    comparison: Comparison | None
    """None without a teacher."""


@torch.no_grad()
def score_tokens(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    *,
    teacher_hidden: Tensor | None = None,
    teacher_head: Head | None = None,
    vocab_size: int | None = None,
) -> TokenScores:
    """Scores of N tokens from hidden states [N, D]; every target [N] counts: leave masked tokens out before.

    Logits exist for a chunk of tokens at a time, once for each model. `vocab_size` are the ids, from 0 on, that the
    models are compared over (`Objective.common_rows`).

    Raises:
        UserError: a target is beyond the common vocabulary.
    """
    heads = [_in_dtype_of(hidden, head)]
    states = [hidden]
    if teacher_hidden is not None and teacher_head is not None:
        heads.append(_in_dtype_of(teacher_hidden, teacher_head))
        states.append(teacher_hidden)
    rows = [len(each.weight) for each in heads]
    common = Objective(vocab_size=vocab_size).common_rows(*rows) if len(heads) > 1 else rows[0]
    if len(targets) and int(targets.max()) >= common:
        raise UserError(f"token id {int(targets.max())} is beyond the models' common vocabulary of {common}")
    chunk = chunk_rule(len(targets), max(rows), hidden.device)
    losses = torch.zeros(5, len(targets), dtype=torch.float32, device=hidden.device)
    confidence = [torch.zeros(2, 0, dtype=torch.float64)]
    buffers = [torch.empty(0, device=hidden.device) for _ in heads]
    for start in range(0, len(targets), chunk):
        part = slice(start, min(start + chunk, len(targets)))
        logits = [raw_logits(state[part], heads[number], buffers, number) for number, state in enumerate(states)]
        for values, model_head in zip(logits, heads, strict=True):
            transform_logits(values, model_head)
        # A product with a bias starts its sums with the bias, `raw_logits` ends with it: the last bit differs, and
        # the calibration error of finished runs is of the former.
        whole = logits[0] if head.bias is None else logits_of(hidden[part], head)
        confidence.append(_confidence(whole, targets[part]))
        block_size = len(logits[0]) if hidden.device.type != "cpu" else max(1, CPU_ROWS_BYTES // (4 * common))
        for first in range(0, len(logits[0]), block_size):
            block = slice(first, first + block_size)
            _score([values[block] for values in logits], targets[part][block], common, losses[:, part][:, block])
    kl, loss, entropy, agrees, teacher_loss = losses
    comparison = Comparison(kl, agrees, entropy, teacher_loss) if len(heads) > 1 else None
    return TokenScores(loss, torch.cat(confidence, 1), comparison)


@torch.no_grad()
def loss_and_entropy(hidden: Tensor, head: Head, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(cross-entropy, entropy of the model's own probabilities), float32 [N] each, in nats."""
    head = _in_dtype_of(hidden, head)
    chunk = chunk_rule(len(targets), len(head.weight), hidden.device)
    losses = torch.zeros(4, len(targets), dtype=torch.float32, device=hidden.device)
    buffers = [torch.empty(0, device=hidden.device)]
    for start in range(0, len(targets), chunk):
        part = slice(start, min(start + chunk, len(targets)))
        logits = raw_logits(hidden[part], head, buffers, 0)
        transform_logits(logits, head)
        block_size = len(logits) if hidden.device.type != "cpu" else max(1, CPU_ROWS_BYTES // (4 * len(head.weight)))
        for first in range(0, len(logits), block_size):
            block = slice(first, first + block_size)
            values = logits[block]
            forward_kl_in_place(values, values.clone(), targets[part][block], _FORWARD_KL, losses[:, part][:, block])
    return losses[1], losses[2]


def _in_dtype_of(hidden: Tensor, head: Head) -> Head:
    return replace(head, weight=head.weight.detach().to(hidden.dtype))


def _confidence(logits: Tensor, targets: Tensor) -> Tensor:
    """float64 [2, C], on the CPU: probability of the likeliest token, and 1 where that is the target."""
    best = logits.max(-1)
    probability = (best.values - logits.logsumexp(-1)).exp()
    return torch.stack([probability.double(), (best.indices == targets).double()]).cpu()


def _score(logits: list[Tensor], targets: Tensor, common: int, losses: Tensor) -> None:
    """Scores of a block of tokens into `losses` [5, C]: KL, loss, teacher's entropy, agreement, teacher's loss.

    `logits` [C, V], of the model and of its teacher where there is one, are used up.
    """
    if len(logits) == 1:
        losses[1] = _cross_entropy(logits[0], targets)
        return
    losses[4] = _cross_entropy(logits[1], targets)
    own_loss = None if logits[0].shape[1] == common else _cross_entropy(logits[0], targets)
    model, teacher = (values[:, :common].contiguous() for values in logits)
    losses[3] = model.argmax(-1) == teacher.argmax(-1)
    forward_kl_in_place(model, teacher, targets, _FORWARD_KL, losses)
    if own_loss is not None:
        losses[1] = own_loss


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return -torch.log_softmax(logits, -1).gather(-1, targets[:, None])[:, 0]
