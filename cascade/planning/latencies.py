"""Decode latency as a target: measured once for a run and kept in its directory, so that a shape stays what it was."""

import json
from pathlib import Path
from typing import Any

from cascade.planning.family import hidden_score, shape_config, target_of
from cascade.pruning.size.latency import DecodeLatency, corrected, fit_decode_latency
from cascade.recipe.schema import Member, Recipe
from cascade.runtime.files import read_json
from cascade.store.commits import stage_key, staged, verify_folder

_FORMAT = 1
_FILE = "latency.json"


def find_latencies(recipe: Recipe, parent_config: Any, folder: Path) -> dict[str, DecodeLatency]:
    """Member with a target in decode_ms -> its latency, from the run directory or measured now.

    Raises:
        UserError: the parent does not decode, or not at the target's context.
    """
    shaped = shape_config(parent_config, hidden_score(recipe.prune.hidden, parent_config))
    fits: dict[tuple[int, int], DecodeLatency] = {}
    latencies = {}
    for member in recipe.members:
        if member.target is None or member.target.decode_ms is None:
            continue
        stage_folder = _folder(recipe, member, parent_config, folder)
        if stage_folder.exists() and not verify_folder(stage_folder):
            record = read_json(stage_folder / _FILE)
            latencies[member.name] = DecodeLatency.from_dict(record)
            continue
        target = target_of(member)
        at = (target.context, target.batch_size)
        if at not in fits:
            fits[at] = fit_decode_latency(parent_config, context=target.context, batch_size=target.batch_size)
        latencies[member.name] = corrected(fits[at], shaped, target, parent=parent_config)
    return latencies


def keep_latencies(recipe: Recipe, parent_config: Any, folder: Path, latencies: dict[str, DecodeLatency]) -> None:
    """Commit measured latencies to the run directory, unless it has them already."""
    for member in recipe.members:
        stage_folder = _folder(recipe, member, parent_config, folder)
        if member.name in latencies and (not stage_folder.exists() or verify_folder(stage_folder)):
            with staged(stage_folder, {"stage": "latency"}) as staging:
                (staging / _FILE).write_text(
                    json.dumps(latencies[member.name].as_dict(), indent=1) + "\n", encoding="utf-8"
                )


def _folder(recipe: Recipe, member: Member, parent_config: Any, folder: Path) -> Path:
    """The stage folder of one member's latency, so that a member added later does not have others measured again."""
    settings = {
        "target": member.target.model_dump() if member.target else None,
        "hidden": recipe.prune.hidden,
        "parent": parent_config.to_json_string(),
    }
    return folder / "stages" / f"{member.name}.latency-{stage_key('latency', _FORMAT, settings, {})[:16]}"
