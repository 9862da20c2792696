"""What a training and the search for its learning rate have in common: settings, inputs, models, texts and losses."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from cascade.data.blocks import TokenBlocks
from cascade.data.examples import Examples, load_training
from cascade.distillation import sharding
from cascade.distillation.losses.features import FeatureLoss
from cascade.distillation.options import Features
from cascade.distillation.supervision import Lesson
from cascade.evaluation.evaluate import default_device
from cascade.models.architecture.dims import dims_of
from cascade.models.architecture.origin import Origin, even_origin
from cascade.models.checkpoint.load import (
    ModelSource,
    load_model,
)
from cascade.pipeline.context import Run
from cascade.pipeline.kept_targets import member_rows
from cascade.pipeline.stage_output import Input, Start
from cascade.pipeline.stages.cut import load_plans
from cascade.pipeline.stages.data import load_selection
from cascade.pipeline.training_options import optimization_of, supervision_of
from cascade.planning.family import ResolvedMember
from cascade.pruning.origin import origin_of
from cascade.pruning.plan import PruningPlan
from cascade.recipe.distill import WITHOUT_EFFECT, Distill
from cascade.recipe.schema import Recipe
from cascade.runtime import ranks


def training_settings(run: Run, member: ResolvedMember) -> dict[str, Any]:
    """The settings that a member's training, and the search for its rate, depend on."""
    recipe = run.recipe
    settings = (
        recipe.distill.model_dump(exclude={"tokens", "examples", "cache", *WITHOUT_EFFECT}) if recipe.distill else {}
    )
    return (
        settings
        | {
            "optimizer": member.optimizer,
            "num_tokens": member.num_tokens,
            "first_position": member.first_position,
            "seed": recipe.seed,
            "dtype": recipe.save.dtype,
        }
        | run.comparison_settings()
    )


def training_inputs(run: Run, start: Start) -> dict[str, Input]:
    """The inputs of a training and of the search for its rate."""
    return {"start": start.model, "teacher": run.parent, "data": run.data}


def distill_settings(run: Run) -> Distill:
    """The recipe's distill section.

    Raises:
        ValueError: the recipe has none.
    """
    if run.recipe.distill is None:
        raise ValueError("a recipe with members has a distill section")
    return run.recipe.distill


def lesson_of(run: Run, member: ResolvedMember, start: Start, stage: str) -> Lesson:
    """What a member's training is made of; `stage` is distill, or baseline-ce, which learns from the text alone."""
    recipe, settings = run.recipe, distill_settings(run)
    teacher = run.expert() if stage == "distill" else None
    student = load_model(start.model.source).to(default_device())
    if teacher is not None:
        teacher = teacher_for_training(teacher, run.parent.source)
    blocks, selection = _texts(run, teacher, stage)
    supervision = supervision_of(settings, None if recipe.counts_examples else member.vocab_size)
    if teacher is None:
        supervision = replace(supervision, on_policy=None)
    elif run.cache is not None and isinstance(blocks, TokenBlocks):
        targets = run.cache.targets(teacher, blocks, member_rows(recipe, member, len(blocks)))
        supervision = replace(supervision, objective=run.cache.objective(supervision.objective), targets=targets)
    features = feature_loss(recipe, load_plans(start.lineage), student, teacher, member.num_tokens)
    optimization = optimization_of(
        settings,
        learning_rate=0.0,
        optimizer=member.optimizer,
        seed=recipe.seed,
        first_position=member.first_position,
    )
    return Lesson(
        student=student,
        teacher=teacher,
        blocks=blocks,
        selection=selection,
        supervision=replace(supervision, features=features),
        optimization=optimization,
    )


def _texts(run: Run, teacher: nn.Module | None, stage: str) -> tuple[TokenBlocks | Examples, TokenBlocks | Examples]:
    """(training text, selection text); without a teacher's log-probabilities where the training has no teacher."""
    blocks = load_training(run.data.folder / "train.safetensors")
    if teacher is None and isinstance(blocks, Examples):
        blocks = blocks.labelled()  # the others have nothing to say
    selection = load_selection(run)
    if stage != "distill" and isinstance(blocks, TokenBlocks) and isinstance(selection, TokenBlocks):
        blocks, selection = replace(blocks, known=None), replace(selection, known=None)
    return blocks, selection


def teacher_for_training(teacher: nn.Module, parent: ModelSource) -> nn.Module:
    """The teacher that a training uses; with several processes, a sharded copy: other stages need the whole model."""
    if ranks.world_size() == 1:
        return teacher
    return sharding.shard(load_model(parent).to(default_device()).requires_grad_(False))


def feature_loss(
    recipe: Recipe,
    plans: Sequence[PruningPlan] | None,
    student: nn.Module,
    teacher: nn.Module | None,
    num_tokens: int,
) -> FeatureLoss | None:
    """The losses of the recipe's distill.features; None where it names none, or there is no teacher.

    `plans` are the student's cuts from the teacher on, None if it was not cut from the teacher. `num_tokens` is the
    length of its training, in examples where the recipe counts examples.
    """
    settings = recipe.distill
    if settings is None:
        raise ValueError("a recipe with members has a distill section")
    if teacher is None:
        return None
    section = settings.features
    forms = (settings.hidden_features(bool(plans)), section.embedding)
    hidden, embedding = (None if form == "none" else form for form in forms)
    num_parameters, of_teacher = (sum(each.numel() for each in model.parameters()) for model in (student, teacher))
    guided = recipe.task == "language" and bool(plans)
    features = Features(
        hidden=hidden,
        embedding=embedding,
        relations=tuple(section.relations),
        relation_heads=section.relation_heads,
        weights={str(name): weight for name, weight in section.weights.items()},
        balanced=section.balanced,
        fade_fraction=settings.fade_fraction(num_tokens / num_parameters, num_parameters / of_teacher, guided=guided),
    )
    if not features.names():
        return None
    if plans:
        origin = origin_of(plans)
    elif hidden or embedding:
        origin = even_origin(dims_of(student.config), dims_of(teacher.config))
    else:
        origin = Origin(())
    return FeatureLoss(features, origin, student, teacher)
