"""Decode latency as a target: measured once for a run and kept in its directory, so that a shape stays what it was."""

import json
from pathlib import Path
from typing import Any

from cascade.family import hidden_score, shape_config, target_of
from cascade.pruning.latency import DecodeLatency, corrected, fit_decode_latency
from cascade.recipe.schema import Recipe
from cascade.store import is_committed, stage_key, staged

_FORMAT = 1
_FILE = "latency.json"


def find_latencies(recipe: Recipe, parent_config: Any, folder: Path) -> dict[str, DecodeLatency]:
    """By member with a target in decode_ms: as the run directory has them, or measured now.

    Raises:
        UserError: the parent does not decode, or not at the target's context.
    """
    targets = {
        member.name: target_of(member)
        for member in recipe.members
        if member.target is not None and member.target.decode_ms is not None
    }
    if not targets:
        return {}
    kept = _folder(recipe, parent_config, folder)
    if is_committed(kept):
        values = json.loads((kept / _FILE).read_text())
        return {name: DecodeLatency.from_dict(one) for name, one in values.items()}
    shaped = shape_config(parent_config, hidden_score(recipe.prune.hidden, parent_config))
    fits: dict[tuple[int, int], DecodeLatency] = {}
    found = {}
    for name, target in targets.items():
        at = (target.context, target.batch_size)
        if at not in fits:
            fits[at] = fit_decode_latency(parent_config, context=target.context, batch_size=target.batch_size)
        found[name] = corrected(fits[at], shaped, target, parent=parent_config)
    return found


def keep_latencies(recipe: Recipe, parent_config: Any, folder: Path, latencies: dict[str, DecodeLatency]) -> None:
    """Commit what was measured to the run directory, unless it has it."""
    kept = _folder(recipe, parent_config, folder)
    if latencies and not is_committed(kept):
        with staged(kept, {"stage": "latency"}) as staging:
            values = {name: latency.as_dict() for name, latency in latencies.items()}
            (staging / _FILE).write_text(json.dumps(values, indent=1) + "\n")


def _folder(recipe: Recipe, parent_config: Any, folder: Path) -> Path:
    targets = {member.name: member.target.model_dump() for member in recipe.members if member.target is not None}
    settings = {"targets": targets, "hidden": recipe.prune.hidden, "parent": parent_config.to_json_string()}
    return folder / "stages" / f"parent.latency-{stage_key('latency', _FORMAT, settings, {})[:16]}"
