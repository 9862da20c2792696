"""What each stage of a run does: read its inputs' folders, write its own. No stage knows about another's keys."""

import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cascade import parallel
from cascade.cache.angle import gradient_angle
from cascade.cache.reader import CachedTargets
from cascade.caching import LABELS, TeacherCache, member_rows, step_rows, taught_steps
from cascade.classifier import examples_of
from cascade.context import Run
from cascade.cutting import feature_loss, load_plans, load_selection
from cascade.data.blocks import TokenBlocks, pack_documents, save_blocks
from cascade.data.examples import Examples, load_training, read_examples, save_examples
from cascade.data.framing import framing_of
from cascade.data.prepare import prepare_blocks
from cascade.data.splits import Split
from cascade.distillation.options import Hooks, Optimization
from cascade.distillation.range_test import find_learning_rate
from cascade.distillation.supervision import Selection, Supervision
from cascade.distillation.trainer import distill
from cascade.estimates import flops_of
from cascade.evaluation.evaluate import default_device
from cascade.evaluation.reload import write_reference
from cascade.family import ResolvedMember
from cascade.fitting import is_out_of_memory
from cascade.inputs import as_guessed, labelled_data, text_data
from cascade.models.checkpoint import (
    CHECKPOINT,
    ModelSource,
    load_config,
    load_model,
    save_checkpoint,
    stored_dtype,
)
from cascade.models.dims import dims_of
from cascade.models.loading import tell_once
from cascade.models.value_range import require_computable
from cascade.models.vocabulary import require_ids
from cascade.plain_json import write_json
from cascade.progress import OnStep
from cascade.recipe.distill import Distill
from cascade.recipe.schema import Recipe
from cascade.report.skipped import SKIPPED
from cascade.report.trackers import tracked
from cascade.seeding import Start
from cascade.store import COST_FILE, partial_of
from cascade.training_options import execution_of, optimization_of, safekeeping_of, supervision_of

logger = logging.getLogger(__name__)

_ANGLE_STEPS = 2


CLASSIFYING = {"label_field", "image_field", "train_examples", "max_length"}
"""Keys of data that only a recipe that classifies reads."""


def make_data(recipe: Recipe, parent: ModelSource, tokenizer: Any, folder: Path, on_step: OnStep) -> None:
    """train, calibration and selection blocks, or labelled examples, and skipped.json, the rows that were left out.

    The held-out split is not touched here.
    """
    data, config = recipe.data, load_config(parent)
    vocab_size, bad = dims_of(config).vocab_size, text_data(data).bad_row_counter()
    if recipe.counts_examples:
        for split in ("train", "selection"):
            examples = examples_of(recipe, config, split, tokenizer, bad=bad)
            save_examples(examples, folder / f"{split}.safetensors")
        write_json(folder / SKIPPED, bad.record())
        if tokenizer is not None:  # what statistics are taken on: the same texts, packed
            texts = [example.content for example in read_examples(labelled_data(data, recipe.task), "train", bad)]
            framing = framing_of(tokenizer, "data.train", begin_blocks=data.begin_token != "documents")
            packed = pack_documents(texts, tokenizer, block_size=data.max_length, framing=framing, name="data.train")
            require_ids(packed.input_ids, vocab_size, tokenizer, "data.train")
            save_blocks(packed, folder / "calibration.safetensors")
        return
    limits: dict[Split, int | None] = {
        "train": max(1, data.max_tokens // data.block_size),
        "calibration": None,
        "selection": None,
    }
    for split, limit in limits.items():
        blocks = prepare_blocks(
            replace(text_data(data), listed=reads_logprobs(recipe)),
            split,
            tokenizer,
            block_size=data.block_size,
            max_blocks=limit,
            document_masks=data.masks_documents,
            stream_folder=partial_of(folder),
            bad=bad,
        )
        require_ids(blocks.input_ids, vocab_size, tokenizer, f"data.{split}")
        save_blocks(as_guessed(recipe, blocks, split, tokenizer, vocab_size), folder / f"{split}.safetensors")
    write_json(folder / SKIPPED, bad.record())


def reads_logprobs(recipe: Recipe) -> bool:
    """Whether the members learn from log-probabilities that came with the text."""
    return recipe.distill is not None and recipe.distill.teacher == "logprobs"


@dataclass(frozen=True, kw_only=True)
class _Lesson:
    """What a member's training, and the search for its rate, are made of; nothing here depends on the rate."""

    student: nn.Module
    teacher: nn.Module | None
    """None where the text alone teaches."""
    blocks: TokenBlocks | Examples
    selection: TokenBlocks | Examples
    supervision: Supervision
    optimization: Optimization
    """At no rate yet."""


def _lesson(run: Run, member: ResolvedMember, start: Start, stage: str) -> _Lesson:
    """`stage` is distill, or baseline-ce, which learns from the text alone."""
    recipe, settings = run.recipe, _distill_settings(run)
    teacher = run.expert() if stage == "distill" else None
    student = load_model(start.model.source).to(default_device())
    if teacher is not None:
        teacher = _own_teacher(teacher, run.parent.source)
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
    return _Lesson(
        student=student,
        teacher=teacher,
        blocks=blocks,
        selection=selection,
        supervision=replace(supervision, features=features),
        optimization=optimization,
    )


def _distill_settings(run: Run) -> Distill:
    if run.recipe.distill is None:
        raise ValueError("a recipe with members has a distill section")
    return run.recipe.distill


def make_recovered(
    run: Run,
    member: ResolvedMember,
    start: Start,
    stage: str,
    learning_rate: float,
    folder: Path,
    on_step: OnStep,
) -> None:
    """The recovered member as a stock checkpoint, its training log, and logits for the reload gate.

    `stage` is distill, or baseline-ce, which learns from the text alone. Where the run keeps the teacher's targets, a
    member learns from those, and the teacher only judges it on selection text.
    """
    recipe, settings = run.recipe, _distill_settings(run)
    lesson = _lesson(run, member, start, stage)
    student = lesson.student
    _check_computable(run, member, student, lesson.selection)
    angles = _angles(lesson, recipe, member)
    with tracked(
        settings.trackers if parallel.rank() == 0 else [],
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
    if parallel.world_size() > 1:
        student = parallel.gathered(student, load_model(start.model.source))
    if parallel.rank() > 0:
        return
    write_json(folder / "losses.json", {"loss": metrics.selection_loss, "kl_to_teacher": metrics.selection_kl})
    _check_computable(run, member, student, lesson.selection)
    _save_member(run, student, folder)
    per_token = flops_of(recipe, load_config(run.parent.source)) if lesson.teacher is not None else 0.0
    write_json(folder / COST_FILE, {"teacher_flops_per_token": per_token, "angles_degrees": angles})


def _save_member(run: Run, student: nn.Module, folder: Path) -> None:
    """The checkpoint with the parent's tokenizer beside it, and logits for the reload gate."""
    parent = run.parent.source
    dtype = _saved_dtype(run.recipe, parent)
    rounded = save_checkpoint(student, folder / CHECKPOINT, companions=parent.folder, dtype=dtype)
    write_reference(rounded, folder / "reference.safetensors", folder=folder / CHECKPOINT)


def _saved_dtype(recipe: Recipe, parent: ModelSource) -> torch.dtype:
    dtype: torch.dtype = stored_dtype(parent) if recipe.save.dtype == "parent" else getattr(torch, recipe.save.dtype)
    return dtype


def _check_computable(run: Run, member: ResolvedMember, student: nn.Module, selection: TokenBlocks | Examples) -> None:
    """Refuse a student that its users could not run in float16, before its training and once more before it is saved.

    Where float16 is the parent's own dtype it is told only: then the parent is as it is, too.
    """
    dtype = _saved_dtype(run.recipe, run.parent.source)
    if dtype != torch.float16 or parallel.world_size() > 1:
        return
    sample = selection.rows(torch.arange(min(8, len(selection))))
    refuse, place = run.recipe.save.dtype != "parent", f"members: {member.name}"
    warning = require_computable(student.eval(), sample.inputs(), dtype, place, refuse=refuse)
    if warning:
        tell_once(warning)


def _texts(run: Run, teacher: nn.Module | None, stage: str) -> tuple[TokenBlocks | Examples, TokenBlocks | Examples]:
    """What a training reads, and what it is judged on; a baseline's without what a teacher has said of it."""
    blocks = load_training(run.data.folder / "train.safetensors")
    if teacher is None and isinstance(blocks, Examples):
        blocks = blocks.labelled()  # the others have nothing to say
    selection = load_selection(run)
    if stage != "distill" and isinstance(blocks, TokenBlocks) and isinstance(selection, TokenBlocks):
        blocks, selection = replace(blocks, known=None), replace(selection, known=None)
    return blocks, selection


def make_labels(run: Run, member: ResolvedMember, cache: TeacherCache, folder: Path, on_step: OnStep) -> None:
    """label.json: what it took to have the teacher's targets of all that a member reads."""
    teacher = run.teacher()
    blocks = load_training(run.data.folder / "train.safetensors")
    if isinstance(blocks, Examples):
        raise ValueError("what a teacher says of single examples is not kept")
    rows = member_rows(run.recipe, member, len(blocks))
    write_json(folder / LABELS, cache.label(_own_teacher(teacher, run.parent.source), blocks, rows, on_step))


def _angles(lesson: _Lesson, recipe: Recipe, member: ResolvedMember) -> list[float]:
    """Degrees between the gradient of a sample and the exact one, in the first steps; none where nothing is sampled."""
    student, teacher, blocks, targets = lesson.student, lesson.teacher, lesson.blocks, lesson.supervision.targets
    if teacher is None or not isinstance(blocks, TokenBlocks) or not isinstance(targets, CachedTargets):
        return []
    if targets.layout.kind != "sampled" or parallel.world_size() > 1:
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


def make_rate(run: Run, member: ResolvedMember, start: Start, stage: str, folder: Path, on_step: OnStep) -> None:
    """rate.json: the learning rate found for a member's recovery, or for its baseline's, and what was tried.

    `stage` is that of the training; both are searched for in the same way, each by its own loss on selection text.
    """
    lesson = _lesson(run, member, start, stage)
    search = find_learning_rate(
        lesson.student,
        lesson.teacher,
        lesson.blocks,
        num_tokens=member.num_tokens,
        selection=lesson.selection,
        supervision=lesson.supervision,
        optimization=lesson.optimization,
        execution=execution_of(_distill_settings(run)),
        on_try=on_step,
    )
    write_json(folder / "rate.json", {name: value for name, value in asdict(search).items() if name != "seconds"})


def _own_teacher(teacher: nn.Module, parent: ModelSource) -> nn.Module:
    """Where several processes train, a teacher of the training's own: it is sharded, and others use theirs whole."""
    if parallel.world_size() == 1:
        return teacher
    return parallel.shard(load_model(parent).to(default_device()).requires_grad_(False))
