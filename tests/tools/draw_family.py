"""python tests/tools/draw_family.py: docs/images/stories.svg, the curve of the stories family on the README's first page.

The figures are those of recipes/experiments/results/stories, and the curve is drawn by the report's code.
"""

import json
from pathlib import Path
from typing import Any

from cascade.report.plots import Point, Series, line_chart

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "recipes" / "experiments" / "results" / "stories"
PICTURE = ROOT / "docs" / "images" / "stories.svg"


def picture() -> str:
    """Held-out loss against parameters, with 95% error bars."""
    default, random_start = rows_of("default-s0-400000"), rows_of("random-start-s0-400000")
    series = [
        Series("cascade", [point(row, label=row["name"]) for row in default if row["kind"] in ("parent", "member")]),
        Series("cross-entropy", [point(row) for row in default if row["kind"] == "ce"]),
        Series("random start, distilled", [point(row) for row in random_start if row["kind"] == "member"]),
    ]
    ordered = [Series(line.name, sorted(line.points, key=lambda point: point.x)) for line in series]
    return line_chart(ordered, x_title="parameters", y_title="held-out loss (nats per token)", log_x=True) + "\n"


def rows_of(cell: str) -> list[dict[str, Any]]:
    """The rows of a cell of the experiment."""
    return json.loads((RESULTS / f"{cell}.json").read_text())["rows"]


def point(row: dict[str, Any], label: str = "") -> Point:
    """A row's held-out loss at its size."""
    (loss,) = [part for part in row["metrics"] if (part["task"], part["metric"]) == ("heldout", "loss")]
    return Point(row["num_parameters"], loss["value"], 1.96 * loss["stderr"], label)


if __name__ == "__main__":
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    PICTURE.write_text(picture())
