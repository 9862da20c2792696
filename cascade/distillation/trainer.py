"""Recovery training: data -> teacher -> student -> loss -> step, in one readable loop.

Shapes: B = batch, S = block size, N = tokens that count for the loss, D = hidden size (each model its own).
"""

import hashlib
import math
import time
from contextlib import nullcontext
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
from cascade.distillation.layer_computation import computed
from cascade.distillation.losses.batch import selection_losses
from cascade.distillation.losses.features import FeatureLoss
from cascade.distillation.nan_policy import (
    gradient_norm,
    kept_figures,
    leave_out,
    require_no_divergence,
    unfinished,
)
from cascade.distillation.on_policy import Rollouts, common_ids, end_tokens, own_batch
from cascade.distillation.optimizer import build_optimizer
from cascade.distillation.options import Execution, Hooks, Optimization, Safekeeping
from cascade.distillation.step import Task, fitting_microbatch, fitting_step
from cascade.distillation.supervision import Selection, Supervision, Targets
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
    with computed(student, execution, supervision.features), saving() if training.states else nullcontext():
        progress = _loop(training, trained, progress, started)
    training.log.close(progress.curve)
    return _metrics(training, progress, time.perf_counter() - started)


@dataclass(frozen=True, kw_only=True)
class _Training:
    """What stays the same over a training: its models and data, its options, and what `distill` has opened for it."""

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


def _loop(training: _Training, trained: Trained, progress: Progress, started: float) -> Progress:
    """All steps that are left: a batch, its loss and gradients, the optimizer's step, what is logged and saved."""
    training.student.train()
    while progress.step < training.num_steps:
        step, last = progress.step, progress.step + 1 == training.num_steps
        entry: dict[str, float] = {"step": step + 1, "num_tokens": (step + 1) * training.step_tokens}
        if step == 0:
            entry |= zero_matrices(training.student)
        if step in progress.left_out:
            entry["skipped"] = 1.0
        else:
            losses, rows = _gradients(training, trained, progress)
            if unfinished(losses):
                safekeeping, states = training.safekeeping, training.states
                progress = leave_out(progress, trained, safekeeping, states, rows, losses, training.log)
                continue
            _update(trained, step)
            entry |= losses | {"seconds": time.perf_counter() - started}
        if last and trained.average is not None:
            trained.average.put_into(training.student)
        entry |= _selection_losses(training, progress.microbatch_size, step)
        progress.step += 1
        _record(training, trained, progress, kept_figures(entry))
    training.student.eval()
    return progress


def _record(training: _Training, trained: Trained, progress: Progress, entry: dict[str, float]) -> None:
    """Log a step that is done, save a state if one is due, and tell the caller.

    Raises:
        Stopped: a signal has come, and the state is saved.
        DivergedError: the loss has climbed, and the training is to stop there.
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


def _gradients(training: _Training, trained: Trained, progress: Progress) -> tuple[dict[str, float], Tensor]:
    """(losses, rate and gradient norm of the step that is due; its blocks' numbers); clipped gradients in `.grad`."""
    optimization, supervision, step = training.optimization, training.supervision, progress.step
    rows, batch = _batch(training.blocks, supervision.targets, optimization, step)
    rate = optimization.learning_rate * optimization.schedule.factor(step, training.num_steps)
    trained.optimizer.set_rate(rate)
    with torch.random.fork_rng():
        torch.manual_seed(_step_seed(optimization.seed, step))  # dropout is a function of the step, as the blocks are
        batch, objective, on_policy = own_batch(training.rollouts, training.student, batch, supervision.objective, step)
        features = supervision.features
        strength = 0.0 if features is None else features.strength(step / training.num_steps)
        features = features if strength > 0 else None
        task = Task(
            student=training.student,
            teacher=training.teacher,
            batch=batch,
            objective=objective,
            features=features,
            scales=_scales(features, progress.curve, on_policy, strength),
            rows=rows,
            strength=strength,
            keep=training.execution.remember_teacher,
        )
        losses, progress.microbatch_size = fitting_step(
            task, progress.microbatch_size, training.safekeeping.state_folder
        )
    figures = {"learning_rate": rate, "grad_norm": gradient_norm(trained, optimization.max_grad_norm)}
    return losses | figures | {"microbatch_size": progress.microbatch_size, "on_policy": float(on_policy)}, rows


def _batch(
    blocks: TokenBlocks | Examples, targets: Targets | None, optimization: Optimization, step: int
) -> tuple[Tensor, TokenBlocks | Examples]:
    """(numbers, blocks) of a step, with their targets; those of the step after it begin to be read."""
    size = optimization.batch_size
    position = optimization.first_position + step * size
    rows, rows_after = (
        blocks_at(start, size, num_blocks=len(blocks), seed=optimization.seed) for start in (position, position + size)
    )
    batch = blocks.rows(rows)
    if targets is None or isinstance(batch, Examples):
        return rows, batch
    of_process = slice(ranks.rank(), None, ranks.world_size())
    targets.ahead(rows[of_process], rows_after[of_process])
    return rows, replace(batch, known=targets.of(rows))


def _selection_losses(training: _Training, microbatch_size: int, step: int) -> dict[str, float]:
    """Losses on the selection text after a step, where they are due; else none."""
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
    """Refuse losses that only a live teacher, or what was kept of one, can give.

    Raises:
        UserError: there is none.
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
    """What writes the student's own batches, which are kept in `trained.buffer`; None: it writes none."""
    if supervision.on_policy is None:
        return None
    vocab_size = common_ids(student, teacher, supervision.objective)
    return Rollouts(supervision.on_policy, seed, trained.buffer, end_tokens(teacher), vocab_size)


def _states(safekeeping: Safekeeping) -> States | None:
    """The training's states on disk; None: none are saved."""
    if safekeeping.state_folder is None:
        return None
    return States(safekeeping.state_folder, safekeeping.save_every_minutes, safekeeping.keep_states)


def _settings(training: _Training) -> dict[str, Any]:
    """What a training's result depends on: a state with other settings is another training's.

    Names and texts are those of states that lie on disks: a change makes trainings that were stopped start again.
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
    """How far an earlier attempt came, its log written again; else the start."""
    state_folder, microbatch_size = training.safekeeping.state_folder, training.execution.microbatch_size
    settings = _settings(training)
    resumed = None if state_folder is None else load_state(state_folder, trained, settings)
    failpoint("distill.loaded")
    training.log.again(resumed.curve if resumed else [])
    progress = resumed or Progress(step=0, microbatch_size=microbatch_size, curve=[], settings=settings)
    progress.microbatch_size = fitting_microbatch(state_folder, min(microbatch_size, progress.microbatch_size))
    return progress


def _update(trained: Trained, step: int) -> None:
    """The optimizer's step, and the average's."""
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
    """What the feature losses are multiplied by, from the last step on text of the same kind; None before the first."""
    if features is None:
        return {}
    trained = (entry for entry in reversed(curve) if "skipped" not in entry)
    alike = (entry for entry in trained if bool(entry.get("on_policy", 0.0)) == on_policy)
    last = next(alike, None)
    return features.scales(last or {}, strength) if last is not None or not features.features.balanced else None


def _step_seed(seed: int, step: int) -> int:
    """The seed of one step's random draws, on this process."""
    digest = hashlib.sha256(f"{seed}:{step}:{ranks.rank()}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
