"""When the losses of `distill.features` fall to nothing, for each member: known from its size and its tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

from cascade.models.architecture.sized import Sized
from cascade.planning.family import ResolvedMember, is_cut_from_parent
from cascade.recipe.schema import Recipe


def fading_record(recipe: Recipe, members: Sequence[ResolvedMember]) -> dict[str, Any]:
    """{'setting': the recipe's fade_fraction, 'members': {name: what it comes to}}, without those whose losses stay."""
    by_name = {member.name: member for member in members}
    fractions = {member.name: fade_fraction_of(recipe, member, by_name) for member in members}
    return {
        "setting": None if recipe.distill is None else recipe.distill.features.fade_fraction,
        "members": {name: fraction for name, fraction in fractions.items() if fraction is not None},
    }


def fade_fraction_of(recipe: Recipe, member: ResolvedMember, by_name: Mapping[str, ResolvedMember]) -> float | None:
    """Over this many times its steps a member's feature losses fall to nothing; None: it has none, or they stay."""
    settings = recipe.distill
    if settings is None or settings.teacher != "parent" or not member.num_tokens:
        return None
    cut = is_cut_from_parent(member, by_name)
    features = settings.features
    if settings.hidden_features(cut) == features.embedding == "none" and not features.relations:
        return None
    size = member.sized.num_parameters
    share = size / Sized(member.parent_config).num_parameters
    return settings.fade_fraction(member.num_tokens / size, share, guided=cut and recipe.task == "language")
