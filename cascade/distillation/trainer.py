"""Recovery training: data -> teacher -> student -> loss -> step, in one readable loop.

Shapes: B = batch, S = block size, N = tokens that count for the loss, D = hidden size (each model its own).
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cascade.data.blocks import IGNORE_INDEX, TokenBlocks
from cascade.data.order import blocks_at
from cascade.distillation.fused import FusedLoss, Objective, fused_loss
from cascade.distillation.head import head_of, last_hidden
from cascade.distillation.schedule import cosine_schedule
from cascade.errors import TrainingError

FORWARD_KL = Objective()


@dataclass(frozen=True)
class TrainingMetrics:
    """What a training run came to; losses in nats per token on the selection blocks (None without any)."""

    num_steps: int
    num_tokens: int
    seconds: float
    selection_loss: float | None
    selection_kl: float | None
    curve: list[dict[str, float]]
    """One entry per logged step: step, num_tokens, loss, selection_loss, selection_kl, learning_rate, ..."""


def distill(
    student: nn.Module,
    teacher: nn.Module | None,
    blocks: TokenBlocks,
    *,
    num_tokens: int,
    batch_size: int = 8,
    microbatch_size: int = 8,
    learning_rate: float = 3e-3,
    warmup_fraction: float = 0.05,
    final_learning_rate_fraction: float = 0.05,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    objective: Objective = FORWARD_KL,
    seed: int = 0,
    first_position: int = 0,
    selection: TokenBlocks | None = None,
    selection_every: int = 25,
    log_path: Path | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> TrainingMetrics:
    """Train `student` in place on `num_tokens` tokens (rounded up to whole steps of `batch_size` blocks).

    Without a teacher the loss is cross-entropy alone. The loss of a step is the sum over its valid target
    tokens divided by their number in the *whole* step, so that the split into microbatches changes nothing.
    `first_position` is the place in the endless, seeded block order where reading starts. `on_step(done, all)`
    is called after each step.

    Raises:
        TrainingError: a loss or gradient is not finite; raised before the optimizer step, so weights are intact.
    """
    num_steps = math.ceil(num_tokens / (batch_size * blocks.block_size))
    warmup_steps = round(warmup_fraction * num_steps)
    optimizer = _adamw(student, learning_rate, weight_decay)
    curve: list[dict[str, float]] = []
    student.train()
    started = time.perf_counter()
    for step in range(num_steps):
        rows = blocks_at(first_position + step * batch_size, batch_size, num_blocks=len(blocks), seed=seed)
        rate = learning_rate * cosine_schedule(
            step, num_steps=num_steps, warmup_steps=warmup_steps, final_fraction=final_learning_rate_fraction
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        found = _accumulate(student, teacher, blocks, rows, objective, microbatch_size)
        value = found["loss"]
        grad_norm = float(nn.utils.clip_grad_norm_(student.parameters(), max_grad_norm))
        if not (math.isfinite(value) and math.isfinite(grad_norm)):
            raise TrainingError(
                f"step {step}: loss {value}, gradient norm {grad_norm}; stopped before the optimizer step. "
                f"Blocks of this batch: {rows.tolist()}. Try a lower learning_rate or look at those blocks."
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        entry: dict[str, float] = {
            "step": step + 1,
            "num_tokens": (step + 1) * batch_size * blocks.block_size,
            **found,
            "learning_rate": rate,
            "grad_norm": grad_norm,
            "seconds": time.perf_counter() - started,
        }
        last = step + 1 == num_steps
        if selection is not None and (last or (step + 1) % selection_every == 0):
            entry |= selection_losses(student, teacher, selection, microbatch_size)
        curve.append(entry)
        if log_path is not None:
            with log_path.open("a") as log:
                log.write(json.dumps(entry) + "\n")
        if on_step is not None:
            on_step(step + 1, num_steps)
    student.eval()
    final = curve[-1] if curve else {}
    return TrainingMetrics(
        num_steps,
        num_steps * batch_size * blocks.block_size,
        time.perf_counter() - started,
        final.get("selection_loss"),
        final.get("selection_kl"),
        curve,
    )


def _accumulate(
    student: nn.Module,
    teacher: nn.Module | None,
    blocks: TokenBlocks,
    rows: Tensor,
    objective: Objective,
    microbatch_size: int,
) -> dict[str, float]:
    """Gradients of one step into `.grad`; its losses in nats per token, of all tokens that count."""
    total_valid = int((blocks.labels[rows][:, 1:] != IGNORE_INDEX).sum())
    if total_valid == 0:
        raise TrainingError(f"no token of blocks {rows.tolist()} counts for the loss (all labels are {IGNORE_INDEX})")
    sums: dict[str, float] = {}
    for part in torch.split(rows, microbatch_size):
        if not (blocks.labels[part][:, 1:] != IGNORE_INDEX).any():
            continue
        found = _losses(student, teacher, blocks.input_ids[part], blocks.labels[part], objective)
        (found.loss / total_valid).backward()  # type: ignore[no-untyped-call]
        for name, value in _sums(found, teacher is not None).items():
            sums[name] = sums.get(name, 0.0) + value / total_valid
    return sums


def _losses(
    student: nn.Module, teacher: nn.Module | None, ids_BS: Tensor, labels_BS: Tensor, objective: Objective
) -> FusedLoss:
    """Losses of the tokens that count; both models stop before their heads, which the loss takes chunk by chunk."""
    device = next(student.parameters()).device
    ids_BS, next_BS = ids_BS.to(device), labels_BS[:, 1:].to(device)
    counted = (next_BS != IGNORE_INDEX).flatten().nonzero()[:, 0]

    def read(model: nn.Module) -> Tensor:
        hidden_BSD = last_hidden(model, input_ids=ids_BS, use_cache=False)
        return hidden_BSD[:, :-1].flatten(0, 1)[counted]

    teacher_ND, teacher_head = None, None
    with _autocast(device):
        if teacher is not None:
            with torch.inference_mode():
                teacher_ND, teacher_head = read(teacher), head_of(teacher)
        student_ND = read(student)
    return fused_loss(
        student_ND,
        head_of(student),
        next_BS.flatten()[counted],
        objective,
        teacher_hidden=teacher_ND,
        teacher_head=teacher_head,
    )


def _sums(found: FusedLoss, with_teacher: bool) -> dict[str, float]:
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
        found = _losses(student, teacher, ids, labels, FORWARD_KL)
        sums[0] += found.cross_entropy.sum().item()
        sums[1] += found.divergence.sum().item()
        count += len(found.divergence)
    student.train()
    losses = {"selection_loss": sums[0] / count}
    return losses if teacher is None else losses | {"selection_kl": sums[1] / count}


def _autocast(device: torch.device) -> Any:
    # CPUs of the common kind have no fast bfloat16; there float32 is both faster and exact.
    return torch.autocast(device.type, dtype=torch.bfloat16) if device.type == "cuda" else nullcontext()


def _adamw(model: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    # Norm weights and biases are not decayed: shrinking them has no regularising effect.
    groups = [
        {"params": [p for p in _trainable(model) if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in _trainable(model) if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)


def _trainable(model: nn.Module) -> Iterator[nn.Parameter]:
    return (parameter for parameter in model.parameters() if parameter.requires_grad)
