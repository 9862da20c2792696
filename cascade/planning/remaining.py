"""What a run directory has already: the shapes that were found for finished members, and the stages that are done."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cascade.planning.family import FoundShape, ResolvedMember
from cascade.planning.inputs import evaluation_settings
from cascade.pruning.plan import load_plan
from cascade.recipe.schema import Recipe
from cascade.runtime.errors import UserError
from cascade.runtime.files import read_json
from cascade.store.commits import INCOMPLETE, MANIFEST, is_committed, stage_key
from cascade.store.stage_table import STAGES

_SETTLED_BY_RUN = ("begin_token", "end_token", "vocab_size")
"""Settings that a recipe may leave to the run."""


def shapes_on_disk(run_folder: Path, names: Sequence[str]) -> dict[str, FoundShape]:
    """The shapes that finished members were cut to."""
    shapes = {}
    for name in names:
        path = run_folder / str(_lineage(run_folder, name).get("plan"))
        if not path.is_file():
            continue
        try:
            plan = load_plan(path)
        except (UserError, OSError, ValueError, KeyError, TypeError):
            continue  # damaged: the run makes it again, and shows which
        hidden = "activation_norm" if plan.rotation is None else "pca"
        shapes[name] = FoundShape(plan.target_dims, hidden)
    return shapes


def remaining_members(run_folder: Path, recipe: Recipe, members: Sequence[ResolvedMember]) -> list[ResolvedMember]:
    """The members with the seconds of only those stages that are not done yet."""
    remaining = []
    for member in members:
        seconds = remaining_seconds(run_folder, recipe, member.name, member.seconds)
        stays = set(seconds) - {"report"}
        if not stays and is_committed(run_folder / "members" / member.name):
            seconds = {}
        remaining.append(replace(member, seconds=seconds))
    return remaining


def remaining_seconds(run_folder: Path, recipe: Recipe, name: str, seconds: Mapping[str, float]) -> dict[str, float]:
    """The estimated seconds of the stages of a member, or of the parent, that are not done yet."""
    done = {stage for stage in STAGES if _is_done(run_folder, recipe, name, stage)}
    if "distill" in done:
        done |= {stage.name for stage in STAGES.values() if stage.before_training}
    elif "distill" in seconds:
        done.discard("evaluate")
    if recipe.ce_learning_rate == "auto" and "ce-rate" not in done:
        done.discard("baseline-ce")
    if "baseline-ce" not in done:
        done.discard("heldout-ce")
    return {stage: value for stage, value in seconds.items() if stage not in done}


def _is_done(run_folder: Path, recipe: Recipe, name: str, stage: str) -> bool:
    """Whether a folder of the stage is there, whole, in today's format, and as the recipe would have it now.

    What else of a recipe a stage depends on cannot have changed in its own run directory.
    """
    for folder in run_folder.glob(f"stages/{name}.{stage}-*"):
        if folder.name.rpartition("-")[0] != f"{name}.{stage}" or not is_committed(folder):
            continue
        try:
            manifest = read_json(folder / MANIFEST)
            same = stage_key(stage, STAGES[stage].format, manifest["settings"], manifest["inputs"]) == manifest["key"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if same and _matches_recipe(recipe, stage, manifest["settings"]) and not (folder / INCOMPLETE).exists():
            return True
    return False


def _matches_recipe(recipe: Recipe, stage: str, settings: dict[str, Any]) -> bool:
    if stage == "evaluate" or stage.startswith("heldout-"):
        expected = json.loads(json.dumps(evaluation_settings(recipe, heldout_only=stage != "evaluate")))
        settled_by_run = {name for name in _SETTLED_BY_RUN if name not in expected}
        return bool({name: value for name, value in settings.items() if name not in settled_by_run} == expected)
    if stage == "baseline-ce" and recipe.ce_learning_rate != "auto":
        return bool(settings["learning_rate"] == recipe.ce_learning_rate)
    return True


def _lineage(run_folder: Path, name: str) -> dict[str, Any]:
    """A finished member's cascade.json; empty where it is not finished."""
    folder = run_folder / "members" / name
    if not is_committed(folder):
        return {}
    try:
        lineage = read_json(folder / "cascade.json")
    except (OSError, ValueError):
        return {}
    return lineage if isinstance(lineage, dict) else {}
