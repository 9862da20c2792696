"""What a family's teacher was asked for, what keeping its answers cost, and what that saved."""

import json
from pathlib import Path
from typing import Any

from cascade.report.tables import Table

TARGETS = "targets.json"
"""In the run directory: {'kind', 'why', 'root', 'members': {name: what its labelling and its reading came to}}."""


def load_targets(run_folder: Path) -> dict[str, Any]:
    """What a run has written; empty where its teacher was asked each time."""
    path = run_folder / TARGETS
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


def targets_table(targets: dict[str, Any]) -> Table:
    """A row a member: tokens that the teacher labelled for it, seconds, and what reading them again saved."""
    members: dict[str, dict[str, Any]] = targets.get("members", {})
    head = ["", "tokens read", "labelled for it", "seconds", "saved, about", "angle of the gradient", "KL of rounding"]
    table = [head]
    rate = _seconds_per_token(members)
    for name, one in members.items():
        saved = None if rate is None else rate * one["tokens_read"] - one["seconds"]
        angles = one.get("angles_degrees") or []
        table.append(
            [
                name,
                f"{one['tokens_read']:,}",
                f"{one['tokens']:,}",
                f"{one['seconds']:.1f}",
                "" if saved is None else f"{saved:.1f} s",
                ", ".join(f"{angle:.1f}°" for angle in angles),
                "" if one.get("rounding_kl") is None else f"{one['rounding_kl']:.1e}",
            ]
        )
    return table


def targets_sentence(targets: dict[str, Any]) -> str:
    """What was kept, and how much of it."""
    members = targets.get("members", {})
    held = max((one["num_bytes"] for one in members.values()), default=0)
    made, read = (sum(one[name] for one in members.values()) for name in ("tokens", "tokens_read"))
    return (
        f"Targets: {targets['kind']} ({targets['why']}). The teacher labelled {made:,} tokens for {read:,} that were "
        f"read; {held / 1e6:,.0f} MB on disk under root {targets['root'][:16]}."
    )


def _seconds_per_token(members: dict[str, dict[str, Any]]) -> float | None:
    """Of the teacher, as its labelling took; None where all was there before."""
    made = sum(one["tokens"] for one in members.values())
    return sum(one["seconds"] for one in members.values() if one["tokens"]) / made if made else None
