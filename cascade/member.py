"""One member: its stages, and what each of them depends on."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from cascade.cutting import make_candidate, make_cut, make_repaired, make_statistics, statistics_options
from cascade.distillation.memory import remember
from cascade.evaluation.evaluate import default_device
from cascade.family import FoundShape, ResolvedMember
from cascade.models.checkpoint import (
    CHECKPOINT,
    ModelSource,
    fingerprint,
    load_model,
    load_tokenizer,
    require_same_vocabulary,
    resolve_model,
)
from cascade.progress import OnStep
from cascade.publish import FinishedMember, baseline_row
from cascade.recipe.distill import WITHOUT_EFFECT
from cascade.recipe.schema import Recipe
from cascade.report.records import Row
from cascade.runner import StageRunner
from cascade.search import Candidate, search_shape
from cascade.stages import make_baseline, make_evaluation, make_rate, make_recovered
from cascade.store import output_digest


@dataclass(frozen=True)
class Shared:
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
            self.teachers.append(remember(load_model(self.parent).to(default_device()).requires_grad_(False)))
        return self.teachers[0]


def make_member(
    runner: StageRunner, recipe: Recipe, shared: Shared, member: ResolvedMember, seed: FinishedMember | None
) -> FinishedMember:
    """All stages of one member; `seed` is None where that is the parent."""
    seed_folder = seed.distilled if seed else None
    before: list[Path] | None = seed.lineage if seed else []
    cut = _make_cut(runner, recipe, shared, member, seed_folder) if member.seed else None
    repaired = _make_repaired(runner, recipe, shared, member, seed_folder, cut) if cut else None
    lineage = None if cut is None or before is None else [*before, cut]
    made_start = repaired or cut
    start = ModelSource(made_start / CHECKPOINT, member.name) if made_start else resolve_model(member.member.student)
    if made_start is None:
        require_same_vocabulary(load_tokenizer(shared.parent), load_tokenizer(start), f"members: {member.name}")
    inputs = {
        "start": output_digest(made_start) if made_start else fingerprint(start),
        "teacher": shared.digests["parent"],
        "data": shared.digests["data"],
    }
    rate, learning_rate = _make_rate(runner, recipe, shared, member, start, inputs, lineage)
    settings = _training_settings(recipe, member) | {"learning_rate": learning_rate}

    def recover(folder: Path, on_step: OnStep, teacher: nn.Module | None) -> None:
        make_recovered(
            folder,
            recipe,
            member,
            start,
            shared.parent,
            shared.data,
            teacher,
            on_step,
            lineage=lineage,
            learning_rate=learning_rate,
        )

    distilled = runner.run(
        member.name,
        "distill",
        settings,
        inputs,
        lambda folder, on_step: recover(folder, on_step, shared.teacher()),
    )
    rows = []
    for kind in recipe.baselines:
        made = {"cut": cut, "repaired": repaired}.get(kind)
        if made is None and kind != "ce":
            continue
        checkpoint = start if made is None else ModelSource(made / CHECKPOINT, member.name)
        if kind == "ce":
            made = runner.run(
                member.name, "baseline-ce", settings, inputs, lambda folder, on_step: recover(folder, on_step, None)
            )
            checkpoint = ModelSource(made / CHECKPOINT, member.name)
        rows.append(_make_baseline(runner, recipe, shared, member, kind, checkpoint, made))
    evaluation = runner.run(
        member.name,
        "evaluate",
        evaluation_settings(recipe),
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
    return FinishedMember(cut, repaired, rate, distilled, evaluation, rows, lineage)


def _make_rate(
    runner: StageRunner,
    recipe: Recipe,
    shared: Shared,
    member: ResolvedMember,
    start: ModelSource,
    inputs: dict[str, str],
    lineage: list[Path] | None,
) -> tuple[Path | None, float]:
    """(the folder of the search, the rate); no folder where the recipe gives a rate."""
    given = recipe.distill.learning_rate if recipe.distill else 0.0
    if given != "auto":
        return None, given
    folder = runner.run(
        member.name,
        "rate",
        _training_settings(recipe, member),
        inputs,
        lambda folder, on_step: make_rate(
            folder, recipe, member, start, shared.parent, shared.data, shared.teacher(), on_step, lineage=lineage
        ),
    )
    return folder, float(json.loads((folder / "rate.json").read_text())["learning_rate"])


def _make_baseline(
    runner: StageRunner,
    recipe: Recipe,
    shared: Shared,
    member: ResolvedMember,
    kind: str,
    checkpoint: ModelSource,
    made: Path | None,
) -> Row:
    """A baseline's held-out metrics; `made` is the folder of the stage that wrote its checkpoint."""
    folder = runner.run(
        member.name,
        f"heldout-{kind}",
        evaluation_settings(recipe, heldout_only=True),
        {
            "checkpoint": output_digest(made) if made else fingerprint(checkpoint),
            "source": shared.digests["source"],
            "parent": shared.digests["parent"],
        },
        lambda folder, on_step: make_baseline(folder, recipe, checkpoint, shared.parent, shared.teacher()),
    )
    return baseline_row(member, kind, [folder, made] if kind == "ce" and made else [folder])


def find_shape(
    runner: StageRunner, recipe: Recipe, shared: Shared, member: ResolvedMember, seed: FinishedMember | None
) -> list[Candidate]:
    """The shapes that were tried for a member, the chosen one first; empty where there is nothing to choose."""
    choosing = recipe.prune.search is not None or len(member.hidden_choices) > 1
    if not choosing or member.target is None or not member.target.bounds():
        return []
    folder = seed.distilled if seed else None
    source, statistics = _source(shared, member, folder), _make_statistics(runner, recipe, shared, member, folder)

    def make(shape: FoundShape, num_tokens: int) -> Any:
        return lambda folder, on_step: make_candidate(
            folder,
            recipe,
            shape.dims,
            source,
            statistics,
            shared.data,
            shared.teacher(),
            hidden=shape.hidden,
            lineage=seed.lineage if seed else [],
            num_tokens=num_tokens,
            on_step=on_step,
        )

    return search_shape(runner, recipe, member, source, _cut_inputs(shared, folder, statistics), make)


def _source(shared: Shared, member: ResolvedMember, seed: Path | None) -> ModelSource:
    return shared.parent if seed is None else ModelSource(seed / CHECKPOINT, member.seed)


def _seed_digest(shared: Shared, seed: Path | None) -> str:
    return shared.digests["parent"] if seed is None else output_digest(seed)


def _cut_inputs(shared: Shared, seed: Path | None, statistics: Path) -> dict[str, str]:
    return {
        "statistics": output_digest(statistics),
        "seed": _seed_digest(shared, seed),
        "teacher": shared.digests["parent"],
        "data": shared.digests["data"],
    }


def _make_statistics(
    runner: StageRunner, recipe: Recipe, shared: Shared, member: ResolvedMember, seed: Path | None
) -> Path:
    source = _source(shared, member, seed)
    return runner.run(
        member.name,
        "statistics",
        recipe.calibration.model_dump() | statistics_options(recipe, member.hidden_choices),
        {"seed": _seed_digest(shared, seed), "data": shared.digests["data"]},
        lambda folder, on_step: make_statistics(folder, recipe, source, shared.data, on_step, member.hidden_choices),
        label=member.seed,
    )


def _make_cut(runner: StageRunner, recipe: Recipe, shared: Shared, member: ResolvedMember, seed: Path | None) -> Path:
    source, statistics = _source(shared, member, seed), _make_statistics(runner, recipe, shared, member, seed)
    return runner.run(
        member.name,
        "prune",
        recipe.prune.model_dump(exclude={"repair", "search"})
        | {
            "hidden": member.hidden,
            "dims": member.dims.as_dict(),
            "selection_blocks": recipe.distill.selection_blocks if recipe.distill else 0,
        },
        _cut_inputs(shared, seed, statistics),
        lambda folder, on_step: make_cut(folder, recipe, member, source, statistics, shared.data, shared.teacher()),
    )


def _make_repaired(
    runner: StageRunner, recipe: Recipe, shared: Shared, member: ResolvedMember, seed: Path | None, cut: Path
) -> Path | None:
    if recipe.prune.repair.method == "none":
        return None
    source = _source(shared, member, seed)
    return runner.run(
        member.name,
        "repair",
        recipe.prune.repair.model_dump()
        | {
            "batch_size": recipe.calibration.batch_size,
            "selection_blocks": recipe.distill.selection_blocks if recipe.distill else 0,
        },
        {
            "cut": output_digest(cut),
            "seed": _seed_digest(shared, seed),
            "teacher": shared.digests["parent"],
            "data": shared.digests["data"],
        },
        lambda folder, on_step: make_repaired(folder, recipe, source, cut, shared.data, shared.teacher(), on_step),
    )


def _training_settings(recipe: Recipe, member: ResolvedMember) -> dict[str, Any]:
    settings = recipe.distill.model_dump(exclude={"tokens", *WITHOUT_EFFECT}) if recipe.distill else {}
    return settings | {
        "num_tokens": member.num_tokens,
        "first_position": member.first_position,
        "seed": recipe.seed,
        "dtype": recipe.save.dtype,
    }


def evaluation_settings(recipe: Recipe, *, heldout_only: bool = False) -> dict[str, Any]:
    """What an evaluation's key takes from the recipe; the tasks' contents are an input."""
    heldout = {
        "heldout_blocks": recipe.evaluate.heldout_blocks,
        "block_size": recipe.data.block_size,
        "document_masks": recipe.data.masks_documents,
        "text_field": recipe.data.text_field,
        "messages_field": recipe.data.messages_field,
    }
    if heldout_only:
        return heldout
    return heldout | recipe.evaluate.model_dump(exclude={"task_folders"}) | {"seed": recipe.seed}
