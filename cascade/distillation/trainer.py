"""Recovery training: data -> teacher -> student -> loss -> step, in one readable loop.

Shapes: B = batch, S = block size, N = tokens that count for the loss, D = hidden size (each model its own).
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cascade import parallel
from cascade.data.blocks import TokenBlocks
from cascade.data.examples import Examples
from cascade.data.order import blocks_at
from cascade.data.targets import StoredTargets
from cascade.distillation.average import Average
from cascade.distillation.batch import FORWARD_KL, selection_losses
from cascade.distillation.features import FeatureLoss
from cascade.distillation.fused import Objective
from cascade.distillation.on_policy import OnPolicy, Rollouts, end_tokens, own_batch
from cascade.distillation.optimizer import build_optimizer
from cascade.distillation.schedule import Schedule
from cascade.distillation.state import Progress, Trained, load_state, save_state
from cascade.distillation.step import Task, fitting_microbatch, fitting_step
from cascade.errors import NotFiniteError, UserError
from cascade.models.axes import probe_axes

COSINE = Schedule()


class Targets(Protocol):
    """What was kept of a teacher for the blocks of a training (`cascade.cache.reader.CachedTargets`)."""

    @property
    def name(self) -> str:
        """Of what all targets depend on: a training that goes on must find the same."""

    def of(self, rows: Tensor) -> StoredTargets:
        """Of the blocks of these numbers."""

    def ahead(self, now: Tensor, after: Tensor) -> None:
        """Begin to read what this step and the next one will ask for."""


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
    blocks: TokenBlocks | Examples,
    *,
    num_tokens: int,
    batch_size: int = 8,
    microbatch_size: int = 8,
    learning_rate: float = 3e-3,
    schedule: Schedule = COSINE,
    optimizer: str = "adamw",
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    ema_decay: float | None = None,
    gradient_checkpointing: bool = False,
    compiled: bool = False,
    objective: Objective = FORWARD_KL,
    features: FeatureLoss | None = None,
    on_policy: OnPolicy | None = None,
    targets: Targets | None = None,
    seed: int = 0,
    first_position: int = 0,
    keep: bool = False,
    selection: TokenBlocks | Examples | None = None,
    selection_every: int = 25,
    log_path: Path | None = None,
    state_folder: Path | None = None,
    save_every_minutes: float = 10.0,
    on_step: Callable[[int, int], None] | None = None,
    on_log: Callable[[dict[str, float]], None] | None = None,
) -> TrainingMetrics:
    """Train `student` in place on `num_tokens` tokens (rounded up to whole steps of `batch_size` blocks).

    A classifier's `Examples` count as a token each. Without a teacher and `targets` that were kept of one the loss is
    cross-entropy; with both, the targets teach, and the teacher has what the student writes itself. A step's loss is
    the sum over its tokens that count, divided by their number in the *whole* step, so that the split into microbatches
    and processes changes nothing; `features` are scaled by the step before. `first_position` is where reading starts
    in the endless, seeded block order. With a `state_folder` a training that finds its state there goes on from it,
    to the same bits. With `ema_decay` the student ends as the running average of its weights. `on_step(done, all)` and
    `on_log(entry)` are called after each step. `keep`: others read the same, so a remembered teacher's view is kept.

    Raises:
        TrainingError: a loss or gradient is not finite (raised before the optimizer step, so weights are intact), or
            not even a single block fits into memory.
        UserError: a step's blocks cannot be shared out evenly, or a teacher, a package or a single process is needed.
    """
    _require_teacher(teacher, targets, features, on_policy)
    num_steps = math.ceil(num_tokens / (batch_size * blocks.block_size))
    parallel.require_even(batch_size)
    student, teacher = parallel.shard(student), parallel.shard(teacher)
    settings = {
        "num_steps": num_steps, "batch_size": batch_size, "learning_rate": learning_rate, "seed": seed,
        "first_position": first_position, "weight_decay": weight_decay, "objective": repr(objective),
        "schedule": repr(schedule), "max_grad_norm": max_grad_norm, "optimizer": optimizer, "ema_decay": ema_decay,
        "features": None if features is None else repr(features.features), "on_policy": repr(on_policy),
    } | ({} if targets is None else {"targets": targets.name})  # fmt: skip
    updates = build_optimizer(optimizer, student, learning_rate, weight_decay)
    trained = Trained(student, updates, None if ema_decay is None else Average(student, ema_decay))
    rollouts = None if on_policy is None else Rollouts(on_policy, seed, trained.buffer, end_tokens(teacher))
    progress = _progress(state_folder, trained, microbatch_size, settings, log_path)
    curve, microbatch_size = progress.curve, progress.microbatch_size
    started = saved = time.perf_counter()
    with _ways(student, gradient_checkpointing, compiled, features):
        student.train()
        for step in range(progress.step, num_steps):
            rows, given = _batch(blocks, targets, first_position + step * batch_size, batch_size, seed)
            rate = learning_rate * schedule.factor(step, num_steps)
            updates.set_rate(rate)
            with torch.random.fork_rng():
                torch.manual_seed(_draws(seed, step))  # dropout is a function of the step, as the blocks are
                batch, wanted, own = own_batch(rollouts, student, given, objective, step)
                task = Task(student, teacher, batch, wanted, features, _scales(features, curve, own), rows, keep)
                losses, microbatch_size = fitting_step(task, microbatch_size, state_folder)
            last = step + 1 == num_steps
            grad_norm = _update(trained, max_grad_norm, step, losses["loss"], rows, last)
            entry = {"step": step + 1, "num_tokens": (step + 1) * batch_size * blocks.block_size, **losses}
            entry |= {"learning_rate": rate, "grad_norm": grad_norm, "microbatch_size": microbatch_size,
                      "on_policy": float(own), "seconds": time.perf_counter() - started}  # fmt: skip
            if selection is not None and (last or (step + 1) % selection_every == 0):
                entry |= selection_losses(student, teacher, selection, microbatch_size)
            curve.append(entry)
            _log(log_path, entry, on_log)
            due = parallel.agreed(time.perf_counter() - saved >= 60 * save_every_minutes)
            if state_folder is not None and due and not last:
                save_state(state_folder, trained, Progress(step + 1, microbatch_size, curve, settings))
                saved = time.perf_counter()
            if on_step is not None:
                on_step(step + 1, num_steps)
    student.eval()
    return _metrics(curve, num_steps, batch_size * blocks.block_size, time.perf_counter() - started)


def _require_teacher(
    teacher: nn.Module | None, targets: Targets | None, features: FeatureLoss | None, on_policy: OnPolicy | None
) -> None:
    if teacher is None and (on_policy is not None or (features is not None and targets is None)):
        raise UserError("feature losses and on-policy batches need a teacher")


def _batch(
    blocks: TokenBlocks | Examples, targets: Targets | None, position: int, batch_size: int, seed: int
) -> tuple[Tensor, TokenBlocks | Examples]:
    """(numbers, blocks) of the step at a position, with their targets; the next step's begin to be read."""
    rows, after = (
        blocks_at(start, batch_size, num_blocks=len(blocks), seed=seed) for start in (position, position + batch_size)
    )
    batch = blocks.rows(rows)
    if targets is None or isinstance(batch, Examples):
        return rows, batch
    own = slice(parallel.rank(), None, parallel.world_size())
    targets.ahead(rows[own], after[own])
    return rows, replace(batch, known=targets.of(rows))


def _progress(
    state_folder: Path | None,
    trained: Trained,
    microbatch_size: int,
    settings: dict[str, Any],
    log_path: Path | None,
) -> Progress:
    """How far an earlier attempt came, its log written again; else the start."""
    found = None if state_folder is None else load_state(state_folder, trained, settings)
    for entry in found.curve if found else []:
        _log(log_path, entry, None)
    return found or Progress(0, fitting_microbatch(state_folder, microbatch_size), [], settings)


def _update(trained: Trained, max_grad_norm: float, step: int, loss: float, rows: Tensor, last: bool) -> float:
    """The optimizer's step on clipped gradients, if all is finite, and the average's; returns their norm before."""
    clipped = nn.utils.clip_grad_norm_(trained.student.parameters(), max_grad_norm)
    grad_norm = float(parallel.whole(clipped))
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise NotFiniteError(
            f"step {step}: loss {loss}, gradient norm {grad_norm}; stopped before the optimizer step. "
            f"Blocks of this batch: {rows.tolist()}. Try a lower learning_rate or look at those blocks."
        )
    trained.optimizer.step()
    trained.optimizer.zero_grad()
    if trained.average is not None:
        trained.average.update(trained.student, step + 1)
        if last:
            trained.average.put_into(trained.student)
    return grad_norm


def _metrics(curve: list[dict[str, float]], num_steps: int, step_tokens: int, seconds: float) -> TrainingMetrics:
    final = curve[-1] if curve else {}
    losses = final.get("selection_loss"), final.get("selection_kl")
    return TrainingMetrics(num_steps, num_steps * step_tokens, seconds, *losses, curve)


@contextmanager
def _ways(model: Any, gradient_checkpointing: bool, compiled: bool, features: FeatureLoss | None) -> Iterator[None]:
    """How the model's layers are computed meanwhile."""
    layers: Any = list(model.get_submodule(probe_axes(model.config).layers_prefix)) if compiled else []
    if compiled and features is not None and features.features.relations:
        layers.pop()  # what is watched inside a layer cannot be seen once it is compiled
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for layer in layers:
        layer.compile()
    try:
        yield
    finally:
        if gradient_checkpointing:
            model.gradient_checkpointing_disable()
        for layer in layers:
            layer._compiled_call_impl = None


def _scales(features: FeatureLoss | None, curve: list[dict[str, float]], own: bool) -> dict[str, float] | None:
    """What the feature losses are multiplied by, from the last step on text of the same kind; None before the first."""
    if features is None:
        return {}
    alike = (entry for entry in reversed(curve) if bool(entry.get("on_policy", 0.0)) == own)
    last = next(alike, None)
    return features.scales(last or {}) if last is not None or not features.features.balanced else None


def _draws(seed: int, step: int) -> int:
    """The seed of one step's random draws, on this process."""
    digest = hashlib.sha256(f"{seed}:{step}:{parallel.rank()}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _log(path: Path | None, entry: dict[str, float], on_log: Callable[[dict[str, float]], None] | None) -> None:
    if parallel.rank() > 0:
        return
    if path is not None:
        with path.open("a") as log:
            log.write(json.dumps(entry) + "\n")
    if on_log is not None:
        on_log(entry)
