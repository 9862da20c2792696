"""The report's long tail: losses by the teacher's entropy, and the slices of text with the largest losses."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cascade.report.tables import Table
from cascade.runtime.files import read_json

TAIL = "tail.json"

Tails = Mapping[str, dict[str, Any]]
"""The `long_tail` of each row, by the row's name."""


def load_tails(run_folder: Path) -> dict[str, dict[str, Any]]:
    """The long tails of a run's rows, by the row's name; empty before the first member is made."""
    path = run_folder / TAIL
    tails: dict[str, dict[str, Any]] = read_json(path) if path.is_file() else {}
    return tails


def decile_table(tails: Tails) -> Table:
    """Each row's loss in each tenth of the held-out text, by the teacher's entropy; the teacher's figures first."""
    if not tails:
        return []
    most = max(len(tail["deciles"]) for tail in tails.values())
    table = [
        ["loss where the teacher is …", "surest", *[str(number) for number in range(2, most)], "least sure"][: most + 1]
    ]
    for number, (name, tail) in enumerate(tails.items()):
        if number == 0:
            table.append(["teacher's entropy", *(f"{tenth['entropy']:.3f}" for tenth in tail["deciles"])])
            table.append(["teacher", *(f"{tenth['teacher_loss']:.3f}" for tenth in tail["deciles"])])
        table.append([name, *(f"{tenth['loss']:.3f}" for tenth in tail["deciles"])])
    return table


def slice_table(tails: Tails) -> Table:
    """The slices on which each row's loss is farthest above the teacher's, with their first words."""
    table = [["", "slice", "loss", "teacher", "tokens or examples"]]
    for name, tail in tails.items():
        for part in tail["slices"]:
            counted = f"{part['count']:,}"
            table.append([name, part["slice"], f"{part['loss']:.3f}", f"{part['teacher_loss']:.3f}", counted])
    return table
