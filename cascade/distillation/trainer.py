"""Recovery training: data -> teacher -> student -> loss -> step, in one readable loop.

Shapes: B = batch, S = block size, N = B x S positions, V = vocabulary.
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
from cascade.distillation.losses import LOSSES, cross_entropy
from cascade.distillation.schedule import cosine_schedule
from cascade.errors import TrainingError


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
    loss: str = "forward_kl",
    temperature: float = 1.0,
    cross_entropy_weight: float = 0.0,
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
    device = next(student.parameters()).device
    optimizer = _adamw(student, learning_rate, weight_decay)
    objective = _Objective(loss, temperature, 1.0 if teacher is None else cross_entropy_weight)
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
        value, grad_norm = _accumulate(
            student, teacher, blocks, rows, objective, microbatch_size, device, max_grad_norm
        )
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
            "loss": value,
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


@dataclass(frozen=True)
class _Objective:
    loss: str
    temperature: float
    cross_entropy_weight: float

    def __call__(self, student_NV: Tensor, teacher_NV: Tensor | None, targets_N: Tensor) -> Tensor:
        weight = self.cross_entropy_weight
        if teacher_NV is None:
            return cross_entropy(student_NV, targets_N)
        per_token = LOSSES[self.loss](student_NV, teacher_NV, temperature=self.temperature) * (
            targets_N != IGNORE_INDEX
        )
        return per_token if weight == 0 else (1 - weight) * per_token + weight * cross_entropy(student_NV, targets_N)


def _accumulate(
    student: nn.Module,
    teacher: nn.Module | None,
    blocks: TokenBlocks,
    rows: Tensor,
    objective: _Objective,
    microbatch_size: int,
    device: torch.device,
    max_grad_norm: float,
) -> tuple[float, float]:
    """Gradients of one step into `.grad`; returns (loss in nats per token, gradient norm before clipping)."""
    total_valid = int((blocks.labels[rows][:, 1:] != IGNORE_INDEX).sum())
    if total_valid == 0:
        raise TrainingError(f"no token of blocks {rows.tolist()} counts for the loss (all labels are {IGNORE_INDEX})")
    value = 0.0
    for part in torch.split(rows, microbatch_size):
        ids, labels = blocks.input_ids[part].to(device), blocks.labels[part].to(device)
        with _autocast(device):
            student_NV, teacher_NV, targets_N = _logits_and_targets(student, teacher, ids, labels)
        step_loss = objective(student_NV, teacher_NV, targets_N).sum() / total_valid
        step_loss.backward()  # type: ignore[no-untyped-call]
        value += step_loss.item()
    return value, float(nn.utils.clip_grad_norm_(student.parameters(), max_grad_norm))


def _logits_and_targets(
    student: nn.Module, teacher: nn.Module | None, ids: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Logits of each model at every position, [N, V], and each position's next token [N]; IGNORE_INDEX if not counted.

    Nothing is selected or copied here: picking rows out of logits costs more than a loss on the few that are ignored.
    """
    targets = torch.full_like(labels, IGNORE_INDEX)
    targets[:, :-1] = labels[:, 1:]
    teacher_NV = None
    if teacher is not None:
        with torch.no_grad():
            teacher_NV = teacher(input_ids=ids, use_cache=False).logits.flatten(0, 1)
    student_NV = student(input_ids=ids, use_cache=False).logits.flatten(0, 1)
    return student_NV, teacher_NV, targets.flatten()


@torch.no_grad()
def selection_losses(
    student: nn.Module, teacher: nn.Module | None, blocks: TokenBlocks, batch_size: int
) -> dict[str, float]:
    """{'selection_loss', 'selection_kl' (with a teacher)}: nats per token over `blocks`; student left in train mode."""
    device = next(student.parameters()).device
    student.eval()
    sums, count = [0.0, 0.0], 0
    for ids, labels in blocks.batches(batch_size):
        with _autocast(device):
            student_NV, teacher_NV, targets_N = _logits_and_targets(student, teacher, ids.to(device), labels.to(device))
        sums[0] += cross_entropy(student_NV, targets_N).sum().item()
        if teacher_NV is not None:
            sums[1] += (LOSSES["forward_kl"](student_NV, teacher_NV) * (targets_N != IGNORE_INDEX)).sum().item()
        count += int((targets_N != IGNORE_INDEX).sum())
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
