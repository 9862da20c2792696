"""Recovery training: data -> teacher -> student -> loss -> step, in one readable loop.

Shapes: B = batch, S = block size, N = tokens that count for the loss, D = hidden size (each model its own).
"""

import hashlib
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from cascade.data.blocks import TokenBlocks
from cascade.data.examples import Examples
from cascade.data.order import blocks_at
from cascade.distillation import sharding
from cascade.distillation.average import Average
from cascade.distillation.dead_weights import zero_matrices
from cascade.distillation.layer_computation import layer_computation
from cascade.distillation.losses.batch import selection_losses
from cascade.distillation.losses.features import FeatureLoss
from cascade.distillation.nan_policy import (
    finite_figures,
    gradient_norm,
    is_finite,
    leave_out,
    require_no_divergence,
)
from cascade.distillation.on_policy import Rollouts, common_ids, end_tokens, on_policy_batch
from cascade.distillation.optimizer import build_optimizer
from cascade.distillation.options import Execution, Hooks, Objective, Optimization, Safekeeping
from cascade.distillation.step import Task, fitting_microbatch, fitting_step
from cascade.distillation.supervision import Selection, Supervision
from cascade.distillation.training_log import TrainingLog
from cascade.distillation.training_state import Progress, States, Trained, load_state
from cascade.runtime import ranks
from cascade.runtime.errors import UserError
from cascade.runtime.failpoints import failpoint
from cascade.runtime.stopping import saving

DEFAULT_SUPERVISION, DEFAULT_OPTIMIZATION, DEFAULT_EXECUTION = Supervision(), Optimization(), Execution()
_DEFAULT_SAFEKEEPING, _NO_HOOKS = Safekeeping(), Hooks()


@dataclass(frozen=True)
class TrainingMetrics:
    """The result of a training; losses in nats per token on the selection blocks, None where there are none."""

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
    supervision: Supervision = DEFAULT_SUPERVISION,
    optimization: Optimization = DEFAULT_OPTIMIZATION,
    execution: Execution = DEFAULT_EXECUTION,
    selection: Selection | None = None,
    safekeeping: Safekeeping = _DEFAULT_SAFEKEEPING,
    hooks: Hooks = _NO_HOOKS,
) -> TrainingMetrics:
    """Train `student` in place on `num_tokens` tokens (rounded up to whole steps of `batch_size` blocks).

    A classifier's `Examples` count as a token each. Without a teacher and `supervision.targets` the loss is
    cross-entropy; with both, the targets teach, and the teacher has what the student writes itself. A step's loss is
    the sum over its tokens that count, divided by their number in the *whole* step, so that the split into microbatches
    and processes changes nothing; feature losses are scaled by the step before. With a `safekeeping.state_folder` a
    training that finds its state there goes on from it, to the same bits, and one that is asked to stop
    (`cascade.runtime.stopping`) leaves its state there.

    Raises:
        TrainingError: a loss or gradient is not finite (before the optimizer step), not even one block fits, or the
            loss has climbed and `safekeeping.on_divergence` is stop.
        Stopped: a signal has come, and the state is saved.
        UserError: a step's blocks cannot be shared out evenly, or a teacher, a package or a single process is needed.
    """
    _require_teacher(teacher, supervision)
    ranks.require_even(optimization.batch_size)
    student, teacher = sharding.shard(student), sharding.shard(teacher)
    trained = _trained(student, optimization)
    training = _Training(
        student=student,
        teacher=teacher,
        blocks=blocks,
        num_steps=math.ceil(num_tokens / (optimization.batch_size * blocks.block_size)),
        supervision=supervision,
        optimization=optimization,
        execution=execution,
        selection=selection,
        rollouts=_rollouts(student, teacher, supervision, optimization.seed, trained),
        states=_states(safekeeping),
        safekeeping=safekeeping,
        log=TrainingLog(hooks.log_path, hooks.on_log),
        hooks=hooks,
    )
    progress = _progress(training, trained)
    if training.states is not None and safekeeping.on_nan == "rollback":
        training.states.begin(trained, progress)
    started = time.perf_counter()
    with layer_computation(student, execution, supervision.features), saving() if training.states else nullcontext():
        progress = _train(training, trained, progress, started)
    training.log.close(progress.curve)
    return _metrics(training, progress, time.perf_counter() - started)


@dataclass(frozen=True, kw_only=True)
class _Training:
    """The parts of a training that its steps do not change: models, data, options, log and states."""

    student: nn.Module
    teacher: nn.Module | None
    blocks: TokenBlocks | Examples
    num_steps: int
    supervision: Supervision
    optimization: Optimization
    execution: Execution
    selection: Selection | None
    rollouts: Rollouts | None
    states: States | None
    safekeeping: Safekeeping
    log: TrainingLog
    hooks: Hooks

    @property
    def step_tokens(self) -> int:
        """Tokens of a step."""
        return self.optimization.batch_size * self.blocks.block_size


def _train(training: _Training, trained: Trained, progress: Progress, started: float) -> Progress:
    """The steps that are left: a batch, its losses and gradients, the optimizer's step, the log, a state on disk."""
    student, optimization = training.student, training.optimization
    student.train()
    while progress.step < training.num_steps:
        step, last = progress.step, progress.step + 1 == training.num_steps
        entry: dict[str, float] = {"step": step + 1, "num_tokens": (step + 1) * training.step_tokens}
        if step == 0:
            entry |= zero_matrices(student)
        if step in progress.left_out:
            entry["skipped"] = 1.0
        else:
            with _seeded(optimization.seed, step):
                batch = _batch(training, step)
                losses = _gradients(training, batch, progress)
            rate = optimization.learning_rate * optimization.schedule.factor(step, training.num_steps)
            losses |= {"learning_rate": rate, "grad_norm": gradient_norm(trained, optimization.max_grad_norm)}
            losses |= {"microbatch_size": progress.microbatch_size, "on_policy": float(batch.on_policy)}
            if not is_finite(losses):
                safekeeping, states = training.safekeeping, training.states
                progress = leave_out(progress, trained, safekeeping, states, batch.rows, losses, training.log)
                continue
            _update(trained, rate, step)
            entry |= losses | {"seconds": time.perf_counter() - started}
        if last and trained.average is not None:
            trained.average.put_into(student)
        entry |= _selection_losses(training, progress.microbatch_size, step)
        progress.step += 1
        _record(training, trained, progress, finite_figures(entry))
    student.eval()
    return progress


def _record(training: _Training, trained: Trained, progress: Progress, entry: dict[str, float]) -> None:
    """Log a step that is done, save a state if one is due, and call the caller's function.

    Raises:
        Stopped: a signal has come, and the state is saved.
        DivergedError: the loss has climbed, and such a training is to stop.
    """
    progress.curve.append(entry)
    training.log.add(entry)
    if training.states is not None:
        training.states.step(trained, progress, progress.step == training.num_steps)
    if training.hooks.on_step is not None:
        training.hooks.on_step(progress.step, training.num_steps)
    failpoint("distill.step")
    if training.safekeeping.on_divergence == "stop":
        require_no_divergence(progress)


@contextmanager
def _seeded(seed: int, step: int) -> Iterator[None]:
    """Random numbers of this step alone, on this process: dropout is a function of the step, as the blocks are."""
    digest = hashlib.sha256(f"{seed}:{step}:{ranks.rank()}".encode()).digest()
    with torch.random.fork_rng():
        torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        yield


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """What one step learns from."""

    rows: Tensor
    """The blocks' numbers."""
    blocks: TokenBlocks | Examples
    """With the teacher's targets where those were kept."""
    objective: Objective
    """By which the student is judged on them."""
    on_policy: bool
    """Whether the student has written the blocks, from the start of those with these numbers."""


def _batch(training: _Training, step: int) -> _Batch:
    """The blocks of a step; the targets of the step after it begin to be read."""
    optimization, supervision, size = training.optimization, training.supervision, training.optimization.batch_size
    position = optimization.first_position + step * size
    rows, rows_after = (
        blocks_at(start, size, num_blocks=len(training.blocks), seed=optimization.seed)
        for start in (position, position + size)
    )
    blocks = training.blocks.rows(rows)
    if supervision.targets is not None and isinstance(blocks, TokenBlocks):
        of_process = slice(ranks.rank(), None, ranks.world_size())
        supervision.targets.ahead(rows[of_process], rows_after[of_process])
        blocks = replace(blocks, known=supervision.targets.of(rows))
    rollouts, objective = training.rollouts, supervision.objective
    blocks, objective, on_policy = on_policy_batch(rollouts, training.student, blocks, objective, step)
    return _Batch(rows=rows, blocks=blocks, objective=objective, on_policy=on_policy)


def _gradients(training: _Training, batch: _Batch, progress: Progress) -> dict[str, float]:
    """A step's losses in nats per token; their gradients in `.grad`, and the microbatch that fitted in `progress`."""
    features, share = training.supervision.features, progress.step / training.num_steps
    strength = 0.0 if features is None else features.strength(share)
    features = features if strength > 0 else None
    task = Task(
        student=training.student,
        teacher=training.teacher,
        batch=batch.blocks,
        objective=batch.objective,
        features=features,
        scales=_scales(features, progress.curve, batch.on_policy, strength),
        rows=batch.rows,
        strength=strength,
        keep=training.execution.remember_teacher,
    )
    state_folder = training.safekeeping.state_folder
    losses, progress.microbatch_size = fitting_step(task, progress.microbatch_size, state_folder)
    return losses


def _selection_losses(training: _Training, microbatch_size: int, step: int) -> dict[str, float]:
    """Losses on the selection text, after the steps in which they are measured."""
    selection, last = training.selection, step + 1 == training.num_steps
    if selection is None or not (last or (step + 1) % selection.every == 0):
        return {}
    return selection_losses(
        training.student,
        training.teacher,
        selection.blocks,
        microbatch_size,
        vocab_size=training.supervision.objective.vocab_size,
    )


def _require_teacher(teacher: nn.Module | None, supervision: Supervision) -> None:
    """Refuse losses that need a live teacher, or kept targets, where there is neither.

    Raises:
        UserError: a loss needs a teacher.
    """
    from_targets = supervision.targets is not None
    needs_teacher = supervision.on_policy is not None or (supervision.features is not None and not from_targets)
    if teacher is None and needs_teacher:
        raise UserError("feature losses and on-policy batches need a teacher")


def _trained(student: nn.Module, optimization: Optimization) -> Trained:
    """The student with its optimizer, and the running average of its weights if there is to be one."""
    optimizer = build_optimizer(optimization.optimizer, student, optimization.learning_rate, optimization.weight_decay)
    average = None if optimization.ema_decay is None else Average(student, optimization.ema_decay)
    return Trained(student=student, optimizer=optimizer, average=average)


def _rollouts(
    student: nn.Module, teacher: nn.Module | None, supervision: Supervision, seed: int, trained: Trained
) -> Rollouts | None:
    """Writes the student's own batches, which `trained.buffer` holds; None where every batch is text."""
    if supervision.on_policy is None:
        return None
    vocab_size = common_ids(student, teacher, supervision.objective)
    return Rollouts(supervision.on_policy, seed, trained.buffer, end_tokens(teacher), vocab_size)


def _states(safekeeping: Safekeeping) -> States | None:
    """The training's states on disk; None where it saves none."""
    if safekeeping.state_folder is None:
        return None
    return States(safekeeping.state_folder, safekeeping.save_every_minutes, safekeeping.keep_states)


def _settings(training: _Training) -> dict[str, Any]:
    """The settings that a training's result depends on: a state with other settings belongs to another training.

    Saved states have these names and texts: a change here makes trainings that were stopped start again.
    """
    optimization, supervision = training.optimization, training.supervision
    features, targets, vocab_size = supervision.features, supervision.targets, supervision.objective.vocab_size
    settings = {
        "num_steps": training.num_steps,
        "batch_size": optimization.batch_size,
        "learning_rate": optimization.learning_rate,
        "seed": optimization.seed,
        "first_position": optimization.first_position,
        "weight_decay": optimization.weight_decay,
        "objective": repr(supervision.objective),
        "schedule": repr(optimization.schedule),
        "max_grad_norm": optimization.max_grad_norm,
        "optimizer": optimization.optimizer,
        "ema_decay": optimization.ema_decay,
        "features": None if features is None else repr(features.features),
        "on_policy": repr(supervision.on_policy),
    }
    settings |= {} if targets is None else {"targets": targets.name}
    return settings | ({} if vocab_size is None else {"vocab_size": vocab_size})


def _progress(training: _Training, trained: Trained) -> Progress:
    """The progress of an earlier attempt, whose log is written anew, or that of a training that starts."""
    state_folder, microbatch_size = training.safekeeping.state_folder, training.execution.microbatch_size
    settings = _settings(training)
    resumed = None if state_folder is None else load_state(state_folder, trained, settings)
    failpoint("distill.loaded")
    training.log.again(resumed.curve if resumed else [])
    progress = resumed or Progress(step=0, microbatch_size=microbatch_size, curve=[], settings=settings)
    progress.microbatch_size = fitting_microbatch(state_folder, min(microbatch_size, progress.microbatch_size))
    return progress


def _update(trained: Trained, rate: float, step: int) -> None:
    """One step of the optimizer at this learning rate, and of the average."""
    trained.optimizer.set_rate(rate)
    trained.optimizer.step()
    trained.optimizer.zero_grad()
    if trained.average is not None:
        trained.average.update(trained.student, step + 1)


def _metrics(training: _Training, progress: Progress, seconds: float) -> TrainingMetrics:
    final = progress.curve[-1] if progress.curve else {}
    return TrainingMetrics(
        num_steps=training.num_steps,
        num_tokens=training.num_steps * training.step_tokens,
        seconds=seconds,
        selection_loss=final.get("selection_loss"),
        selection_kl=final.get("selection_kl"),
        curve=progress.curve,
    )


def _scales(
    features: FeatureLoss | None, curve: list[dict[str, float]], on_policy: bool, strength: float
) -> dict[str, float] | None:
    """The feature losses' factors, from the last step on batches of the same kind; None before the first such step."""
    if features is None:
        return {}
    trained = (entry for entry in reversed(curve) if "skipped" not in entry)
    alike = (entry for entry in trained if bool(entry.get("on_policy", 0.0)) == on_policy)
    last = next(alike, None)
    return features.scales(last or {}, strength) if last is not None or not features.features.balanced else None
