"""Head and divergence fused: logits exist for a chunk of tokens at a time, with gradients formed in the same pass.

Shapes: N = tokens, C = tokens of a chunk, D = hidden size (each model its own), V = vocabulary.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cascade.data.token_targets import DrawnTargets, ListedTargets
from cascade.distillation.losses.divergences import DIVERGENCES
from cascade.distillation.losses.sampled_ids import drawn_kl
from cascade.distillation.losses.top_ids import listed_kl
from cascade.distillation.options import Objective
from cascade.models.architecture.head import Head
from cascade.runtime.errors import UserError

CPU_CHUNK_BYTES, _GPU_CHUNK_BYTES = 1 << 25, 1 << 29
CPU_ROWS_BYTES = 1 << 20
"""Bytes of logits that a CPU works on at a time between two matrix products: they stay in its cache."""


_Source = tuple[Tensor, Head] | ListedTargets | DrawnTargets
"""What is learned from: a teacher's hidden states, or raw logits, with its head; or some of its probabilities."""


class FusedLoss(NamedTuple):
    """Sum of the losses, and what each token contributed."""

    loss: Tensor
    """[]: with a gradient towards the student's hidden states and head."""
    divergence: Tensor
    """[N] nats, temperature scale included; zeros without a teacher."""
    cross_entropy: Tensor
    """[N] nats, at temperature 1."""
    teacher_entropy: Tensor
    """[N] nats, at the temperature."""
    agrees: Tensor
    """[N]: 1 where both models' likeliest token is the same."""


def fused_loss(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    objective: Objective,
    *,
    teacher_hidden: Tensor | None = None,
    teacher_head: Head | None = None,
    known: ListedTargets | DrawnTargets | None = None,
    chunk_size: int | None = None,
) -> FusedLoss:
    """Losses of N tokens from hidden states [N, D]; every target [N] counts: leave masked tokens out before.

    Instead of a teacher's hidden states, `known` may have its likeliest ids (`listed_kl`) or a sample of its
    probabilities (`drawn_kl`), both for forward KL at temperature 1. Without either the loss is cross-entropy.

    All of it is over the V ids that the models have in common (`Objective.common_rows`): with logits z and u of student
    and teacher, p_i = exp(u_i / T) / sum_{j < V} exp(u_j / T) and q_i likewise of z, for i < V. These are the models'
    own distributions under the condition that the id is one of the V, so rows of padding have no part in the loss, in
    cross-entropy, entropy or agreement, and get no gradient. What is listed of ids from V on is left out, and the rest
    taken under the same condition.

    Raises:
        UserError: an unknown divergence, one that `known` probabilities cannot give, or a target beyond the common
            vocabulary.
    """
    if objective.divergence not in DIVERGENCES:
        raise UserError(f"loss '{objective.divergence}' is unknown; known: {', '.join(DIVERGENCES)}")
    if known is not None and (objective.divergence, objective.temperature) != ("forward_kl", 1.0):
        raise UserError(
            f"{objective.divergence} at temperature {objective.temperature:g} cannot be had from some of a teacher's "
            "probabilities; use forward_kl at temperature 1, a live teacher or its hidden states"
        )
    rows = [len(model_head.weight) for model_head in (head, teacher_head) if model_head is not None]
    vocabulary = objective.common_rows(*rows)
    if teacher_head is not None:
        teacher_head = teacher_head.narrowed(vocabulary)
    if isinstance(known, ListedTargets):
        known = known.within(vocabulary)
    if len(targets) and int(targets.max()) >= vocabulary:
        raise UserError(f"token id {int(targets.max())} is beyond the models' common vocabulary of {vocabulary}")
    head = head.narrowed(vocabulary)
    chunk = chunk_size or chunk_rule(len(targets), vocabulary, hidden.device)
    teacher = None if teacher_hidden is None or teacher_head is None else (teacher_hidden.detach(), teacher_head)
    source: _Source | None = teacher if teacher is not None else known
    loss, tokens = _Fused.apply(hidden, head.weight, head.bias, head, source, targets, objective, chunk)  # type: ignore[no-untyped-call]
    return FusedLoss(loss, *tokens.unbind())


def chunk_rule(num_tokens: int, vocabulary: int, device: torch.device) -> int:
    """Tokens whose logits exist at a time: a power of two, 32 MB of them on a CPU and 512 MB on a GPU."""
    limit = (CPU_CHUNK_BYTES if device.type == "cpu" else _GPU_CHUNK_BYTES) // (4 * vocabulary)
    return max(16, min(1 << max(0, limit.bit_length() - 1), 1 << max(0, num_tokens - 1).bit_length()))


class _Fused(torch.autograd.Function):
    """Everything is known once the logits are: the gradients are formed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        source: _Source | None,
        targets: Tensor,
        objective: Objective,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        needs_grad = ctx.needs_input_grad[:3]
        # Products are taken in the hidden states' dtype (16 bits under autocast), gradients of the weight in float32.
        original, weight, num_tokens = weight.dtype, weight.detach().to(hidden.dtype), len(targets)
        head = replace(head, weight=weight)
        if isinstance(source, tuple):
            source = source[0], replace(source[1], weight=source[1].weight.detach().to(source[0].dtype))
        tokens = torch.zeros(4, num_tokens, dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_grad[0] else None
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if needs_grad[1] else None
        grad_bias = torch.zeros(len(weight), dtype=torch.float32, device=weight.device) if needs_grad[2] else None
        buffers = [torch.empty(0, device=hidden.device) for _ in range(2)]
        for start in range(0, num_tokens, chunk):
            part = slice(start, min(start + chunk, num_tokens))
            logits = raw_logits(hidden[part].detach(), head, buffers, 0)
            if isinstance(source, tuple):
                expected: _Source | None = raw_logits(source[0][part], source[1], buffers, 1), source[1]
            else:
                expected = None if source is None else source.rows(part)
            rows = len(logits) if hidden.device.type != "cpu" else max(1, CPU_ROWS_BYTES // (4 * logits.shape[1]))
            for first in range(0, len(logits), rows):
                block = slice(first, first + rows)
                _work(
                    logits[block],
                    head,
                    _block_of(expected, block),
                    targets[part][block],
                    objective,
                    tokens[:, part][:, block],
                    with_gradient=any(needs_grad),
                )
            gradient = logits.to(weight.dtype)  # now the loss's gradient with respect to the raw logits
            if grad_hidden is not None:
                torch.mm(gradient, weight, out=grad_hidden[part])
            if grad_weight is not None:
                _add_outer(grad_weight, gradient, hidden[part].detach())
            if grad_bias is not None:
                grad_bias += logits.sum(0)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = original, None if bias is None else bias.dtype
        weight_of_ce = objective.cross_entropy_weight if source is not None else 1.0
        loss = (1 - weight_of_ce) * tokens[0].sum() + weight_of_ce * tokens[1].sum()
        ctx.mark_non_differentiable(tokens)
        return loss, tokens

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            None if grad_hidden is None else grad_hidden.mul_(grad),
            None if grad_weight is None else grad_weight.mul_(grad).to(weight_dtype),
            None if grad_bias is None else grad_bias.mul_(grad).to(bias_dtype),
            *[None] * 5,
        )


def raw_logits(hidden: Tensor, head: Head, buffers: list[Tensor], which: int) -> Tensor:
    """[C, V] float32, before scale and soft-cap, in a buffer that the next chunk uses again."""
    weight, bias = head.weight, head.bias
    shape = (len(hidden), len(weight))
    if buffers[which].numel() < shape[0] * shape[1]:
        buffers[which] = torch.empty(shape[0] * shape[1], dtype=torch.float32, device=hidden.device)
    logits = buffers[which][: shape[0] * shape[1]].view(shape)
    if weight.dtype == torch.float32:
        torch.mm(hidden, weight.T, out=logits)
    elif weight.device.type == "cuda":
        logits.copy_(torch.mm(hidden, weight.T, out_dtype=torch.float32))  # a 16-bit logit would cost the gradient
    else:
        torch.mm(hidden.float(), weight.T.float(), out=logits)
    return logits if bias is None else logits.add_(bias.detach())


def _add_outer(total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
    """Add gradient.T @ hidden in float32."""
    if gradient.dtype == torch.float32:
        total.addmm_(gradient.T, hidden.float())
    elif gradient.device.type == "cuda":
        total += torch.mm(gradient.T, hidden.to(gradient.dtype), out_dtype=torch.float32)
    else:
        total.addmm_(gradient.T.float(), hidden.float())


def _block_of(expected: _Source | None, block: slice) -> _Source | None:
    """The rows of a block of tokens."""
    if isinstance(expected, tuple):
        return expected[0][block], expected[1]
    return None if expected is None else expected.rows(block)


def _work(
    logits: Tensor,
    head: Head,
    expected: _Source | None,
    targets: Tensor,
    objective: Objective,
    tokens: Tensor,
    *,
    with_gradient: bool,
) -> None:
    """Losses of a block of tokens into `tokens` [4, C]; its raw `logits` [C, V] become the loss's gradient.

    `expected` has the teacher's raw logits [C, V] and its head, or targets [C, K].
    """
    chain = transform_logits(logits, head)
    if isinstance(expected, tuple):
        teacher_logits, teacher_head = expected
        transform_logits(teacher_logits, teacher_head)
        tokens[3] = logits.argmax(-1) == teacher_logits.argmax(-1)
        plain = objective.temperature == 1 and objective.divergence == "forward_kl"
        (forward_kl_in_place if plain else _any_divergence)(logits, teacher_logits, targets, objective, tokens)
    elif isinstance(expected, DrawnTargets):
        drawn_kl(logits, expected, targets, objective.cross_entropy_weight, tokens)
    elif expected is not None:
        listed_kl(logits, expected, targets, objective.cross_entropy_weight, tokens)
    else:
        log_q = torch.log_softmax(logits, -1)
        tokens[1] = -log_q.gather(-1, targets[:, None])[:, 0]
        if with_gradient:
            torch.exp(log_q, out=logits)
            logits.scatter_add_(-1, targets[:, None], logits.new_full((len(targets), 1), -1.0))
    if with_gradient and chain is not None:
        logits.mul_(chain)
    if with_gradient and head.scale != 1:
        logits.mul_(head.scale)


def transform_logits(logits: Tensor, head: Head) -> Tensor | None:
    """Scale and soft-cap in place; the soft-cap's derivative [C, V]."""
    if head.scale != 1:
        logits.mul_(head.scale)
    if head.softcap is None:
        return None
    logits.div_(head.softcap).tanh_()
    chain = 1 - logits.square()
    logits.mul_(head.softcap)
    return chain


def forward_kl_in_place(
    logits: Tensor, expected: Tensor, targets: Tensor, objective: Objective, tokens: Tensor
) -> None:
    """Forward KL at temperature 1, the usual case, with one buffer and two exponentials per logit."""
    share, index = objective.cross_entropy_weight, targets[:, None]
    logits -= logits.amax(-1, keepdim=True)
    expected -= expected.amax(-1, keepdim=True)
    p = expected.exp()
    p_sum = p.sum(-1)
    entropy_part = (p * expected).sum(-1) / p_sum
    expected -= logits
    target_logits = logits.gather(-1, index)[:, 0]
    logits.exp_()
    q_sum = logits.sum(-1)
    # Both logarithms of sums are of numbers between 1 and V: their difference is exact where the models agree.
    log_p_sum, log_q_sum = p_sum.log(), q_sum.log()
    tokens[0] = (p * expected).sum(-1) / p_sum - (log_p_sum - log_q_sum)
    tokens[1] = log_q_sum - target_logits
    tokens[2] = log_p_sum - entropy_part
    logits.mul_(q_sum.reciprocal()[:, None])
    logits.sub_(p.mul_(((1 - share) * p_sum.reciprocal())[:, None]))
    if share:
        logits.scatter_add_(-1, index, logits.new_full((len(targets), 1), -share))


def _any_divergence(logits: Tensor, expected: Tensor, targets: Tensor, objective: Objective, tokens: Tensor) -> None:
    temperature, share, index = objective.temperature, objective.cross_entropy_weight, targets[:, None]
    log_q, log_p = torch.log_softmax(logits / temperature, -1), torch.log_softmax(expected / temperature, -1)
    divergence, gradient = DIVERGENCES[objective.divergence](log_q, log_p, objective.options)
    squared = objective.temperature_scale == "tsq"
    tokens[0] = divergence * (temperature**2 if squared else 1.0)
    tokens[1] = torch.logsumexp(logits, -1) - logits.gather(-1, index)[:, 0]
    tokens[2] = -(log_p.exp() * log_p).sum(-1)
    gradient.mul_((1 - share) * (temperature if squared else 1 / temperature))
    if share:
        text = torch.softmax(logits, -1)
        text.scatter_add_(-1, index, logits.new_full((len(targets), 1), -1.0))
        gradient.add_(text, alpha=share)
    logits.copy_(gradient)
