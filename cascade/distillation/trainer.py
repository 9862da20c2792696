"""Recovery training: data -> teacher -> student -> loss -> step, in one readable loop.

Shapes: B = batch, S = block size, N = tokens that count for the loss, D = hidden size (each model its own).
"""

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cascade.data.blocks import IGNORE_INDEX, TokenBlocks
from cascade.data.order import blocks_at
from cascade.distillation import parallel
from cascade.distillation.batch import FORWARD_KL, batch_losses, selection_losses, sums_of
from cascade.distillation.fused import Objective
from cascade.distillation.schedule import Schedule
from cascade.distillation.state import Progress, load_state, save_state
from cascade.errors import NotFiniteError, TrainingError

logger = logging.getLogger(__name__)

COSINE = Schedule()


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
    schedule: Schedule = COSINE,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    gradient_checkpointing: bool = False,
    objective: Objective = FORWARD_KL,
    seed: int = 0,
    first_position: int = 0,
    selection: TokenBlocks | None = None,
    selection_every: int = 25,
    log_path: Path | None = None,
    state_folder: Path | None = None,
    save_every_minutes: float = 10.0,
    on_step: Callable[[int, int], None] | None = None,
) -> TrainingMetrics:
    """Train `student` in place on `num_tokens` tokens (rounded up to whole steps of `batch_size` blocks).

    Without a teacher the loss is cross-entropy alone. The loss of a step is the sum over its valid target
    tokens divided by their number in the *whole* step, so that the split into microbatches and processes changes
    nothing. `first_position` is the place in the endless, seeded block order where reading starts. With a
    `state_folder` the training's state is kept there, and a training that finds one goes on from it, to the same bits.
    With `gradient_checkpointing` layers are computed again in the backward pass instead of kept.
    Out of memory, the microbatch is halved and the step repeated. `on_step(done, all)` is called after each step.

    Raises:
        TrainingError: a loss or gradient is not finite (raised before the optimizer step, so weights are intact), or
            not even a single block fits into memory.
        UserError: the blocks of a step cannot be shared out evenly to the processes.
    """
    num_steps = math.ceil(num_tokens / (batch_size * blocks.block_size))
    parallel.require_even(batch_size)
    student = parallel.shard(student)
    teacher = None if teacher is None else parallel.shard(teacher)
    optimizer = _adamw(student, learning_rate, weight_decay)
    settings = {
        "num_steps": num_steps, "batch_size": batch_size, "learning_rate": learning_rate, "seed": seed,
        "first_position": first_position, "weight_decay": weight_decay, "objective": repr(objective),
        "schedule": repr(schedule), "max_grad_norm": max_grad_norm,
    }  # fmt: skip
    found = None if state_folder is None else load_state(state_folder, student, optimizer, settings)
    progress = found or Progress(0, microbatch_size, [], settings)
    curve, microbatch_size = progress.curve, progress.microbatch_size
    for entry in curve:
        _log(log_path, entry)
    student.train()
    if gradient_checkpointing:
        _keep_no_activations(student)
    started = saved = time.perf_counter()
    for step in range(progress.step, num_steps):
        rows = blocks_at(first_position + step * batch_size, batch_size, num_blocks=len(blocks), seed=seed)
        rate = learning_rate * schedule.factor(step, num_steps)
        _set_rate(optimizer, rate)
        with torch.random.fork_rng():
            torch.manual_seed(_draws(seed, step))  # dropout is a function of the step, as the blocks are
            losses, microbatch_size = _fitting_step(student, teacher, blocks, rows, objective, microbatch_size)
        grad_norm = float(parallel.whole(nn.utils.clip_grad_norm_(student.parameters(), max_grad_norm)))
        _require_finite(step, losses["loss"], grad_norm, rows)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        entry = {
            "step": step + 1,
            "num_tokens": (step + 1) * batch_size * blocks.block_size,
            **losses,
            "learning_rate": rate,
            "grad_norm": grad_norm,
            "microbatch_size": microbatch_size,
            "seconds": time.perf_counter() - started,
        }
        last = step + 1 == num_steps
        if selection is not None and (last or (step + 1) % selection_every == 0):
            entry |= selection_losses(student, teacher, selection, microbatch_size)
        curve.append(entry)
        _log(log_path, entry)
        due = parallel.agreed(time.perf_counter() - saved >= 60 * save_every_minutes)
        if state_folder is not None and due and not last:
            save_state(state_folder, student, optimizer, Progress(step + 1, microbatch_size, curve, settings))
            saved = time.perf_counter()
        if on_step is not None:
            on_step(step + 1, num_steps)
    if gradient_checkpointing:
        _keep_activations(student)
    student.eval()
    return _metrics(curve, num_steps, batch_size * blocks.block_size, time.perf_counter() - started)


def _metrics(curve: list[dict[str, float]], num_steps: int, step_tokens: int, seconds: float) -> TrainingMetrics:
    final = curve[-1] if curve else {}
    losses = final.get("selection_loss"), final.get("selection_kl")
    return TrainingMetrics(num_steps, num_steps * step_tokens, seconds, *losses, curve)


def _keep_no_activations(model: Any) -> None:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _keep_activations(model: Any) -> None:
    model.gradient_checkpointing_disable()


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def _require_finite(step: int, loss: float, grad_norm: float, rows: Tensor) -> None:
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise NotFiniteError(
            f"step {step}: loss {loss}, gradient norm {grad_norm}; stopped before the optimizer step. "
            f"Blocks of this batch: {rows.tolist()}. Try a lower learning_rate or look at those blocks."
        )


def _fitting_step(
    student: nn.Module,
    teacher: nn.Module | None,
    blocks: TokenBlocks,
    rows: Tensor,
    objective: Objective,
    microbatch_size: int,
) -> tuple[dict[str, float], int]:
    """(losses, microbatch that fitted): out of memory it is halved, and the step done again from its start."""
    while True:
        try:
            return _accumulate(student, teacher, blocks, rows, objective, microbatch_size), microbatch_size
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            if microbatch_size == 1 or parallel.world_size() > 1:
                raise TrainingError(
                    f"out of memory with microbatch_size {microbatch_size} and blocks of {blocks.block_size} tokens; "
                    "shorten data.block_size, lower microbatch_size (several processes do not do so on their own), or "
                    "use a larger machine"
                ) from error
        # Outside the except clause, where nothing holds the step's tensors any more.
        for parameter in student.parameters():
            parameter.grad = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        microbatch_size = max(1, min(microbatch_size, len(rows)) // 2)
        logger.warning("out of memory: going on with microbatch_size %d, the same batches", microbatch_size)


def _is_out_of_memory(error: BaseException) -> bool:
    # On the CPU it is a plain RuntimeError of the allocator.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error)


def _accumulate(
    student: nn.Module,
    teacher: nn.Module | None,
    blocks: TokenBlocks,
    rows: Tensor,
    objective: Objective,
    microbatch_size: int,
) -> dict[str, float]:
    """Gradients of one step into `.grad`; its losses in nats per token, over all processes' tokens that count."""
    total_valid = int((blocks.labels[rows][:, 1:] != IGNORE_INDEX).sum())
    if total_valid == 0:
        raise TrainingError(f"no token of blocks {rows.tolist()} counts for the loss (all labels are {IGNORE_INDEX})")
    sums: dict[str, float] = {}
    # Gradients are averaged over processes: each has its share of a sum, so it counts as often as there are processes.
    share = parallel.world_size() / total_valid
    parts = torch.split(rows[parallel.rank() :: parallel.world_size()], microbatch_size)
    for number, part in enumerate(parts):
        parallel.sync_gradients(student, number == len(parts) - 1)
        found = batch_losses(student, teacher, blocks.input_ids[part], blocks.labels[part], objective)
        (found.loss * share).backward()  # type: ignore[no-untyped-call]
        for name, value in sums_of(found, teacher is not None).items():
            sums[name] = sums.get(name, 0.0) + value / total_valid
    return parallel.total(sums, next(student.parameters()).device)


def _draws(seed: int, step: int) -> int:
    """The seed of one step's random draws, on this process."""
    digest = hashlib.sha256(f"{seed}:{step}:{parallel.rank()}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _log(path: Path | None, entry: dict[str, float]) -> None:
    if path is not None and parallel.rank() == 0:
        with path.open("a") as log:
            log.write(json.dumps(entry) + "\n")


def _adamw(model: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    # Norm weights and biases are not decayed: shrinking them has no regularising effect.
    groups = [
        {"params": [p for p in _trainable(model) if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in _trainable(model) if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)


def _trainable(model: nn.Module) -> Iterator[nn.Parameter]:
    return (parameter for parameter in model.parameters() if parameter.requires_grad)
