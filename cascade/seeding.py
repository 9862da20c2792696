"""The stages that lead from a seed to what a member's training starts from, and what each of them depends on."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from cascade.caching import TeacherCache
from cascade.cutting import (
    make_candidate,
    make_cut,
    make_layers,
    make_repaired,
    make_statistics,
    selection_size,
    statistics_options,
)
from cascade.data.examples import Examples, load_training
from cascade.distillation.memory import remember
from cascade.evaluation.evaluate import default_device
from cascade.family import FoundShape, ResolvedMember
from cascade.models.checkpoint import (
    CHECKPOINT,
    ModelSource,
    fingerprint,
    load_config,
    load_model,
    load_tokenizer,
    resolve_model,
)
from cascade.models.dims import dims_of
from cascade.models.vocabulary import common_vocabulary, require_ids
from cascade.recipe.schema import Recipe
from cascade.rows import FinishedMember
from cascade.runner import StageRunner
from cascade.search import Candidate, search_shape
from cascade.starts import make_random
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
    cache: TeacherCache | None = None
    """What is kept of it; None: it is asked each time."""
    vocab_size: int | None = None
    """Ids, from 0 on, that the member at hand is compared with the parent over; None: all rows."""

    def teacher(self) -> nn.Module:
        """The parent's model, loaded once and frozen."""
        if not self.teachers:
            self.teachers.append(remember(load_model(self.parent).to(default_device()).requires_grad_(False)))
        return self.teachers[0]


@dataclass(frozen=True)
class Start:
    """Where a member's training starts."""

    source: ModelSource
    digest: str
    """Of what it is, for the keys of the stages that read it."""
    cut: Path | None
    repaired: Path | None
    lineage: list[Path] | None
    """The folders of the cuts from the parent to it; None where it was not cut from the parent."""


def shared_by(shared: Shared, member: ResolvedMember) -> Shared:
    """What all members read as one of them does: over the ids that it has in common with the teacher."""
    if member.vocab_size is None:
        return shared
    cache = None if shared.cache is None else shared.cache.narrowed(member.vocab_size)
    return replace(shared, cache=cache, vocab_size=member.vocab_size)


def make_start(
    runner: StageRunner, recipe: Recipe, shared: Shared, member: ResolvedMember, seed: FinishedMember | None
) -> Start:
    """The stages before the training; `seed` is None where that is the parent."""
    how = member.member.start
    if member.vocab_size is not None and not member.seed:
        _require_common_ids(shared, member.vocab_size, member.name)
    if how == "checkpoint":
        source = resolve_model(member.member.student)
        if member.dims.vocab_size:
            tokenizers = load_tokenizer(shared.parent), load_tokenizer(source)
            rows = dims_of(load_config(shared.parent)).vocab_size, member.dims.vocab_size
            common_vocabulary(*tokenizers, *rows, f"members: {member.name}")
        return Start(source, fingerprint(source), None, None, None)
    if how == "random":
        folder = runner.run(
            member.name,
            "init",
            {"config": member.config.to_dict(), "seed": recipe.seed},
            {},
            lambda folder, on_step: make_random(folder, member.config, recipe.seed),
        )
        return Start(ModelSource(folder / CHECKPOINT, member.name), output_digest(folder), None, None, None)
    seed_folder = seed.distilled if seed else None
    before: list[Path] | None = seed.lineage if seed else []
    repaired = None
    if how == "layers":
        cut = _take_layers(runner, recipe, shared, member, seed_folder)
    else:
        cut = _make_cut(runner, recipe, shared, member, seed_folder)
        repaired = _make_repaired(runner, recipe, shared, member, seed_folder, cut)
    lineage = None if before is None else [*before, cut]
    made = repaired or cut
    return Start(ModelSource(made / CHECKPOINT, member.name), output_digest(made), cut, repaired, lineage)


def _require_common_ids(shared: Shared, vocab_size: int, name: str) -> None:
    """Refuse now a training text with ids that a member and its teacher do not have in common."""
    for split in ("train", "selection"):
        found = load_training(shared.data / f"{split}.safetensors")
        ids = found.tensors["input_ids"] if isinstance(found, Examples) else found.input_ids
        require_ids(ids, vocab_size, load_tokenizer(shared.parent), f"members: {name}: data.{split}")


def find_shape(
    runner: StageRunner, recipe: Recipe, shared: Shared, member: ResolvedMember, seed: FinishedMember | None
) -> list[Candidate]:
    """The shapes that were tried for a member, the chosen one first; empty where there is nothing to choose."""
    choosing = recipe.prune.search is not None or len(member.hidden_choices) > 1
    if member.member.start != "prune" or not choosing or member.target is None or not member.target.bounds():
        return []
    folder, shared = seed.distilled if seed else None, shared_by(shared, member)
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
            optimizer=member.optimizer,
            cache=shared.cache,
            on_step=on_step,
            vocab_size=member.vocab_size,
        )

    inputs = _cut_inputs(shared, folder, statistics)
    return search_shape(runner, recipe, member, source, inputs, make, kept_settings(shared))


def kept_settings(shared: Shared) -> dict[str, Any]:
    """What a training's result depends on of the targets that it reads; empty where they are the teacher's own."""
    return {"targets": shared.cache.settings()} if shared.cache else {}


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


def _take_layers(
    runner: StageRunner, recipe: Recipe, shared: Shared, member: ResolvedMember, seed: Path | None
) -> Path:
    source = _source(shared, member, seed)
    selection = selection_size(recipe)
    return runner.run(
        member.name,
        "prune",
        {"init": "layers", "dims": member.dims.as_dict(), "selection_blocks": selection},
        {"seed": _seed_digest(shared, seed), "teacher": shared.digests["parent"], "data": shared.digests["data"]},
        lambda folder, on_step: make_layers(folder, recipe, member, source, shared.data, shared.teacher()),
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
            "selection_blocks": selection_size(recipe),
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
            "selection_blocks": selection_size(recipe),
        },
        {
            "cut": output_digest(cut),
            "seed": _seed_digest(shared, seed),
            "teacher": shared.digests["parent"],
            "data": shared.digests["data"],
        },
        lambda folder, on_step: make_repaired(
            folder, recipe, source, cut, shared.data, shared.teacher(), on_step, vocab_size=member.vocab_size
        ),
    )
