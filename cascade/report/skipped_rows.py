"""Rows of the data that a run could not use and left out."""

from pathlib import Path
from typing import Any

from cascade.report.tables import Table
from cascade.runtime.files import read_json

SKIPPED = "skipped.json"
"""A stage's file with `rows`, `skipped`, `empty` and `named`; the run directory's has such a record for each text."""

_SHOWN = 20
"""The number of rows of a text that a report lists."""


def load_skipped(run_folder: Path) -> dict[str, Any]:
    """The record of the rows that a run left out; empty where it used all rows."""
    path = run_folder / SKIPPED
    skipped: dict[str, Any] = read_json(path) if path.is_file() else {}
    return skipped


def merged_skipped(folders: dict[str, Path]) -> dict[str, Any]:
    """The skipped rows of several stages, by name; without stages that used all rows, and with each row once."""
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
    """For each text how many rows were left out, then the first of them by file and line."""
    table = [["", "row", "why"]]
    for name, counts in skipped.items():
        table.append([name, f"{counts['skipped']:,} of {counts['rows']:,} rows left out", ""])
        table += [["", row["place"], row["reason"]] for row in counts["named"][:_SHOWN]]
    return table
