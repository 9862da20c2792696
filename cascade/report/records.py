"""family.json: the rows of a family, as other programs read them (schema: family.schema.json beside this file)."""

import csv
import io
import json
from pathlib import Path
from typing import Any

from cascade.errors import UserError

VERSION = 1

Row = dict[str, Any]


def load_family(path: str | Path) -> dict[str, Any]:
    """A family.json, or that of a run directory.

    Raises:
        UserError: there is none, or it is not one.
    """
    path = Path(path)
    path = path / "family.json" if path.is_dir() else path
    try:
        family: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a family.json: {error}") from error
    if family.get("version") != VERSION:
        raise UserError(f"{path}: version {family.get('version')!r}; this program reads version {VERSION}")
    return family


def family_json(name: str, rows: list[Row]) -> str:
    """Strict JSON: null, never NaN."""
    return json.dumps({"version": VERSION, "name": name, "rows": rows}, indent=1, allow_nan=False) + "\n"


def family_csv(rows: list[Row]) -> str:
    """One line per row; metrics as task/metric columns with their standard errors and retentions."""
    columns: list[str] = []
    lines = []
    for row in rows:
        line: Row = {key: row[key] for key in ("name", "role", "status", "seed", "checkpoint")}
        line |= {key: row[key] for key in ("num_parameters", "num_parameters_non_embedding", "bytes")}
        line |= row["dims"]
        line |= {f"tokens_{key}": value for key, value in row["tokens"].items()}
        line |= {f"cost_{key}": value for key, value in row["cost"].items()}
        for stage, losses in row["stages"].items():
            line |= {f"{stage}_{key}": value for key, value in (losses or {}).items()}
        for metric in row["metrics"]:
            name = metric_name(metric)
            line |= {
                name: metric["value"],
                f"{name}_stderr": metric["stderr"],
                f"{name}_retention": metric["retention"],
            }
        line |= row["speed"]
        columns += [column for column in line if column not in columns]
        lines.append(line)
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def metric_name(metric: dict[str, Any]) -> str:
    """'task/metric', with the filter where lm-eval has one that is not 'none'."""
    suffix = "" if metric["filter"] in (None, "none") else f"/{metric['filter']}"
    return f"{metric['task']}/{metric['metric']}{suffix}"


def find_metric(row: Row, name: str) -> dict[str, Any] | None:
    """The metric of that name, or None."""
    return next((metric for metric in row["metrics"] if metric_name(metric) == name), None)


def metric_names(rows: list[Row]) -> list[str]:
    """All metrics that any row has, in order of first appearance."""
    return list(dict.fromkeys(metric_name(metric) for row in rows for metric in row["metrics"]))
