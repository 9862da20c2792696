"""The rows of a family as records, and family.json and family.csv, which hold them for other programs.

The schema of family.json is family.schema.json beside this file.
"""

import csv
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from cascade.runtime.errors import UserError
from cascade.runtime.files import read_json

VERSION = 1

Role = Literal["teacher", "member", "candidate", "baseline", "quantised"]
"""candidate: a shape that a search tried; baseline: a model that a member is compared with; quantised: a copy of a
member, or of the teacher, in fewer bits."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A number about a model, with what a reader needs to judge it; None: not known or not measured."""

    task: str
    """'heldout', 'production' or the name of an lm-eval task."""
    metric: str
    filter: str | None = None
    """The filter that lm-eval applies to answers; None for other tasks."""
    value: float | None
    stderr: float | None = None
    """Standard error of the value."""
    n: int | None = None
    """Tokens, examples or items that the value is taken over."""
    higher_is_better: bool | None = None
    chance: float | None = None
    """The score of guessing at random."""
    num_fewshot: int | None = None
    limit: float | None = None
    """The number of items that a task was limited to."""
    retention: float | None = None
    """(member - chance) / (parent - chance)."""
    retention_interval: tuple[float, float] | None = None
    """The lower and upper end of the retention's 95% interval."""


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """What a model was trained on, in tokens, or in examples where a task counts those."""

    hop: int = 0
    """Tokens of this model's training alone."""
    cumulative: int = 0
    """Tokens of this model's training and of the trainings of all members that it was cut from."""
    teacher_labelled: int = 0
    """Tokens that the teacher gave probabilities for."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What making and measuring a model took; None: not measured."""

    seconds: float | None = None
    flops: float | None = None
    money: float | None = None


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Losses on selection text, in nats per token or example; None: not finite or not measured."""

    loss: float | None = None
    kl_to_teacher: float | None = None


@dataclass(frozen=True, kw_only=True)
class StageLosses:
    """Losses after each stage of making a member; None: the member skipped that stage."""

    cut: Losses | None = None
    repaired: Losses | None = None
    recovered: Losses | None = None


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Speed and memory at batch size 1, measured in a separate process; None: not measured."""

    prefill_tokens_per_s: float | None = None
    decode_tokens_per_s: float | None = None
    peak_memory_bytes: float | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """A model of a family. The fields have the order of family.json."""

    name: str
    role: Role
    status: str
    """done; for candidates, baselines and copies, which kind of these the row is."""
    seed: str | None = None
    """'parent' or the member that this model is cut from; None: it is not cut."""
    checkpoint: str | None = None
    """The checkpoint's folder inside the run directory; None: the model is not published."""
    dims: dict[str, int]
    """The sizes of the architecture, by their names in the config."""
    num_parameters: int
    num_parameters_non_embedding: int
    bytes: int | None = None
    """Size of the weight files."""
    tokens: Tokens = Tokens()
    cost: Cost = Cost()
    stages: StageLosses = StageLosses()
    metrics: tuple[Metric, ...] = ()
    speed: Speed = Speed()


@dataclass(frozen=True)
class Family:
    """The rows of a family.json: the teacher, members, copies, baselines and candidates."""

    name: str
    rows: list[Row]


def load_family(path: str | Path) -> dict[str, Any]:
    """The parsed JSON of a family.json, or of a run directory's family.json; `family_of` turns it into records.

    Raises:
        UserError: the file is missing, or is no family.json of this version.
    """
    path = Path(path)
    path = path / "family.json" if path.is_dir() else path
    try:
        family: dict[str, Any] = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a family.json: {error}") from error
    if family.get("version") != VERSION:
        raise UserError(f"{path}: version {family.get('version')!r}; this program reads version {VERSION}")
    return family


def family_of(family: Mapping[str, Any]) -> Family:
    """The records of a family.json that `load_family` has read."""
    return Family(family["name"], [row_of(row) for row in family["rows"]])


def row_of(row: Mapping[str, Any]) -> Row:
    """The record of a row of a family.json; missing keys count as not measured."""
    values = _known_values(Row, row)
    stages = _known_values(StageLosses, row.get("stages", {}))
    values["stages"] = StageLosses(**{stage: losses_of(losses) for stage, losses in stages.items()})
    values["metrics"] = metrics_of(row.get("metrics", []))
    values["tokens"] = Tokens(**_known_values(Tokens, row.get("tokens", {})))
    values["cost"] = Cost(**_known_values(Cost, row.get("cost", {})))
    values["speed"] = speed_of(row.get("speed", {}))
    return Row(**values)


def losses_of(losses: Mapping[str, Any] | None) -> Losses | None:
    """The record of a stage's losses, from its losses.json or from family.json."""
    return None if losses is None else Losses(**_known_values(Losses, losses))


def speed_of(speed: Mapping[str, Any]) -> Speed:
    """The record of the speed in a stage's cost.json or in family.json; empty: not measured."""
    return Speed(**_known_values(Speed, speed))


def metrics_of(metrics: Iterable[Mapping[str, Any]]) -> tuple[Metric, ...]:
    """The records of the metrics in an eval.json or family.json."""
    records = []
    for metric in metrics:
        interval = metric.get("retention_interval")
        values = _known_values(Metric, metric) | {"retention_interval": tuple(interval) if interval else None}
        records.append(Metric(**values))
    return tuple(records)


def family_json(name: str, rows: Iterable[Row]) -> str:
    """The text of family.json: strict JSON, with null and never NaN."""
    family = {"version": VERSION, "name": name, "rows": [asdict(row) for row in rows]}
    return json.dumps(family, indent=1, allow_nan=False) + "\n"


def family_csv(rows: Iterable[Row]) -> str:
    """One line per row; metrics as task/metric columns with their standard errors and retentions."""
    columns: list[str] = []
    lines = []
    for row in rows:
        line = _csv_line(row)
        columns += [column for column in line if column not in columns]
        lines.append(line)
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def metric_name(metric: Metric) -> str:
    """The metric's name in tables: 'task/metric', followed by lm-eval's filter unless that is 'none'."""
    suffix = "" if metric.filter in (None, "none") else f"/{metric.filter}"
    return f"{metric.task}/{metric.metric}{suffix}"


def find_metric(row: Row, name: str) -> Metric | None:
    """The metric of a row by its name in tables; None where the row lacks it."""
    return next((metric for metric in row.metrics if metric_name(metric) == name), None)


def metric_names(rows: Iterable[Row]) -> list[str]:
    """The names of all metrics that any row has, in order of first appearance."""
    return list(dict.fromkeys(metric_name(metric) for row in rows for metric in row.metrics))


def _known_values(record: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that the record has a field for."""
    return {field.name: values[field.name] for field in fields(record) if field.name in values}


def _csv_line(row: Row) -> dict[str, Any]:
    keys = ("name", "role", "status", "seed", "checkpoint", "num_parameters", "num_parameters_non_embedding", "bytes")
    line: dict[str, Any] = {key: getattr(row, key) for key in keys} | row.dims
    line |= {f"tokens_{key}": value for key, value in vars(row.tokens).items()}
    line |= {f"cost_{key}": value for key, value in vars(row.cost).items()}
    for stage, losses in vars(row.stages).items():
        line |= {f"{stage}_{key}": value for key, value in (vars(losses) if losses else {}).items()}
    for metric in row.metrics:
        name = metric_name(metric)
        line |= {name: metric.value, f"{name}_stderr": metric.stderr, f"{name}_retention": metric.retention}
    return line | vars(row.speed)
