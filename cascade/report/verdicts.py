"""Whether a member is good enough, against thresholds that its maker gave beforehand."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cascade.report.records import Row, find_metric
from cascade.report.tables import Table

VERDICTS = "verdicts.json"

Verdict = dict[str, Any]
"""row, metric, wanted, value, stderr, good (None where it was not measured)"""


def judge(rows: Sequence[Row], thresholds: Mapping[str, float]) -> list[Verdict]:
    """A verdict for the teacher and each member on each threshold: at least it, or at most where lower is better."""
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
    """One line each; a value within two standard errors of its threshold is said to be uncertain."""
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
    """What a run wrote; nothing where it had no thresholds."""
    path = run_folder / VERDICTS
    verdicts: list[Verdict] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    return verdicts
