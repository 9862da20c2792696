"""The stages that lead from a seed to what a member's training starts from, and what each of them depends on."""

from dataclasses import dataclass, replace
from functools import partial

from cascade.context import Run
from cascade.cutting import (
    Base,
    cut_inputs,
    make_cut,
    make_layers,
    make_repaired,
    make_statistics,
    selection_size,
    statistics_options,
)
from cascade.data.examples import Examples, load_training
from cascade.family import ResolvedMember
from cascade.models.checkpoint import fingerprint, load_config, load_tokenizer, resolve_model
from cascade.models.dims import dims_of
from cascade.models.vocabulary import common_vocabulary, require_ids
from cascade.rows import FinishedMember
from cascade.search import Candidate, search_shape
from cascade.stage_output import Checkpoint, Made
from cascade.starts import make_random


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a member's training starts from."""

    model: Checkpoint
    cut: Made | None = None
    repaired: Made | None = None
    lineage: list[Made] | None = None
    """The cuts from the parent to it; None where it was not cut from the parent."""


def make_start(run: Run, member: ResolvedMember, seed: FinishedMember | None) -> Start:
    """The stages before the training; `seed` is the member that this one is cut from, None where that is the parent."""
    if member.vocab_size is not None and not member.seed:
        _require_common_ids(run, member.vocab_size, member.name)
    match member.member.start:
        case "checkpoint":
            return _start_from_checkpoint(run, member)
        case "random":
            return Start(model=_draw_weights(run, member).model(member.name))
        case "layers":
            base = _base(run, member, seed)
            cut, repaired = _take_layers(run, member, base), None
        case _:
            base = _collect_statistics(run, member, _base(run, member, seed))
            cut = _cut(run, member, base)
            repaired = _repair(run, member, base, cut)
    lineage = None if base.lineage is None else [*base.lineage, cut]
    return Start(model=(repaired or cut).model(member.name), cut=cut, repaired=repaired, lineage=lineage)


def find_shape(run: Run, member: ResolvedMember, seed: FinishedMember | None) -> list[Candidate]:
    """The shapes that were tried for a member, the chosen one first; empty where there is nothing to choose."""
    choosing = run.recipe.prune.search is not None or len(member.hidden_choices) > 1
    if member.member.start != "prune" or not choosing or member.target is None or not member.target.bounds():
        return []
    run = run.for_member(member)
    return search_shape(run, member, _collect_statistics(run, member, _base(run, member, seed)))


def _require_common_ids(run: Run, vocab_size: int, name: str) -> None:
    """Refuse now a training text with ids that a member and its teacher do not have in common."""
    for split in ("train", "selection"):
        text = load_training(run.data.folder / f"{split}.safetensors")
        ids = text.tensors["input_ids"] if isinstance(text, Examples) else text.input_ids
        require_ids(ids, vocab_size, load_tokenizer(run.parent.source), f"members: {name}: data.{split}")


def _start_from_checkpoint(run: Run, member: ResolvedMember) -> Start:
    source, parent = resolve_model(member.member.student), run.parent.source
    if member.dims.vocab_size:
        tokenizers = load_tokenizer(parent), load_tokenizer(source)
        rows = dims_of(load_config(parent)).vocab_size, member.dims.vocab_size
        common_vocabulary(*tokenizers, *rows, f"members: {member.name}")
    return Start(model=Checkpoint(source, fingerprint(source)))


def _draw_weights(run: Run, member: ResolvedMember) -> Made:
    return run.runner.make(
        "init",
        member.name,
        settings={"config": member.config.to_dict(), "seed": run.recipe.seed},
        inputs={},
        write=partial(make_random, member.config, run.recipe.seed),
    )


def _base(run: Run, member: ResolvedMember, seed: FinishedMember | None) -> Base:
    """The model that a member is cut from, without statistics."""
    if seed is None:
        return Base(model=run.parent, lineage=[])
    return Base(model=seed.distilled.model(member.seed), lineage=seed.lineage)


def _collect_statistics(run: Run, member: ResolvedMember, base: Base) -> Base:
    """The model that a member is cut from, with its statistics."""
    statistics = run.runner.make(
        "statistics",
        member.name,
        settings=run.recipe.calibration.model_dump() | statistics_options(run.recipe, member.hidden_choices),
        inputs={"seed": base.model, "data": run.data},
        write=partial(make_statistics, run, member, base),
        label=member.seed,
    )
    return replace(base, statistics=statistics)


def _take_layers(run: Run, member: ResolvedMember, base: Base) -> Made:
    dims, num_selected = member.dims.as_dict(), selection_size(run.recipe)
    return run.runner.make(
        "prune",
        member.name,
        settings={"init": "layers", "dims": dims, "selection_blocks": num_selected},
        inputs={"seed": base.model, "teacher": run.parent, "data": run.data},
        write=partial(make_layers, run, member, base),
    )


def _cut(run: Run, member: ResolvedMember, base: Base) -> Made:
    return run.runner.make(
        "prune",
        member.name,
        settings=run.recipe.prune.model_dump(exclude={"repair", "search"})
        | {
            "hidden": member.hidden,
            "dims": member.dims.as_dict(),
            "selection_blocks": selection_size(run.recipe),
        },
        inputs=cut_inputs(run, base),
        write=partial(make_cut, run, member, base),
    )


def _repair(run: Run, member: ResolvedMember, base: Base, cut: Made) -> Made | None:
    settings = run.recipe.prune.repair
    if settings.method == "none":
        return None
    batch_size, num_selected = run.recipe.calibration.batch_size, selection_size(run.recipe)
    return run.runner.make(
        "repair",
        member.name,
        settings=settings.model_dump() | {"batch_size": batch_size, "selection_blocks": num_selected},
        inputs={"cut": cut, "seed": base.model, "teacher": run.parent, "data": run.data},
        write=partial(make_repaired, run, base, cut),
    )
