"""The summary of a finished run, for a terminal and for programs."""

from pathlib import Path
from typing import Any

from cascade.report.production import load_drift, wrong_diet
from cascade.report.records import family_of, load_family
from cascade.report.tables import plain_table, quality_table, size_table
from cascade.report.target_costs import load_targets, targets_sentence
from cascade.report.verdicts import load_verdicts, verdict_table


def run_summary(folder: Path) -> dict[str, Any]:
    """The summary as `cascade run --json` prints it."""
    return {
        "run": str(folder),
        "family": load_family(folder),
        "verdicts": load_verdicts(folder),
        "targets": load_targets(folder) or None,
    }


def run_texts(folder: Path) -> str:
    """The summary for a terminal: sizes, quality, verdicts, cached targets, and where the report is."""
    rows, verdicts, targets = family_of(load_family(folder)).rows, load_verdicts(folder), load_targets(folder)
    tables = [size_table(rows), quality_table(rows), *([verdict_table(verdicts)] if verdicts else [])]
    parts = [plain_table(table) for table in tables]
    parts += [targets_sentence(targets)] if targets else []
    parts += wrong_diet(load_drift(folder), rows)
    return "\n" + "\n\n".join([*parts, f"Report: {folder / 'report.html'}   members: {folder / 'members'}"])
