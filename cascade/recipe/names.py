"""Names of a family's rows besides its members: baselines, shapes of a search, copies in fewer bits."""

import re
from collections.abc import Iterable
from typing import Any

_SUFFIX = re.compile(r"-(cut|repaired|ce|int[48](?:qat)?|shape\d+(?:_[a-z_]+)?)")


def owner_of(row_name: str, names: Iterable[str]) -> str:
    """The name in `names` of the member that a baseline, shape or copy belongs to; '' where no member fits."""
    owners = [name for name in names if row_name.startswith(name) and _SUFFIX.fullmatch(row_name[len(name) :])]
    return max(owners, key=len, default="")


def require_distinct_rows(recipe: Any) -> None:
    """Refuse a member whose name is that of another member's row; capitals make no difference, as on some disks.

    Raises:
        ValueError: names both.
    """
    for member in recipe.members:
        for owner in ["parent", *(entry.name for entry in recipe.members)]:
            suffix = member.name.lower().removeprefix(owner.lower())
            row_kind = _row_of(recipe, owner, suffix) if suffix != member.name.lower() else ""
            if row_kind:
                raise ValueError(
                    f"members: {member.name}: {owner} has {row_kind} whose row is called so, too; give another name"
                )


def _row_of(recipe: Any, owner: str, suffix: str) -> str:
    """The kind of row that a member's, or the parent's, name with this suffix denotes; '' for no row."""
    if any(suffix == f"-{entry.suffix}" and (not entry.members or owner in entry.members) for entry in recipe.finish):
        return "a copy (`finish`)"
    if owner == "parent":
        return ""
    kinds = [f"-{kind}" for kind in recipe.baseline_kinds]
    if suffix in kinds:
        return f"a baseline ({suffix[1:]})"
    cut = next(entry for entry in recipe.members if entry.name == owner)
    searched = cut.start == "prune" and cut.target.has_bounds()
    return "shapes that are tried," if searched and re.fullmatch(r"-shape\d+(_[a-z_]+)?", suffix) else ""
