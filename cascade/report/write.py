"""family.json, family.csv, report.md and a self-contained report.html of one family."""

import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cascade.report.logs import training_logs
from cascade.report.plots import candidate_chart, size_quality_curve, training_curves
from cascade.report.production import load_drift, production_table, wrong_diet
from cascade.report.provenance import load_provenances, provenance_table
from cascade.report.rates import load_rates, rates_table
from cascade.report.records import Family, Row, family_csv, family_json, metric_names
from cascade.report.render import render
from cascade.report.skipped_rows import load_skipped, skipped_table
from cascade.report.tables import Table, markdown_table, quality_table, shape_table, size_table, stage_table
from cascade.report.tail_tables import decile_table, load_tails, slice_table
from cascade.report.target_costs import load_targets, targets_table
from cascade.report.verdicts import load_verdicts, verdict_table
from cascade.runtime.errors import UserError
from cascade.runtime.failpoints import failpoint
from cascade.runtime.files import sync_folder, write_atomically
from cascade.store.commits import MANIFEST, seal, verify_folder
from cascade.store.health import findings
from cascade.store.user_files import free_name

Titled = tuple[str, Table]

_NOTES = (
    "Values are followed by their standard error, and by the retention (member - chance) / (parent - chance) with its "
    "95% interval (paired bootstrap over items) where the parent is at least 5 standard errors above chance. "
    "Held-out losses and KL are nats per token (or example); stages are measured on selection text, results on "
    "held-out text. Speeds are of a batch of one on this machine's CPU, each in a process of its own, in float32; "
    "copies in fewer bits compute in the dtype that they are stored in."
)

logger = logging.getLogger(__name__)

DERIVED = ("family.csv", "report.md", "report.html")
"""Files that can be written again from the other files."""

_SEALED = (".json", ".csv", ".md", ".html", ".yaml")


def write_family(run_folder: Path, name: str, rows: list[Row], curves: dict[str, list[dict[str, float]]]) -> None:
    """Write all four files, each replaced in one step; verdicts and the long tail come from the run directory.

    Callers do so within `resealed`.
    """
    further = _further_tables(run_folder, rows)
    write_atomically(run_folder / "family.json", family_json(name, rows))
    write_atomically(run_folder / "family.csv", family_csv(rows))
    write_atomically(run_folder / "report.md", report_markdown(name, rows, further))
    write_atomically(run_folder / "report.html", report_html(name, rows, curves, further))


def set_damaged_aside(run_folder: Path) -> None:
    """Rename reports that somebody has changed since the run, so that they can be written again.

    A changed recipe stays in place and a copy is set aside: recipe.yaml always says whose directory this is.
    """
    for name in verify_folder(run_folder):
        path = run_folder / name
        if name == MANIFEST or not path.exists():
            continue
        aside = free_name(path, ".damaged")
        logger.warning("%s: is not as it was written; it is set aside as %s and made again", path, aside.name)
        if name == "recipe.yaml":
            shutil.copyfile(path, aside)
        else:
            path.rename(aside)


@contextmanager
def resealed(run_folder: Path) -> Iterator[None]:
    """Remove the run directory's manifest before its files are written, and write it again afterwards.

    A process that dies in between leaves no manifest, instead of a manifest that calls whole files damaged.
    """
    (run_folder / MANIFEST).unlink(missing_ok=True)
    sync_folder(run_folder)
    failpoint("unsealed")
    yield
    names = [path.name for path in run_folder.iterdir() if path.suffix in _SEALED]
    seal(run_folder, names, {"stage": "report"})


def require_whole(run_folder: Path) -> None:
    """Refuse to write reports from files that somebody has changed since the run.

    Raises:
        UserError: a file has changed.
    """
    damaged = [name for name in verify_folder(run_folder) if name not in DERIVED]
    if (run_folder / MANIFEST).exists() and damaged:
        raise UserError(f"{run_folder / damaged[0]}: is not as the run left it; run the same command again first")


def report_markdown(name: str, rows: list[Row], further: Sequence[Titled] = ()) -> str:
    """The report as Markdown; `further` tables come after the quality."""
    parts = [f"# Family {_plain(name)}", _NOTES]
    for title, table in _tables(rows, further):
        parts += [f"## {title}", markdown_table(table)]
    return "\n\n".join(parts) + "\n"


def report_html(
    name: str, rows: list[Row], curves: dict[str, list[dict[str, float]]], further: Sequence[Titled] = ()
) -> str:
    """The report as one HTML file with tables and curves, which loads nothing from elsewhere."""
    values = {
        "title": name,
        "notes": _NOTES,
        "quality_charts": _charts(Family(name, rows)),
        "tables": _tables(rows, further),
        "shape_chart": candidate_chart(rows),
        "training_chart": training_curves(curves),
    }
    return render("report.html.jinja", values)


def _further_tables(run_folder: Path, rows: list[Row]) -> list[Titled]:
    """The tables of everything that a run has measured besides its rows."""
    verdicts, tails, provenances = load_verdicts(run_folder), load_tails(run_folder), load_provenances(run_folder)
    tables = [("Good enough", verdict_table(verdicts))] if verdicts else []
    faults = [[name, fault] for name, log in training_logs(run_folder).items() for fault in findings(log)]
    tables += [("Trainings to look at", [["member", "found"], *faults])] if faults else []
    rates = load_rates(run_folder)
    tables += [("Learning rates", rates_table(rates))] if rates else []
    skipped = load_skipped(run_folder)
    tables += [("Rows left out", skipped_table(skipped))] if skipped else []
    targets = load_targets(run_folder)
    if targets.get("members"):
        tables.append((f"Teacher's targets: {targets['kind']}", targets_table(targets)))
    published = [provenances[row.name] for row in rows if row.name in provenances]
    tables += [("Where they come from", provenance_table(published))] if published else []
    drift = load_drift(run_folder)
    if drift:
        warnings = [[warning] for warning in wrong_diet(drift, rows)]
        tables += [("Production", production_table(drift, rows))]
        tables += [("The recipe's diet", [["found"], *warnings])] if warnings else []
    if tails:
        members = {row.name for row in rows if row.role == "member"}
        member_tails = {name: tail for name, tail in tails.items() if name in members}
        tables += [("The long tail", decile_table(tails)), ("Where most was lost", slice_table(member_tails))]
    return tables


def _tables(rows: list[Row], further: Sequence[Titled]) -> list[Titled]:
    tables = [
        ("Sizes", size_table(rows)),
        ("Cut and recovery", stage_table(rows)),
        ("Quality", quality_table(rows)),
    ]
    tables += further
    shapes = shape_table(rows)
    return [*tables, ("Shapes tried", shapes)] if len(shapes) > 1 else tables


def _charts(family: Family) -> list[str]:
    """A chart per metric, the most telling first; without the loss, whose curve has the shape of bits per byte."""
    names = [name for name in metric_names(family.rows) if name != "heldout/loss"]
    first = [name for name in ("heldout/kl_to_teacher", "heldout/bits_per_byte") if name in names]
    ordered = first + [name for name in names if name not in first]
    return [chart for name in ordered if (chart := size_quality_curve([family], name))]


def _plain(text: str) -> str:
    return text.replace("<", "&lt;").replace("\n", " ")
