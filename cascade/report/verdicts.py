"""Whether a member is good enough, by the thresholds of the recipe's `evaluate.at_least`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cascade.report.records import Row, find_metric
from cascade.report.tables import Table
from cascade.runtime.files import read_json

VERDICTS = "verdicts.json"

Verdict = dict[str, Any]
"""`row`, `metric`, `wanted` (the threshold), `value`, `stderr`, and `good`, None where the metric was not measured."""


def judge(rows: Sequence[Row], thresholds: Mapping[str, float]) -> list[Verdict]:
    """A verdict on the teacher and each member for each threshold, a minimum or, where lower is better, a maximum."""
    verdicts: list[Verdict] = []
    for row in rows:
        if row.role not in ("teacher", "member", "quantised"):
            continue
        for name, threshold in thresholds.items():
            metric = find_metric(row, name)
            value = None if metric is None else metric.value
            good = None
            if metric is not None and value is not None:
                good = bool(value >= threshold if metric.higher_is_better else value <= threshold)
            verdicts.append(
                {
                    "row": row.name,
                    "metric": name,
                    "wanted": threshold,
                    "value": value,
                    "stderr": None if metric is None else metric.stderr,
                    "good": good,
                }
            )
    return verdicts


def verdict_table(verdicts: Sequence[Verdict]) -> Table:
    """A line per verdict; it says where a value lies within two standard errors of its threshold."""
    table = [["", "metric", "wanted", "found", "good enough"]]
    for verdict in verdicts:
        answer = "not measured" if verdict["good"] is None else "yes" if verdict["good"] else "no"
        if (
            verdict["value"] is not None
            and verdict["stderr"]
            and abs(verdict["value"] - verdict["wanted"]) < 2 * verdict["stderr"]
        ):
            answer += ", but within two standard errors"
        measured = "" if verdict["value"] is None else f"{verdict['value']:.4g}"
        measured += f" ± {verdict['stderr']:.2g}" if verdict["stderr"] else ""
        table.append([verdict["row"], verdict["metric"], f"{verdict['wanted']:g}", measured, answer])
    return table


def load_verdicts(run_folder: Path) -> list[Verdict]:
    """The verdicts of a run; empty where its recipe has no thresholds."""
    path = run_folder / VERDICTS
    verdicts: list[Verdict] = read_json(path) if path.is_file() else []
    return verdicts
