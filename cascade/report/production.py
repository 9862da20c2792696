"""Whether the recipe's text resembles production text, and how well the members do on production text."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cascade.report.records import Row, find_metric
from cascade.report.tables import Table
from cascade.runtime.files import read_json

DRIFT = "drift.json"

FARTHER = 1.5
"""KL to the teacher on production text above this multiple of the KL on held-out text: the wrong training text."""

UNLIKE = 1.5
"""Divergence of production text from training text, above this multiple of held-out text's: it is other text."""

WORSE = 1.3
"""A teacher's loss on production text above this multiple of its held-out loss: it does not know such text well."""


def load_drift(run_folder: Path) -> dict[str, Any]:
    """The drift that a run measured; empty without `data.production`."""
    path = run_folder / DRIFT
    drift: dict[str, Any] = read_json(path) if path.is_file() else {}
    return drift


def production_table(drift: dict[str, Any], rows: Sequence[Row]) -> Table:
    """Figures of held-out text beside those of production text: of the teacher, the texts and each member."""
    kinds = ("heldout", "production")
    table = [["", "held-out text", "production text"]]
    table.append(["teacher's loss", *(f"{drift['teacher'][kind]['loss']:.3f}" for kind in kinds)])
    table.append(["teacher's entropy", *(f"{drift['teacher'][kind]['entropy']:.3f}" for kind in kinds)])
    table.append(["letters of a document, median", *(f"{drift['letters'][kind]['median']:,.0f}" for kind in kinds)])
    table.append(["… 90th percentile", *(f"{drift['letters'][kind]['p90']:,.0f}" for kind in kinds)])
    texts = [drift["text"][kind] for kind in kinds]
    table.append(["tokens unlike training text (JSD, nats)", *(f"{text['unigram_jsd']:.3f}" for text in texts)])
    table.append(["runs of 3 tokens not in training text", *(f"{text['new_trigrams']:.0%}" for text in texts)])
    for row in rows:
        for name, title in (("loss", "loss"), ("kl_to_teacher", "KL to the teacher")):
            values = [metric.value for kind in kinds if (metric := find_metric(row, f"{kind}/{name}"))]
            if len(values) == len(kinds) and row.role in ("member", "quantised"):
                table.append([f"{row.name}: {title}", *(f"{value:.3f}" for value in values)])
    return table


def wrong_diet(drift: dict[str, Any], rows: Sequence[Row]) -> list[str]:
    """Warnings about the recipe's text, one sentence each; empty where the text is suitable."""
    if not drift:
        return []
    warnings = []
    ratio = drift["text"]["production"]["unigram_jsd"] / max(drift["text"]["heldout"]["unigram_jsd"], 1e-9)
    if ratio > UNLIKE:
        warnings.append(
            f"Production text is {ratio:.1f} times as unlike the training text as held-out text is: the recipe's text "
            "is the wrong diet; add some like data.production to data.train."
        )
    here, there = (drift["teacher"][kind]["loss"] for kind in ("heldout", "production"))
    if there > WORSE * here:
        warnings.append(
            f"The teacher itself does worse on production text (loss {there:.3f}) than on held-out text ({here:.3f}): "
            "its students can only be as good; look for a teacher that knows such text."
        )
    for row in rows:
        metrics = [find_metric(row, f"{kind}/kl_to_teacher") for kind in ("heldout", "production")]
        values = [metric.value for metric in metrics if metric is not None and metric.value is not None]
        if row.role == "member" and len(values) == 2 and values[1] > FARTHER * values[0]:
            warnings.append(
                f"{row.name} is {values[1] / values[0]:.1f} times as far from its teacher on production text (KL "
                f"{values[1]:.3f}) as on held-out text ({values[0]:.3f}): it has learned from other text than it meets."
            )
    return warnings
