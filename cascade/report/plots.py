"""Curves as inline SVG: no library, no script, no request."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from cascade.report.records import Family, Row, find_metric

_WIDTH, _HEIGHT = 640, 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 150, 30, 48
COLOURS = ("#2456a6", "#c8401e", "#2a7f4f", "#8a4fa8", "#a67c00", "#00808a", "#b8447f", "#5f6b76", "#86a83a", "#6d4c2f")


@dataclass(frozen=True)
class Point:
    """A point of a series."""

    x: float
    y: float
    error: float | None
    """Half the length of the error bar."""
    label: str


@dataclass(frozen=True)
class Series:
    """Points in the same colour, with a name for the legend."""

    name: str
    points: list[Point]
    joined: bool = True


def size_quality_curve(families: Sequence[Family], metric: str) -> str:
    """A metric against parameters, one series per family and role, with 95% error bars; '' if no row has the metric.

    Members are joined with the parent; baselines stand beside them unjoined.
    """
    series = []
    for family in families:
        prefix = f"{family.name} " if len(families) > 1 else ""
        groups: dict[str, list[Row]] = {}
        for row in family.rows:
            groups.setdefault(_group(row), []).append(row)
        for group, rows in groups.items():
            points = [point for row in rows if (point := _point(row, metric)) is not None]
            if points:
                name = prefix + (group or ("members" if not prefix else ""))
                series.append(Series(name.strip(), sorted(points, key=lambda point: point.x), joined=not group))
    return line_chart(series, x_title="parameters", y_title=metric, log_x=True)


def candidate_chart(rows: Sequence[Row]) -> str:
    """KL to the teacher against parameters outside embeddings, for each shape of a search; '' without such shapes."""
    series = []
    for name, stage in (("cut and repaired", "repaired"), ("recovered shortly", "recovered")):
        points = [
            Point(row.num_parameters_non_embedding, losses.kl_to_teacher, None, _shape_label(row))
            for row in rows
            if row.role == "candidate" and (losses := getattr(row.stages, stage)) and losses.kl_to_teacher is not None
        ]
        series.append(Series(name, sorted(points, key=lambda point: point.x), joined=False))
    return line_chart(
        series,
        x_title="parameters outside embeddings",
        y_title="selection KL to the teacher (nats per token)",
        log_x=True,
    )


def _shape_label(row: Row) -> str:
    dims, mark = row.dims, "*" if row.status == "chosen" else ""
    return f"{dims['num_hidden_layers']}x{dims['hidden_size']}x{dims['intermediate_size']}{mark}"


def training_curves(curves: dict[str, list[dict[str, float]]]) -> str:
    """KL to the teacher on selection text against training tokens, one series per member; '' without any points."""
    series = [
        Series(
            name,
            [Point(e["num_tokens"], e["selection_kl"], None, "") for e in curve if e.get("selection_kl")],
        )
        for name, curve in curves.items()
    ]
    series = [curve for curve in series if curve.points]
    return line_chart(
        series, x_title="training tokens", y_title="selection KL to the teacher (nats per token)", log_x=False
    )


def line_chart(series: Sequence[Series], *, x_title: str, y_title: str, log_x: bool) -> str:
    """An SVG with axes, error bars, labels and a legend; '' without points."""
    points = [point for line in series for point in line.points]
    if not points:
        return ""
    to_x = _scale([_axis_value(point.x, log_x) for point in points], _LEFT, _WIDTH - _RIGHT, pad=0.08)
    ends = [point.y + sign * (point.error or 0) for point in points for sign in (-1, 1)]
    to_y = _scale(ends, _HEIGHT - _BOTTOM, _TOP, pad=0.08)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(y_title)} against {escape(x_title)}" font-family="sans-serif" font-size="11">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        *_axes(points, ends, to_x, to_y, x_title, y_title, log_x),
    ]
    for number, line in enumerate(series):
        parts += _draw(line, COLOURS[number % len(COLOURS)], to_x, to_y, log_x)
        y = _TOP + 16 * number
        parts.append(f'<circle cx="{_WIDTH - _RIGHT + 14}" cy="{y}" r="4" fill="{COLOURS[number % len(COLOURS)]}"/>')
        parts.append(f'<text x="{_WIDTH - _RIGHT + 24}" y="{y + 4}">{escape(line.name)}</text>')
    return "\n".join([*parts, "</svg>"])


def _group(row: Row) -> str:
    if row.role in ("teacher", "member"):
        return ""
    if row.role == "quantised":
        return row.status
    if row.role == "baseline":
        return {"cut only": "without recovery", "cut and repaired": "repaired only"}.get(row.status, "cross-entropy")
    return "other"


def _point(row: Row, name: str) -> Point | None:
    metric = find_metric(row, name)
    if metric is not None and metric.value is not None:
        return Point(row.num_parameters, metric.value, 1.96 * metric.stderr if metric.stderr else None, row.name)
    # The teacher's divergence from itself is 0 by definition and is not measured.
    if row.role == "teacher" and name == "heldout/kl_to_teacher":
        return Point(row.num_parameters, 0.0, None, row.name)
    return None


def _axis_value(x: float, log_x: bool) -> float:
    return math.log10(max(x, 1)) if log_x else x


def _scale(values: list[float], start: float, end: float, *, pad: float) -> Any:
    low, high = min(values), max(values)
    margin = (high - low) * pad or abs(high) * 0.1 or 1.0
    low, high = low - margin, high + margin
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _axes(
    points: list[Point], ends: list[float], to_x: Any, to_y: Any, x_title: str, y_title: str, log_x: bool
) -> list[str]:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = [
        f'<path d="M{_LEFT} {_TOP}V{bottom}H{right}" fill="none" stroke="#444"/>',
        f'<text x="{(_LEFT + right) / 2}" y="{_HEIGHT - 10}" text-anchor="middle">{escape(x_title)}</text>',
        f'<text transform="translate(14 {(_TOP + bottom) / 2}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_title)}</text>",
    ]
    ticks = sorted({point.x for point in points}) if log_x else _round_ticks([point.x for point in points])
    previous = -math.inf
    for tick in ticks:
        x = to_x(_axis_value(tick, log_x))
        if x - previous >= 40:
            parts.append(f'<path d="M{x:.1f} {bottom}v5" stroke="#444"/>')
            parts.append(f'<text x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{short_number(tick)}</text>')
            previous = x
    for tick in _round_ticks(ends):
        y = to_y(tick)
        if _TOP <= y <= bottom:
            parts.append(f'<path d="M{_LEFT} {y:.1f}H{right}" stroke="#e4e4e4"/>')
            parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    return parts


def _draw(series: Series, colour: str, to_x: Any, to_y: Any, log_x: bool) -> list[str]:
    places = [(to_x(_axis_value(point.x, log_x)), to_y(point.y), point) for point in series.points]
    parts = []
    if series.joined and len(places) > 1:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in places)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
    for x, y, point in places:
        if point.error:
            low, high = to_y(point.y - point.error), to_y(point.y + point.error)
            parts.append(
                f'<path d="M{x:.1f} {low:.1f}V{high:.1f}M{x - 4:.1f} {low:.1f}h8M{x - 4:.1f} {high:.1f}h8" '
                f'stroke="{colour}"/>'
            )
        if len(places) < 40:
            title = f"{point.label} {point.y:.4g}".strip()
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"><title>{escape(title)}</title></circle>'
            )
        if point.label and series.joined:
            parts.append(f'<text x="{x + 6:.1f}" y="{y - 7:.1f}" fill="{colour}">{escape(point.label)}</text>')
    return parts


def _round_ticks(values: list[float], count: int = 6) -> list[float]:
    low, high = min(values), max(values)
    raw = (high - low) / count or abs(high) / 2 or 1.0
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def minutes(seconds: float) -> str:
    """Seconds in the unit that reads best: '45 s', '2.5 min', '1.8 h'."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def short_number(number: float) -> str:
    """A number in three digits and a letter: 1,234,567 as '1.23M'."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"
