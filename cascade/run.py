"""The loop over members: knows the stages and what each depends on, and no mathematics."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from cascade.errors import UserError
from cascade.evaluation.evaluate import default_device
from cascade.family import ResolvedMember, check_family, parent_seconds, resolve_family, run_folder_of
from cascade.models.checkpoint import (
    ModelSource,
    fingerprint,
    load_config,
    load_model,
    load_tokenizer,
    resolve_model,
)
from cascade.models.dims import dims_of
from cascade.ownership import check_ownership, pinned_seeds, resolved_recipe
from cascade.parent import existing_parent, make_converted, make_pretrained, parent_config
from cascade.progress import OnStep, RunProgress
from cascade.publish import FinishedMember, baseline_row, publish_member, teacher_row, write_report
from cascade.recipe.schema import Recipe
from cascade.runner import STAGES, StageRunner
from cascade.stages import (
    CHECKPOINT,
    data_fingerprint,
    make_baseline,
    make_cut,
    make_data,
    make_evaluation,
    make_recovered,
    make_statistics,
    task_fingerprint,
)
from cascade.store import append_event, locked, output_digest, write_atomically
from cascade.yaml_reader import write_yaml


def run_recipe(
    recipe: Recipe,
    *,
    output: str | Path | None = None,
    only: Sequence[str] = (),
    from_stage: str | None = None,
    console: Console | None = None,
) -> Path:
    """Make the family of a recipe, or go on where an earlier run stopped; returns the run directory.

    `only` names members to make (with the seeds that they need); `from_stage` makes their stages again from there on.

    Raises:
        UserError: the recipe cannot be done, or the directory belongs to another recipe.
        TrainingError: training met a non-finite number.
        ReloadError: a saved member does not reload.
    """
    if from_stage is not None and from_stage not in STAGES:
        raise UserError(f"--from {from_stage}: no such stage; known: {', '.join(STAGES)}")
    folder = run_folder_of(recipe, output)
    check_ownership(folder, recipe)
    config = parent_config(recipe)
    members = resolve_family(recipe, config, pinned_seeds=pinned_seeds(folder))
    check_family(recipe, config, members)
    wanted = _with_seeds(members, only)
    with locked(folder):
        write_atomically(folder / "recipe.yaml", write_yaml(resolved_recipe(recipe, members)))
        append_event(folder, "started", members=[member.name for member in wanted])
        estimates = {("parent", stage): seconds for stage, seconds in parent_seconds(recipe, config).items()}
        for member in wanted:
            estimates |= {(member.name, stage): seconds for stage, seconds in member.seconds.items()}
        with RunProgress(console or Console(stderr=True), recipe.name, estimates) as progress:
            chosen = frozenset(only or [member.name for member in members])
            _make_family(StageRunner(folder, progress, from_stage, chosen), recipe, members, wanted)
        append_event(folder, "done", members=[member.name for member in wanted])
    return folder


def _make_family(
    runner: StageRunner, recipe: Recipe, members: list[ResolvedMember], wanted: list[ResolvedMember]
) -> None:
    shared = _prepare(runner, recipe)
    teacher = teacher_row(recipe, shared.parent, shared.evaluation)
    finished: dict[str, FinishedMember] = {}
    write_report(runner.folder, recipe, members, teacher, finished)
    for member in wanted:
        seed = finished[member.seed].distilled if member.seed in finished else None
        finished[member.name] = _make_member(runner, recipe, shared, member, seed)
        with runner.progress.stage(member.name, "report"):
            publish_member(runner.folder, recipe, members, member, finished[member.name], teacher, shared.parent)
            write_report(runner.folder, recipe, members, teacher, finished)


@dataclass(frozen=True)
class _Shared:
    """What all members of a run read."""

    parent: ModelSource
    data: Path
    evaluation: Path
    """The parent's own evaluation."""
    digests: dict[str, str]
    """Of the text's source, the parent, the packed blocks and the tasks."""
    teachers: list[nn.Module]
    """The parent's model, once it has been needed."""

    def teacher(self) -> nn.Module:
        """The parent's model, loaded once and frozen."""
        if not self.teachers:
            self.teachers.append(load_model(self.parent).to(default_device()).requires_grad_(False))
        return self.teachers[0]


def _prepare(runner: StageRunner, recipe: Recipe) -> _Shared:
    """The stages that all members share: parent, data, the parent's evaluation."""
    source = data_fingerprint(recipe.data)
    parent = _make_parent(runner, recipe, source)
    tokenizer = load_tokenizer(parent, vocab_size=dims_of(load_config(parent)).vocab_size)
    digests = {"source": source, "parent": fingerprint(parent), "tasks": task_fingerprint(recipe)}
    data = runner.run(
        "parent",
        "data",
        recipe.data.model_dump(include={"source", "text_field", "block_size", "max_tokens"}),
        {name: digests[name] for name in ("source", "parent")},
        lambda folder, on_step: make_data(folder, recipe, tokenizer),
    )
    evaluation = runner.run(
        "parent",
        "evaluate",
        _evaluation_settings(recipe),
        digests,
        lambda folder, on_step: make_evaluation(
            folder, recipe, parent, teacher=None, parent_evaluation=None, reference=None
        ),
    )
    return _Shared(parent, data, evaluation, digests | {"data": output_digest(data)}, [])


def _make_parent(runner: StageRunner, recipe: Recipe, source_digest: str) -> ModelSource:
    found = existing_parent(recipe)
    if found is None and recipe.parent.pretrain is not None:
        settings = recipe.parent.pretrain.model_dump() | {"seed": recipe.seed, "dtype": recipe.save.dtype}
        folder = runner.run(
            "parent",
            "pretrain",
            settings,
            {"source": source_digest},
            lambda folder, on_step: make_pretrained(folder, recipe, on_step),
        )
        return ModelSource(folder / CHECKPOINT, recipe.name)
    if found is None:
        raise ValueError("a parent is either found or trained")
    if not found.gguf_file:
        return found
    folder = runner.run(
        "parent",
        "convert",
        {},
        {"gguf": fingerprint(found)},
        lambda folder, on_step: make_converted(folder, found),
    )
    return ModelSource(folder / CHECKPOINT, found.reference)


def _make_member(
    runner: StageRunner, recipe: Recipe, shared: _Shared, member: ResolvedMember, seed: Path | None
) -> FinishedMember:
    """All stages of one member; `seed` is the folder of its seed's distill stage, None for the parent."""
    cut = _make_cut(runner, recipe, shared, member, seed) if member.seed else None
    start = ModelSource(cut / CHECKPOINT, member.name) if cut else resolve_model(member.member.student)
    inputs = {
        "start": output_digest(cut) if cut else fingerprint(start),
        "teacher": shared.digests["parent"],
        "data": shared.digests["data"],
    }
    settings = _training_settings(recipe, member)

    def recover(folder: Path, on_step: OnStep, teacher: nn.Module | None) -> None:
        make_recovered(folder, recipe, member, start, shared.parent, shared.data, teacher, on_step)

    distilled = runner.run(
        member.name,
        "distill",
        settings,
        inputs,
        lambda folder, on_step: recover(folder, on_step, shared.teacher()),
    )
    rows = []
    for kind in recipe.baselines:
        if kind == "cut" and cut is None:
            continue

        def baseline(folder: Path, on_step: OnStep, kind: str = kind) -> None:
            if kind == "ce":
                recover(folder, on_step, None)
            checkpoint = ModelSource(folder / CHECKPOINT, member.name) if kind == "ce" else start
            make_baseline(folder, recipe, checkpoint, shared.parent, shared.teacher())

        own = _evaluation_settings(recipe, heldout_only=True) | (settings if kind == "ce" else {})
        made = runner.run(member.name, f"baseline-{kind}", own, inputs | {"source": shared.digests["source"]}, baseline)
        rows.append(baseline_row(member, kind, made))
    evaluation = runner.run(
        member.name,
        "evaluate",
        _evaluation_settings(recipe),
        shared.digests
        | {"checkpoint": output_digest(distilled), "parent_evaluation": output_digest(shared.evaluation)},
        lambda folder, on_step: make_evaluation(
            folder,
            recipe,
            ModelSource(distilled / CHECKPOINT, member.name),
            teacher=shared.teacher(),
            parent_evaluation=shared.evaluation,
            reference=distilled / "reference.safetensors",
        ),
    )
    return FinishedMember(cut, distilled, evaluation, rows)


def _make_cut(runner: StageRunner, recipe: Recipe, shared: _Shared, member: ResolvedMember, seed: Path | None) -> Path:
    source = shared.parent if seed is None else ModelSource(seed / CHECKPOINT, member.seed)
    digest = shared.digests["parent"] if seed is None else output_digest(seed)
    statistics = runner.run(
        member.seed,
        "statistics",
        recipe.calibration.model_dump(),
        {"seed": digest, "data": shared.digests["data"]},
        lambda folder, on_step: make_statistics(folder, recipe, source, shared.data, on_step),
    )
    return runner.run(
        member.name,
        "prune",
        {
            "dims": member.dims.as_dict(),
            "selection_blocks": recipe.distill.selection_blocks if recipe.distill else 0,
        },
        {"statistics": output_digest(statistics), "seed": digest, "teacher": shared.digests["parent"]},
        lambda folder, on_step: make_cut(folder, recipe, member, source, statistics, shared.data, shared.teacher()),
    )


def _training_settings(recipe: Recipe, member: ResolvedMember) -> dict[str, Any]:
    # The microbatch is left out: it changes memory and speed, and the result only by rounding.
    settings = recipe.distill.model_dump(exclude={"tokens", "microbatch_size"}) if recipe.distill else {}
    return settings | {
        "num_tokens": member.num_tokens,
        "first_position": member.first_position,
        "seed": recipe.seed,
        "dtype": recipe.save.dtype,
    }


def _evaluation_settings(recipe: Recipe, *, heldout_only: bool = False) -> dict[str, Any]:
    heldout = {"heldout_blocks": recipe.evaluate.heldout_blocks, "block_size": recipe.data.block_size}
    if heldout_only:
        return heldout
    return heldout | recipe.evaluate.model_dump(exclude={"task_folders"}) | {"seed": recipe.seed}


def _with_seeds(members: list[ResolvedMember], only: Sequence[str]) -> list[ResolvedMember]:
    """The members asked for and, before each, those that it is cut from; all of them if none is named."""
    by_name = {member.name: member for member in members}
    unknown = [name for name in only if name not in by_name]
    if unknown:
        raise UserError(f"--only {unknown[0]}: no such member; the recipe has: {', '.join(by_name) or 'none'}")
    needed = set(only or by_name)
    for name in list(needed):
        while name in by_name:
            needed.add(name)
            name = by_name[name].seed
    return [member for member in members if member.name in needed]
