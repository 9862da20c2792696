"""The cost of labelling with a family's teacher, and what the cached targets saved."""

from pathlib import Path
from typing import Any

from cascade.report.tables import Table
from cascade.runtime.files import read_json

TARGETS = "targets.json"
"""The file in the run directory: `kind`, `why`, `root`, and `members` with the figures of each member."""


def load_targets(run_folder: Path) -> dict[str, Any]:
    """The figures of a run's cached targets; empty where the run cached none."""
    path = run_folder / TARGETS
    targets: dict[str, Any] = read_json(path) if path.exists() else {}
    return targets


def targets_table(targets: dict[str, Any]) -> Table:
    """A row per member: tokens that the teacher labelled for it, seconds, and the seconds that the cache saved."""
    members: dict[str, dict[str, Any]] = targets.get("members", {})
    head = ["", "tokens read", "labelled for it", "seconds", "saved, about", "angle of the gradient", "KL of rounding"]
    table = [head]
    rate = _seconds_per_token(members)
    for name, costs in members.items():
        saved = None if rate is None else rate * costs["tokens_read"] - costs["seconds"]
        angles = costs.get("angles_degrees") or []
        table.append(
            [
                name,
                f"{costs['tokens_read']:,}",
                f"{costs['tokens']:,}",
                f"{costs['seconds']:.1f}",
                "" if saved is None else f"{saved:.1f} s",
                ", ".join(f"{angle:.1f}°" for angle in angles),
                "" if costs.get("rounding_kl") is None else f"{costs['rounding_kl']:.1e}",
            ]
        )
    return table


def targets_sentence(targets: dict[str, Any]) -> str:
    """The kind and size of the cached targets, as a sentence."""
    members = targets.get("members", {})
    num_bytes = max((costs["num_bytes"] for costs in members.values()), default=0)
    labelled, read = (sum(costs[name] for costs in members.values()) for name in ("tokens", "tokens_read"))
    return (
        f"Targets: {targets['kind']} ({targets['why']}). The teacher labelled {labelled:,} tokens for {read:,} that "
        f"were read; {num_bytes / 1e6:,.0f} MB on disk under root {targets['root'][:16]}."
    )


def _seconds_per_token(members: dict[str, dict[str, Any]]) -> float | None:
    """Seconds per token that the teacher labelled; None where the cache had all targets before the run."""
    num_tokens = sum(costs["tokens"] for costs in members.values())
    return sum(costs["seconds"] for costs in members.values() if costs["tokens"]) / num_tokens if num_tokens else None
