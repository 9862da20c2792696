"""Reports: nothing is fetched, nothing is executed, what is shown is what was measured."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT
from jinja2 import UndefinedError

from cascade.distillation import trackers
from cascade.distillation.trackers import require_trackers, tracked
from cascade.report.plots import short_number, size_quality_curve
from cascade.report.records import Family, Metric, Row, family_csv, family_json, family_of, load_family
from cascade.report.render import render
from cascade.report.verdicts import judge, verdict_table
from cascade.report.write import report_html, report_markdown
from cascade.runtime.errors import UserError

CHROMIUM = shutil.which("chromium")


def test_the_html_report_is_one_file_without_requests_or_scripts(tiny_family):
    text = (tiny_family / "report.html").read_text()
    assert "<svg" in text and "heldout/kl_to_teacher" in text
    assert not re.search(r"<(script|link|img|iframe)|url\(|@import", text)
    assert set(re.findall(r"https?://[^\"'\s<]+", text)) <= {"http://www.w3.org/2000/svg"}


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_browser_renders_the_report_with_its_tables_and_curves(tiny_family, tmp_path):
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
               "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path}", "--virtual-time-budget=2000",
               "--dump-dom", f"file://{tiny_family / 'report.html'}"]  # fmt: skip
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    tables = sum(line.startswith("|---") for line in (tiny_family / "report.md").read_text().splitlines())
    assert dom.count("<svg") >= 4 and dom.count("<table") == tables > 4 and "Shapes tried" in dom
    for name in ("parent", "big", "small", "small-ce"):
        assert f"<td>{name}</td>" in dom


def test_F33_names_from_outside_cannot_inject_markup(tiny_family):
    evil = '<script>alert(1)</script>|"'
    rows = [replace(row, name=row.name + evil) for row in family_of(load_family(tiny_family)).rows]
    html = report_html(evil, rows, {evil: [{"num_tokens": 1, "selection_kl": 0.5}]})
    assert "<script" not in html
    assert "<script" not in report_markdown(evil, rows)


def test_every_text_on_a_page_is_escaped_and_a_missing_one_is_an_error():
    evil = "<script>alert(1)</script>"
    sections = [(evil, [[evil], [evil]], [evil])]
    values = {"title": evil, "intro": [evil], "charts_by_account": {evil: []}, "sections": sections}
    page = render("experiment.html.jinja", values)
    assert "<script" not in page and page.count("&lt;script&gt;") == 8
    with pytest.raises(UndefinedError, match="'intro' is undefined"):
        render("experiment.html.jinja", {"title": "", "charts_by_account": {}, "sections": []})


def test_the_package_brings_its_templates_along():
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["cascade"]
    templates = list((ROOT / "cascade" / "report" / "templates").iterdir())
    assert len(templates) >= 5
    for path in templates:
        assert any(path.relative_to(ROOT / "cascade").match(pattern) for pattern in data), path


def test_the_csv_has_one_line_per_row_and_the_same_values(tiny_family):
    import csv

    rows = load_family(tiny_family)["rows"]
    lines = list(csv.DictReader((tiny_family / "family.csv").open()))
    assert [line["name"] for line in lines] == [row["name"] for row in rows]
    for line, row in zip(lines, rows, strict=True):
        assert int(line["num_parameters"]) == row["num_parameters"]
        measured = row["metrics"][0]["value"] if row["metrics"] else None  # candidates are judged on selection text
        assert (float(line["heldout/loss"]) if line["heldout/loss"] else None) == measured


def test_family_json_is_strict_and_refuses_nan():
    row = Row(name="a", role="member", status="done", dims={}, num_parameters=1, num_parameters_non_embedding=1)
    assert json.loads(family_json("x", [row]))["rows"][0]["cost"] == {"seconds": None, "flops": None, "money": None}
    metric = Metric(task="heldout", metric="loss", value=float("nan"))
    with pytest.raises(ValueError):
        family_json("x", [replace(row, metrics=(metric,))])


def test_records_write_the_family_json_that_they_were_read_from(tiny_family):
    family = family_of(load_family(tiny_family))
    assert {row.role for row in family.rows} == {"teacher", "member", "baseline", "candidate"}
    assert family_json(family.name, family.rows) == (tiny_family / "family.json").read_text()


def test_what_an_older_family_json_lacks_counts_as_not_measured(tiny_family):
    family = load_family(tiny_family)
    row, whole = family["rows"][1], family_of(family).rows[1]
    for key in ("bytes", "speed", "cost", "seed"):
        del row[key]
    del row["metrics"][0]["retention_interval"], row["stages"]["cut"]
    row = family_of(family).rows[1]
    assert row.bytes is row.seed is row.cost.seconds is row.speed.peak_memory_bytes is row.stages.cut is None
    assert row.tokens == whole.tokens and row.metrics == whole.metrics
    assert row.stages.recovered == whole.stages.recovered


def test_a_file_that_is_no_family_is_refused(tmp_path):
    (tmp_path / "family.json").write_text('{"version": 99}')
    with pytest.raises(UserError, match="version 99; this program reads version 1"):
        load_family(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        load_family(tmp_path / "nowhere.json")


def test_several_families_share_one_chart(tiny_family):
    first = family_of(load_family(tiny_family))
    second = Family("second", first.rows)
    chart = size_quality_curve([first, second], "heldout/kl_to_teacher")
    assert "second" in chart and chart.count("<polyline") == 2
    assert size_quality_curve([first], "no/such_metric") == ""


def test_numbers_are_shortened_for_axes():
    assert [short_number(value) for value in (12, 1234, 2.75e6, 7e9)] == ["12", "1.23k", "2.75M", "7B"]


def test_rows_without_metrics_still_make_a_csv(tiny_family):
    rows = family_of(load_family(tiny_family)).rows
    rows[1] = replace(rows[1], metrics=())
    assert family_csv(rows).count("\n") == len(rows) + 1


def test_verdicts_follow_the_metrics_direction_and_say_what_was_not_measured(tiny_family):
    rows = family_of(load_family(tiny_family)).rows
    metric = next(metric for metric in rows[1].metrics if metric.metric == "loss")
    thresholds = {"heldout/loss": metric.value + 10, "heldout/top1_agreement": 0.9999, "heldout/none": 1.0}
    verdicts = {verdict["metric"]: verdict for verdict in judge(rows, thresholds) if verdict["row"] == "big"}
    assert {name: verdict["good"] for name, verdict in verdicts.items()} == dict(
        zip(thresholds, [True, False, None], strict=True)
    )
    assert {verdict["row"] for verdict in judge(rows, thresholds)} == {"parent", "big", "small"}  # no baselines
    table = verdict_table([verdicts["heldout/loss"] | {"wanted": metric.value - metric.stderr, "good": False}])
    assert table[1][-1] == "no, but within two standard errors"
    assert "Good enough" in report_markdown("f", rows, [("Good enough", verdict_table(list(verdicts.values())))])
    assert "Good enough" not in report_markdown("f", rows)


def test_tensorboard_gets_every_entry_of_the_log_under_its_step(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with tracked(["tensorboard"], project="family", run="big.distill", folder=tmp_path, settings={}) as log:
        for step in (1, 2):
            log({"step": step, "loss": 3.0 / step, "learning_rate": 0.5})
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard" / "big.distill")).Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "learning_rate"}
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 3.0), (2, 1.5)]


def test_a_tracker_that_fails_is_left_out_and_the_others_go_on(monkeypatch, caplog):
    sent = []

    def fails(values, step):
        raise ConnectionError("no route")

    openers = {"wandb": lambda *_: fails, "trackio": lambda *_: lambda values, step: sent.append(step)}
    monkeypatch.setattr(trackers, "OPENERS", openers | {"mlflow": lambda *_: fails({}, 0)})
    monkeypatch.setattr(trackers, "require_trackers", lambda names: None)
    with tracked(["wandb", "trackio"], project="f", run="r", folder=Path(), settings={}) as log:
        log({"step": 1, "loss": 1.0})
        log({"step": 2, "loss": 1.0})
    assert sent == [1, 2]

    def open_and_fail_at_the_end(stack, *_):
        stack.callback(fails, {}, 0)
        return lambda values, step: None

    monkeypatch.setattr(trackers, "OPENERS", {"wandb": open_and_fail_at_the_end})
    with tracked(["wandb"], project="f", run="r", folder=Path(), settings={}) as log:
        log({"step": 1, "loss": 1.0})
    assert "one could not be ended: no route" in caplog.text
    monkeypatch.setattr(trackers, "OPENERS", openers | {"mlflow": lambda *_: fails({}, 0)})
    assert caplog.text.count("wandb failed and is left out from here on: no route") == 1
    opened = tracked(["mlflow"], project="f", run="r", folder=Path(), settings={})
    with pytest.raises(UserError, match="mlflow cannot be opened: no route"), opened:
        pass


def test_a_tracker_that_is_unknown_or_not_installed_is_refused(monkeypatch):
    with pytest.raises(UserError, match=r"distill.trackers: unknown tracker 'comet'; known: tensorboard, trackio"):
        require_trackers(["comet"])
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(UserError, match=r"mlflow is not installed; pip install 'cascade-distill\[mlflow\]'"):
        require_trackers(["mlflow"])


def test_the_notebook_compares_families_without_torch(tiny_family, tmp_path):
    import os

    import nbformat
    from nbclient import NotebookClient

    quickstart = ROOT / "runs" / "quickstart" / "family.json"
    paths = [str(quickstart if quickstart.exists() else tiny_family / "family.json")]
    notebook = nbformat.read(ROOT / "notebooks" / "family_curves.ipynb", as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell("import sys\nassert 'torch' not in sys.modules"))
    os.environ["CASCADE_FAMILIES"] = os.pathsep.join(paths)
    try:
        NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    finally:
        del os.environ["CASCADE_FAMILIES"]
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/svg+xml" in output.get("data", {}) for output in outputs) >= 2
