"""The stages distill and baseline-ce: a member's training, saved as a stock checkpoint.

Depends on: `distill`, the learning rate, the model that training starts from, the parent and the data.
Leaves: `checkpoint/`, `log.jsonl`, `losses.json`, and logits for the reload gate.
"""

import logging
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from cascade.data.blocks import TokenBlocks
from cascade.data.examples import Examples
from cascade.distillation import sharding
from cascade.distillation.options import Hooks
from cascade.distillation.supervision import Lesson, Selection
from cascade.distillation.trackers import tracked
from cascade.distillation.trainer import distill
from cascade.evaluation.reload import write_reference
from cascade.models.checkpoint.load import (
    CHECKPOINT,
    ModelSource,
    load_config,
    load_model,
    save_checkpoint,
    stored_dtype,
)
from cascade.models.checkpoint.loading_messages import tell_once
from cascade.models.checkpoint.value_range import require_computable
from cascade.pipeline.context import Run
from cascade.pipeline.kept_targets import step_rows, taught_steps
from cascade.pipeline.stage_output import Made, Start
from cascade.pipeline.stages.rate import find_rate
from cascade.pipeline.stages.training import (
    distill_settings,
    lesson_of,
    training_inputs,
    training_settings,
)
from cascade.pipeline.training_options import execution_of, safekeeping_of
from cascade.planning.estimates import flops_of
from cascade.planning.family import ResolvedMember
from cascade.recipe.schema import Recipe
from cascade.report.rates import Rate, rate_of
from cascade.runtime import ranks
from cascade.runtime.progress import OnStep
from cascade.runtime.retry_smaller import is_out_of_memory
from cascade.store.commits import COST_FILE, partial_of
from cascade.store.strict_json import write_json
from cascade.teacher.targets.angle import gradient_angle
from cascade.teacher.targets.reader import CachedTargets

logger = logging.getLogger(__name__)


_ANGLE_STEPS = 2


@dataclass(frozen=True, kw_only=True)
class Training:
    """A finished training of a member or of its baseline."""

    output: Made
    search: Made | None
    """The search for its learning rate; None where the recipe gives the rate."""
    learning_rate: float

    def rate(self) -> Rate:
        """The learning rate and its search, for the report."""
        return rate_of(self.learning_rate, self.search.folder if self.search else None)

    def stages(self) -> list[Made]:
        """The stages of the training: itself, and the search before it."""
        return [self.output, *([self.search] if self.search else [])]


def train(run: Run, member: ResolvedMember, start: Start, stage: str) -> Training:
    """A member's training, at the recipe's learning rate or at the rate of a search.

    `stage` is distill, or baseline-ce, which trains the same start on the same tokens without a teacher.
    """
    recipe, learns = run.recipe, stage == "distill"
    if not learns and recipe.ce_learning_rate != "auto" and recipe.distill and recipe.distill.optimizer == "auto":
        member = replace(member, optimizer="adamw")  # a rate that is given was tried with AdamW
    search, learning_rate = find_rate(run, member, start, stage)
    settings = training_settings(run, member) | {"learning_rate": learning_rate}
    output = run.runner.make(
        stage,
        member.name,
        settings=settings | run.target_settings() if learns else settings,
        inputs=training_inputs(run, start),
        write=partial(make_recovered, run, member, start, stage, learning_rate),
    )
    return Training(output=output, search=search, learning_rate=learning_rate)


def make_recovered(
    run: Run,
    member: ResolvedMember,
    start: Start,
    stage: str,
    learning_rate: float,
    folder: Path,
    on_step: OnStep,
) -> None:
    """Train a member; write its checkpoint, training log, losses, costs, and logits for the reload gate.

    `stage` is distill, or baseline-ce, which learns from the text alone. Where the run caches the teacher's targets, a
    member learns from the cache, and the live teacher only measures it on selection text.
    """
    recipe, settings = run.recipe, distill_settings(run)
    lesson = lesson_of(run, member, start, stage)
    student = lesson.student
    _check_computable(run, member, student, lesson.selection)
    angles = _angles(lesson, recipe, member)
    with tracked(
        settings.trackers if ranks.rank() == 0 else [],
        project=recipe.name,
        run=f"{member.name}.{stage}",
        folder=folder.parent.parent,
        settings=settings.model_dump() | {"learning_rate": learning_rate},
    ) as on_log:
        metrics = distill(
            student,
            lesson.teacher,
            lesson.blocks,
            num_tokens=member.num_tokens,
            supervision=lesson.supervision,
            optimization=replace(lesson.optimization, learning_rate=learning_rate),
            execution=execution_of(settings),
            selection=Selection(blocks=lesson.selection, every=settings.selection_every),
            safekeeping=safekeeping_of(settings, partial_of(folder)),
            hooks=Hooks(log_path=folder / "log.jsonl", on_step=on_step, on_log=on_log),
        )
    if ranks.world_size() > 1:
        student = sharding.gathered(student, load_model(start.model.source))
    if ranks.rank() > 0:
        return
    write_json(folder / "losses.json", {"loss": metrics.selection_loss, "kl_to_teacher": metrics.selection_kl})
    _check_computable(run, member, student, lesson.selection)
    _save_member(run, student, folder)
    per_token = flops_of(recipe, load_config(run.parent.source)) if lesson.teacher is not None else 0.0
    write_json(folder / COST_FILE, {"teacher_flops_per_token": per_token, "angles_degrees": angles})


def _save_member(run: Run, student: nn.Module, folder: Path) -> None:
    """Write the checkpoint with the parent's tokenizer, and logits for the reload gate."""
    parent = run.parent.source
    dtype = _saved_dtype(run.recipe, parent)
    rounded = save_checkpoint(student, folder / CHECKPOINT, companions=parent.folder, dtype=dtype)
    write_reference(rounded, folder / "reference.safetensors", folder=folder / CHECKPOINT)


def _saved_dtype(recipe: Recipe, parent: ModelSource) -> torch.dtype:
    dtype: torch.dtype = stored_dtype(parent) if recipe.save.dtype == "parent" else getattr(torch, recipe.save.dtype)
    return dtype


def _check_computable(run: Run, member: ResolvedMember, student: nn.Module, selection: TokenBlocks | Examples) -> None:
    """Refuse a student that its users could not run in float16, before its training and once more before it is saved.

    Where float16 is the parent's own dtype, a warning is enough: the parent has the same limits.
    """
    dtype = _saved_dtype(run.recipe, run.parent.source)
    if dtype != torch.float16 or ranks.world_size() > 1:
        return
    sample = selection.rows(torch.arange(min(8, len(selection))))
    refuse, place = run.recipe.save.dtype != "parent", f"members: {member.name}"
    warning = require_computable(student.eval(), sample.inputs(), dtype, place, refuse=refuse)
    if warning:
        tell_once(warning)


def _angles(lesson: Lesson, recipe: Recipe, member: ResolvedMember) -> list[float]:
    """Degrees between the gradient from sampled targets and the exact one, in the first steps; else empty."""
    student, teacher, blocks, targets = lesson.student, lesson.teacher, lesson.blocks, lesson.supervision.targets
    if teacher is None or not isinstance(blocks, TokenBlocks) or not isinstance(targets, CachedTargets):
        return []
    if targets.layout.kind != "sampled" or ranks.world_size() > 1:
        return []
    objective = lesson.supervision.objective
    batches = [
        step_rows(recipe, member.first_position, step, len(blocks))
        for step in taught_steps(recipe, member.num_steps)[:_ANGLE_STEPS]
    ]
    steps = [replace(blocks.rows(rows), known=targets.of(rows)) for rows in batches]
    try:
        return [gradient_angle(student, teacher, step, objective, microbatch_size=1) for step in steps]
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        logger.warning("out of memory: the angle between the sample's gradient and the exact one is not measured")
        return []
