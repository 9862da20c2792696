"""Which recipe a run directory belongs to, and what of it is already settled."""

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cascade.planning.family import ResolvedMember
from cascade.recipe.distill import WITHOUT_EFFECT
from cascade.recipe.generate import HOW_ASKED
from cascade.recipe.places import PUBLIC
from cascade.recipe.schema import Recipe
from cascade.runtime.errors import UserError
from cascade.store.lock import LOCK
from cascade.store.strict_yaml import read_yaml

_MAY_CHANGE = (
    "output",
    "evaluate",
    "baselines",
    "parent.pretrain.microbatch_size",
    "data.production",
    "acknowledged",
    "finish",
    "distill.cache.folder",
    *(f"generate.endpoint.{key}" for key in HOW_ASKED),
    *(f"distill.{key}" for key in WITHOUT_EFFECT),
)
"""Keys whose change loses no finished training: what is measured, and how much memory a step takes."""


def resolved_recipe(recipe: Recipe, members: list[ResolvedMember], *, public: bool = False) -> dict[str, Any]:
    """The recipe with every default written out and every member's seed by name.

    A `public` one has names instead of paths: it is copied into cards.
    """
    record = recipe.model_dump(mode="json", context=PUBLIC if public else None)
    seeds = {member.name: member.seed for member in members}
    for member in record["members"]:
        if member["name"] in seeds:
            member["seed"] = seeds[member["name"]] or "previous"
    resolved: dict[str, Any] = _without_nulls(record)
    return resolved


def pinned_seeds(folder: Path) -> dict[str, str]:
    """Member -> seed, of the members that a run directory already knows."""
    return {
        member["name"]: member["seed"]
        for member in _recorded_recipe(folder).get("members", [])
        if member["seed"] != "previous"
    }


def check_ownership(folder: Path, recipe: Recipe) -> None:
    """Refuse a directory that another recipe made; new members and other evaluations are welcome.

    Raises:
        UserError: with the keys that differ, or because the directory holds something else.
    """
    try:
        known = (folder / "recipe.yaml").exists()
    except OSError as error:  # a name too long for the file system, a folder that may not be looked into
        raise UserError(f"{folder}: cannot be written to: {error.strerror}; give another --output") from error
    if not known:
        if folder.is_file() or (folder.is_dir() and any(not _left_by_a_start(path) for path in folder.iterdir())):
            raise UserError(f"{folder}: holds something that is not a run of this program; give another --output")
        return
    if not any(folder.glob("stages/*/MANIFEST.json")):
        return  # nothing was finished: whatever stopped that run may be mended
    before, now = _flat(_recorded_recipe(folder)), _flat(_without_nulls(recipe.model_dump(mode="json")))
    new_members = {member.name for member in recipe.members} - pinned_names(folder)
    differing = []
    # Until something has read the text, it may become another: the answers themselves are kept apart.
    unread = () if any(folder.glob("stages/parent.data-*/MANIFEST.json")) else ("generate.", "distill.teacher")
    for key in sorted(before.keys() | now.keys()):
        if key.startswith(_MAY_CHANGE + unread) or before.get(key) == now.get(key):
            continue
        parts = key.split(".")
        if parts[0] == "members" and (parts[1] in new_members or (parts[-1] == "seed" and now.get(key) == "previous")):
            continue
        differing.append(f"{key}: {before.get(key, 'absent')!r} there, {now.get(key, 'absent')!r} now")
    if differing:
        raise UserError(
            f"{folder}: belongs to another recipe; nothing was touched. What differs:\n  "
            + "\n  ".join(differing)
            + "\nGive another --output, or remove the directory."
        )


def _left_by_a_start(path: Path) -> bool:
    """Whether a run that died before it wrote its recipe can have left this file."""
    return path.is_file() and path.name.startswith((LOCK, f".{LOCK}-", ".recipe.yaml-"))


def pinned_names(folder: Path) -> set[str]:
    """Names of the members that a run directory already knows."""
    return {member["name"] for member in _recorded_recipe(folder).get("members", [])}


def _recorded_recipe(folder: Path) -> dict[str, Any]:
    path = folder / "recipe.yaml"
    if not path.exists():
        return {}
    try:
        # Through the schema, so that keys that are newer than the record have their defaults.
        recipe = Recipe.model_validate(read_yaml(path).data)
    except ValidationError as error:
        raise UserError(f"{path}: was written by another version of this program; give another --output") from error
    record: dict[str, Any] = _without_nulls(recipe.model_dump(mode="json"))
    return record


def _flat(record: Any, prefix: str = "") -> dict[str, Any]:
    """{'distill.tokens': ...}; members by name, other lists whole."""
    if not isinstance(record, dict):
        return {prefix: record}
    flat: dict[str, Any] = {}
    for key, value in record.items():
        place = f"{prefix}.{key}" if prefix else key
        if place == "members":
            for member in value:
                flat |= _flat(member, f"members.{member['name']}")
        else:
            flat |= _flat(value, place)
    return flat


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value
