"""Rows of the data that could not be used and were left out of a run."""

import json
from pathlib import Path
from typing import Any

from cascade.report.tables import Table

SKIPPED = "skipped.json"
"""In a stage's folder: {'rows', 'skipped', 'empty', 'named'}; in the run directory: {name of the text: that}."""

_SHOWN = 20
"""Rows of a text that a report names."""


def load_skipped(run_folder: Path) -> dict[str, Any]:
    """What a run has left out; empty where it has used all rows."""
    path = run_folder / SKIPPED
    skipped: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return skipped


def merged_skipped(folders: dict[str, Path]) -> dict[str, Any]:
    """{name: what the stage in this folder has left out}, of those that have left out any; no row twice."""
    merged: dict[str, Any] = {}
    known: set[str] = set()
    for name, folder in folders.items():
        skipped = load_skipped(folder)
        named = [row for row in skipped.get("named", []) if row["place"] not in known]
        known |= {row["place"] for row in named}
        if named:
            merged[name] = skipped | {
                "named": named,
                "skipped": skipped["skipped"] - len(skipped["named"]) + len(named),
            }
    return merged


def skipped_table(skipped: dict[str, Any]) -> Table:
    """The counts of each text, then the first rows by file and line."""
    table = [["", "row", "why"]]
    for name, counts in skipped.items():
        table.append([name, f"{counts['skipped']:,} of {counts['rows']:,} rows left out", ""])
        table += [["", row["place"], row["reason"]] for row in counts["named"][:_SHOWN]]
    return table
