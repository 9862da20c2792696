"""Recovery training: data -> teacher -> student -> loss -> step, in one readable loop.

Shapes: B = batch, S = block size, N = tokens that count for the loss, D = hidden size (each model its own).
"""

import hashlib
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from cascade import parallel
from cascade.data.blocks import TokenBlocks
from cascade.data.examples import Examples
from cascade.data.order import blocks_at
from cascade.data.targets import StoredTargets
from cascade.distillation.average import Average
from cascade.distillation.batch import FORWARD_KL, selection_losses
from cascade.distillation.computing import computed
from cascade.distillation.dead import zero_matrices
from cascade.distillation.features import FeatureLoss
from cascade.distillation.finite import (
    OnNan,
    gradient_norm,
    kept_figures,
    leave_out,
    require_no_divergence,
    unfinished,
)
from cascade.distillation.fused import Objective
from cascade.distillation.log import TrainingLog
from cascade.distillation.on_policy import OnPolicy, Rollouts, common_ids, end_tokens, own_batch
from cascade.distillation.optimizer import build_optimizer
from cascade.distillation.schedule import Schedule
from cascade.distillation.state import Progress, States, Trained, load_state
from cascade.distillation.step import Task, fitting_microbatch, fitting_step
from cascade.errors import UserError
from cascade.failpoints import failpoint
from cascade.stopping import saving

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
    keep_states: int = 2,
    on_nan: Literal["stop", "skip", "rollback"] = "stop",
    max_skipped: int = 3,
    on_divergence: Literal["warn", "stop"] = "warn",
    on_step: Callable[[int, int], None] | None = None,
    on_log: Callable[[dict[str, float]], None] | None = None,
) -> TrainingMetrics:
    """Train `student` in place on `num_tokens` tokens (rounded up to whole steps of `batch_size` blocks).

    A classifier's `Examples` count as a token each. Without a teacher and `targets` that were kept of one the loss is
    cross-entropy; with both, the targets teach, and the teacher has what the student writes itself. A step's loss is
    the sum over its tokens that count, divided by their number in the *whole* step, so that the split into microbatches
    and processes changes nothing; `features` are scaled by the step before. `first_position` is where reading starts
    in the endless, seeded block order. With a `state_folder` a training that finds its state there goes on from it,
    to the same bits, and one that is asked to stop (`cascade.stopping`) leaves its state there. `on_nan` and
    `max_skipped` are `OnNan`'s. With `ema_decay` the student ends as the running average of its weights. After each
    step `on_step(done, all)` and `on_log(entry)` are called. `keep`: others read the same, so what is seen is kept.

    Raises:
        TrainingError: a loss or gradient is not finite (before the optimizer step), not even one block fits, or the
            loss has climbed and `on_divergence` is stop.
        Stopped: a signal has come, and the state is saved.
        UserError: a step's blocks cannot be shared out evenly, or a teacher, a package or a single process is needed.
    """
    if teacher is None and (on_policy is not None or (features is not None and targets is None)):
        raise UserError("feature losses and on-policy batches need a teacher")
    parallel.require_even(batch_size)
    num_steps = math.ceil(num_tokens / (batch_size * blocks.block_size))
    student, teacher = parallel.shard(student), parallel.shard(teacher)
    settings = {
        "num_steps": num_steps, "batch_size": batch_size, "learning_rate": learning_rate, "seed": seed,
        "first_position": first_position, "weight_decay": weight_decay, "objective": repr(objective),
        "schedule": repr(schedule), "max_grad_norm": max_grad_norm, "optimizer": optimizer, "ema_decay": ema_decay,
        "features": None if features is None else repr(features.features), "on_policy": repr(on_policy),
    } | ({} if targets is None else {"targets": targets.name})  # fmt: skip
    settings |= {} if objective.vocab_size is None else {"vocab_size": objective.vocab_size}
    trained = Trained(student, build_optimizer(optimizer, student, learning_rate, weight_decay),
                      None if ema_decay is None else Average(student, ema_decay))  # fmt: skip
    rollouts = None
    if on_policy is not None:
        common = common_ids(student, teacher, objective)
        rollouts = Rollouts(on_policy, seed, trained.buffer, end_tokens(teacher), common)
    states = None if state_folder is None else States(state_folder, save_every_minutes, keep_states)
    log, policy = TrainingLog(log_path, on_log), OnNan(on_nan, max_skipped)
    fixed = _Fixed(student, teacher, blocks, targets, objective, features, rollouts, schedule, num_steps, learning_rate,
                   batch_size, first_position, seed, max_grad_norm, keep, selection, selection_every, states,
                   log, policy, on_divergence == "stop", on_step)  # fmt: skip
    progress = _progress(state_folder, trained, microbatch_size, settings, log)
    if states is not None and on_nan == "rollback":
        states.begin(trained, progress)
    started = time.perf_counter()
    with computed(student, gradient_checkpointing, compiled, features), saving() if states else nullcontext():
        progress = _loop(fixed, trained, progress, started)
    log.close(progress.curve)
    return _metrics(progress.curve, num_steps, batch_size * blocks.block_size, time.perf_counter() - started)


def _loop(fixed: "_Fixed", trained: Trained, progress: Progress, started: float) -> Progress:
    """All steps that are left."""
    student, states = fixed.student.train(), fixed.states
    while progress.step < fixed.num_steps:
        step, last = progress.step, progress.step + 1 == fixed.num_steps
        entry: dict[str, float] = {"step": step + 1, "num_tokens": (step + 1) * fixed.step_tokens}
        if step == 0:
            entry |= zero_matrices(student)
        if step in progress.left_out:
            entry["skipped"] = 1.0
        else:
            losses, rows = _gradients(fixed, trained, progress)
            if unfinished(losses):
                progress = leave_out(progress, trained, fixed.policy, states, rows, losses, fixed.log)
                continue
            _update(trained, step)
            entry |= losses | {"seconds": time.perf_counter() - started}
        if last and trained.average is not None:
            trained.average.put_into(student)
        if fixed.selection is not None and (last or (step + 1) % fixed.selection_every == 0):
            entry |= selection_losses(
                student,
                fixed.teacher,
                fixed.selection,
                progress.microbatch_size,
                vocab_size=fixed.objective.vocab_size,
            )
        progress.step += 1
        entry = kept_figures(entry)
        progress.curve.append(entry)
        fixed.log.add(entry)
        if states is not None:
            states.step(trained, progress, last)
        if fixed.on_step is not None:
            fixed.on_step(step + 1, fixed.num_steps)
        failpoint("distill.step")
        if fixed.stops_at_divergence:
            require_no_divergence(progress)
    student.eval()
    return progress


@dataclass(frozen=True)
class _Fixed:
    """What stays the same over a training, as `distill` takes it."""

    student: nn.Module
    teacher: nn.Module | None
    blocks: TokenBlocks | Examples
    targets: Targets | None
    objective: Objective
    features: FeatureLoss | None
    rollouts: Rollouts | None
    schedule: Schedule
    num_steps: int
    learning_rate: float
    batch_size: int
    first_position: int
    seed: int
    max_grad_norm: float
    keep: bool
    selection: TokenBlocks | Examples | None
    selection_every: int
    states: States | None
    log: TrainingLog
    policy: OnNan
    stops_at_divergence: bool
    on_step: Callable[[int, int], None] | None

    @property
    def step_tokens(self) -> int:
        """Tokens of a step."""
        return self.batch_size * self.blocks.block_size


def _gradients(fixed: _Fixed, trained: Trained, progress: Progress) -> tuple[dict[str, float], Tensor]:
    """(losses, rate and gradient norm of the step that is due; its blocks' numbers); clipped gradients in `.grad`."""
    step, folder = progress.step, None if fixed.states is None else fixed.states.folder
    rows, given = _batch(fixed.blocks, fixed.targets, fixed.first_position + step * fixed.batch_size,
                         fixed.batch_size, fixed.seed)  # fmt: skip
    rate = fixed.learning_rate * fixed.schedule.factor(step, fixed.num_steps)
    trained.optimizer.set_rate(rate)
    with torch.random.fork_rng():
        torch.manual_seed(_draws(fixed.seed, step))  # dropout is a function of the step, as the blocks are
        batch, wanted, own = own_batch(fixed.rollouts, fixed.student, given, fixed.objective, step)
        strength = 0.0 if fixed.features is None else fixed.features.strength(step / fixed.num_steps)
        features = fixed.features if strength > 0 else None
        scales = _scales(features, progress.curve, own, strength)
        task = Task(fixed.student, fixed.teacher, batch, wanted, features, scales, rows, strength, fixed.keep)
        losses, progress.microbatch_size = fitting_step(task, progress.microbatch_size, folder)
    figures = {"learning_rate": rate, "grad_norm": gradient_norm(trained, fixed.max_grad_norm)}
    return losses | figures | {"microbatch_size": progress.microbatch_size, "on_policy": float(own)}, rows


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
    state_folder: Path | None, trained: Trained, microbatch_size: int, settings: dict[str, Any], log: TrainingLog
) -> Progress:
    """How far an earlier attempt came, its log written again; else the start."""
    found = None if state_folder is None else load_state(state_folder, trained, settings)
    failpoint("distill.loaded")
    log.again(found.curve if found else [])
    progress = found or Progress(0, microbatch_size, [], settings)
    progress.microbatch_size = fitting_microbatch(state_folder, min(microbatch_size, progress.microbatch_size))
    return progress


def _update(trained: Trained, step: int) -> None:
    """The optimizer's step, and the average's."""
    trained.optimizer.step()
    trained.optimizer.zero_grad()
    if trained.average is not None:
        trained.average.update(trained.student, step + 1)


def _metrics(curve: list[dict[str, float]], num_steps: int, step_tokens: int, seconds: float) -> TrainingMetrics:
    final = curve[-1] if curve else {}
    losses = final.get("selection_loss"), final.get("selection_kl")
    return TrainingMetrics(num_steps, num_steps * step_tokens, seconds, *losses, curve)


def _scales(
    features: FeatureLoss | None, curve: list[dict[str, float]], own: bool, strength: float
) -> dict[str, float] | None:
    """What the feature losses are multiplied by, from the last step on text of the same kind; None before the first."""
    if features is None:
        return {}
    trained = (entry for entry in reversed(curve) if "skipped" not in entry)
    alike = (entry for entry in trained if bool(entry.get("on_policy", 0.0)) == own)
    last = next(alike, None)
    return features.scales(last or {}, strength) if last is not None or not features.features.balanced else None


def _draws(seed: int, step: int) -> int:
    """The seed of one step's random draws, on this process."""
    digest = hashlib.sha256(f"{seed}:{step}:{parallel.rank()}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
