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


def judge(rows: Sequence[Row], wanted: Mapping[str, float]) -> list[Verdict]:
    """A verdict for the teacher and each member on each threshold: at least it, or at most where lower is better."""
    verdicts: list[Verdict] = []
    for row in rows:
        if row.role not in ("teacher", "member", "quantised"):
            continue
        for name, threshold in wanted.items():
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
    for one in verdicts:
        said = "not measured" if one["good"] is None else "yes" if one["good"] else "no"
        if one["value"] is not None and one["stderr"] and abs(one["value"] - one["wanted"]) < 2 * one["stderr"]:
            said += ", but within two standard errors"
        shown = "" if one["value"] is None else f"{one['value']:.4g}"
        shown += f" ± {one['stderr']:.2g}" if one["stderr"] else ""
        table.append([one["row"], one["metric"], f"{one['wanted']:g}", shown, said])
    return table


def load_verdicts(run_folder: Path) -> list[Verdict]:
    """What a run wrote; nothing where it had no thresholds."""
    path = run_folder / VERDICTS
    found: list[Verdict] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    return found
