"""The provenance of published models, from the recipe and the chain of members that each was cut from."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from cascade.pipeline.rows import RoundedCopy
from cascade.planning.family import ResolvedMember
from cascade.planning.origins import origins_of
from cascade.recipe.licences import Origin
from cascade.recipe.places import is_local, public_model, served_model
from cascade.recipe.schema import Recipe
from cascade.report.provenance import Provenance
from cascade.report.records import Tokens


def provenance_of(
    recipe: Recipe,
    members: Sequence[ResolvedMember],
    member: ResolvedMember,
    parent: str,
    tokens: Tokens,
) -> Provenance:
    """The provenance of a member; `parent` is the parent's reference, `tokens` the member's training tokens."""
    start: Any = member.member.start
    of = {"checkpoint": public_model(member.member.student), "random": str(member.sized.config.model_type)}
    first = _first(members, member)
    taught_by: Any = recipe.distill.teacher if recipe.distill else "none"
    provenance = Provenance(
        name=member.name,
        parent=public_model(parent),
        start=start,
        start_from=of.get(start, member.seed),
        derived_from=_derived_from(first),
        base_model=_base_model(recipe, first),
        licence="",
        taught_by=taught_by,
        teacher=_teacher(recipe, taught_by, parent),
        text_by=_writer(recipe, parent),
        text_share=recipe.distill.cross_entropy_weight if recipe.distill and taught_by != "text" else 0.0,
        on_policy=recipe.distill is not None and recipe.distill.on_policy is not None,
        counts="examples" if recipe.counts_examples else "tokens",
        num_trained=tokens.hop,
        num_cumulative=tokens.cumulative,
        quantised="",
        origins=(),
    )
    return _with_origins(recipe, provenance, first)


def provenance_of_copy(
    recipe: Recipe,
    members: Sequence[ResolvedMember],
    owner: str,
    copy: RoundedCopy,
    parent: str,
    tokens: Tokens,
) -> Provenance:
    """The provenance of a copy in fewer bits, made from a member or from the parent (`owner`)."""
    member = next((entry for entry in members if entry.name == owner), None)
    first = None if member is None else _first(members, member)
    trained = tokens.hop > 0
    provenance = Provenance(
        name=copy.name,
        parent=public_model(parent),
        start="copy",
        start_from=owner,
        derived_from=_derived_from(first),
        base_model=_base_model(recipe, first),
        licence="",
        taught_by="parent" if trained else "none",
        teacher=public_model(parent) if trained else "",
        text_by=_writer(recipe, parent) if trained else "",
        text_share=recipe.distill.cross_entropy_weight if trained and recipe.distill else 0.0,
        on_policy=False,
        counts="examples" if recipe.counts_examples else "tokens",
        num_trained=tokens.hop,
        num_cumulative=tokens.cumulative,
        quantised=copy.kind,
        origins=(),
    )
    provenance = _with_origins(recipe, provenance, first)
    if member is None:
        return provenance
    learned = provenance_of(recipe, members, member, parent, tokens).origins  # what its owner has learned is in it
    names = {origin["name"] for origin in learned}
    further = (origin for origin in provenance.origins if origin["name"] not in names)
    return replace(provenance, origins=(*learned, *further))


def _first(members: Sequence[ResolvedMember], member: ResolvedMember) -> ResolvedMember | None:
    """The first member of a chain of cuts, which itself is not cut; None where the chain begins at the parent."""
    by_name = {entry.name: entry for entry in members}
    while member.seed in by_name:
        member = by_name[member.seed]
    return None if member.seed == "parent" else member


def _derived_from(first: ResolvedMember | None) -> Any:
    return "parent" if first is None else first.member.start


def _base_model(recipe: Recipe, first: ResolvedMember | None) -> str:
    reference = recipe.parent.model if first is None else first.member.student
    hub = reference and not reference.startswith("builtin:") and not is_local(reference)
    return reference.partition("@")[0] if hub else ""


def _teacher(recipe: Recipe, taught_by: str, parent: str) -> str:
    if taught_by == "parent":
        return public_model(parent)
    return "" if taught_by == "none" else _writer(recipe, parent)


def _writer(recipe: Recipe, parent: str) -> str:
    """The model that wrote the training text; '' where the recipe names no such model."""
    generate = recipe.generate
    if generate is None:
        return ""
    if generate.endpoint is not None:
        return served_model(generate.endpoint.model)
    return public_model(parent if generate.teacher == "parent" else generate.teacher)


def _with_origins(recipe: Recipe, provenance: Provenance, first: ResolvedMember | None) -> Provenance:
    """The provenance with the recipe's models whose terms apply to it, and with the licence of its weights."""
    origins: list[Origin] = []
    for origin in origins_of(recipe):
        if origin.place == "parent":
            if (
                provenance.derived_from == "parent"
                or provenance.taught_by == "parent"
                or provenance.text_by == provenance.parent
            ):
                origins.append(replace(origin, derived=provenance.derived_from == "parent"))
        elif origin.place == "members.student":
            if first is not None and origin.name == first.member.student:
                origins.append(origin)
        elif provenance.text_by:
            origins.append(origin)
    place = {"parent": "parent", "checkpoint": "members.student"}.get(provenance.derived_from)
    licence = next((origin.licence for origin in origins if origin.place == place), "")
    return replace(provenance, licence=licence, origins=tuple(origin.record() for origin in origins))
