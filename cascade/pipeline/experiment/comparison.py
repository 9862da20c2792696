"""The comparison of an experiment's arms: figures of each arm, and differences to the reference arm.

`experiment.json` holds what `summarise` returns; tables and curves show the same.
"""

import json
import shutil
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from cascade.recipe.experiment import Experiment
from cascade.report.paired import RESAMPLES, paired_difference
from cascade.report.plots import Point, Series, line_chart, minutes, short_number
from cascade.report.render import render
from cascade.report.tables import Table, markdown_table, plain_table
from cascade.runtime.files import read_json, write_atomically
from cascade.store.strict_json import plain

VERSION = 1

METRICS = {"kl_to_teacher": "KL to the parent", "loss": "loss"}
"""The metrics that arms are compared in: nats per token of held-out text, smaller is better."""

Entry = dict[str, Any]
"""The figures of an arm at a size and a budget, over its seeds."""

_BUDGETS = {"new": "budget {:,}", "accumulated": "those of chains with a budget of {:,} new tokens a member"}

_ACCOUNTS = {"new": "At equal new tokens per member", "accumulated": "At equal accumulated tokens"}


def summarise(
    form: Experiment, budgets: Sequence[int], results: dict[str, dict[str, Any]], failed: dict[str, str]
) -> dict[str, Any]:
    """The summary of an experiment so far; `results` and `failed` (the errors) are by the cell's name."""
    families = [name for name, arm in form.arms.items() if not arm.is_row]
    cells = [
        {"cell": name, "arm": arm, "seed": seed, "tokens": budget, "done": name in results, "failed": failed.get(name)}
        for arm in families
        for seed in form.seeds
        for budget in budgets
        if (name := f"{arm}-s{seed}-{budget}")
    ]
    accounts: dict[str, dict[str, Any]] = {}
    for account in _ACCOUNTS:
        arms = [name for name in form.arms if _account(form, name) == account or name == form.reference_arm]
        rows = _entries(form, results, arms, budgets) if len(arms) > 1 else []
        accounts[account] = {"measured": len(arms) > 1, "rows": rows, "counts": _counts(form, arms, rows)}
    versions: dict[str, list[str]] = {}
    for name, result in sorted(results.items()):
        versions.setdefault(_version(result), []).append(name)
    return {
        "version": VERSION,
        "name": form.name,
        "reference": form.reference_arm,
        "rates": "given" if form.fixed_rates else "searched",
        "seeds": form.seeds,
        "tokens": budgets,
        "resamples": RESAMPLES,
        "cells": cells,
        "accounts": accounts,
        "parent": _parent(results),
        "made_with": versions,
    }


def write_experiment(folder: Path, summary: dict[str, Any]) -> None:
    """Write experiment.json, experiment.md and experiment.html, each replaced in one step."""
    text = json.dumps(plain(summary), indent=1, allow_nan=False) + "\n"
    write_atomically(folder / "experiment.json", text)
    title = f"Experiment {summary['name']}"
    intro, sections = _intro(summary), _sections(summary)
    parts = [f"# {title}", *intro]
    for heading, table, lines in sections:
        parts += [f"## {heading}", *([markdown_table(table)] if table else []), *lines]
    write_atomically(folder / "experiment.md", "\n\n".join(parts) + "\n")
    values = {"title": title, "intro": intro, "charts_by_account": _charts(summary), "sections": sections}
    write_atomically(folder / "experiment.html", render("experiment.html.jinja", values))


def experiment_texts(folder: Path) -> str:
    """The summary for a terminal."""
    summary = load_experiment_summary(folder)
    width = min(120, shutil.get_terminal_size().columns)
    parts = [textwrap.fill(line, max(60, width)) for line in _intro(summary)]
    for heading, table, lines in _sections(summary):
        notes = [textwrap.fill(line, max(60, width)) for line in lines]
        parts += ["\n".join([heading, *([plain_table(table)] if table else []), *notes])]
    return "\n" + "\n\n".join([*parts, f"Report: {folder / 'experiment.html'}   results: {folder / 'results'}"])


def load_experiment_summary(folder: Path) -> dict[str, Any]:
    """The summary in experiment.json."""
    summary: dict[str, Any] = read_json(folder / "experiment.json")
    return summary


def list_texts(listed: dict[str, Any]) -> str:
    """The list of cells for a terminal, as `cascade experiment --list` prints it."""
    table = [["cell", "", "time left"]]
    for row in listed["cells"]:
        table.append([row["cell"], "done" if row["done"] else "", "" if row["done"] else minutes(row["seconds"])])
    num_done = sum(row["done"] for row in listed["cells"])
    reasons = [f"{row['why']}; {row['cell']} is to be made again." for row in listed["cells"] if row["why"]]
    last = (
        f"{num_done} of {len(listed['cells'])} cells are done; the rest takes about {minutes(listed['seconds'])} "
        "(operations counted, rate measured; what cells share is made once and counted for each)."
    )
    return "\n".join([plain_table(table), "", *reasons, last])


def _account(form: Experiment, name: str) -> str:
    """The tokens that an arm and the reference have the same number of: `new` or `accumulated`."""
    return form.arms[form.arms[name].of or name].tokens


def _version(result: dict[str, Any]) -> str:
    versions = result["made_with"]
    commit = f" ({versions['commit'][:12]}{'+' * versions['commit'].endswith('+')})" if "commit" in versions else ""
    return (
        f"cascade {versions['cascade']}{commit}, torch {versions['torch']}, transformers {versions['transformers']}, "
        f"{versions['threads']} thread{'s' * (versions['threads'] != 1)} on {versions['device']}"
    )


def _parent(results: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """Size and loss of the parent; None unless all results have the same parent."""
    if len({result["inputs"]["parent"] for result in results.values()}) != 1:
        return None
    row = next(iter(results.values()))["rows"][0]
    return {"num_parameters": row["num_parameters"], "loss": _heldout_value(row, "loss")}


def _entries(
    form: Experiment, results: dict[str, dict[str, Any]], arms: Sequence[str], budgets: Sequence[int]
) -> list[Entry]:
    """The entries of all arms with at least one finished seed, by budget and size, the reference arm first."""
    sizes = list(dict.fromkeys(row["member"] for result in results.values() for row in result["rows"] if row["member"]))
    arms = sorted(arms, key=lambda name: name != form.reference_arm)  # stable
    entries = []
    for budget in budgets:
        for size in sizes:
            reference = _rows_of(form, results, form.reference_arm, size, budget)
            for arm in arms:
                rows = _rows_of(form, results, arm, size, budget)
                if rows:
                    entries.append(_entry(arm, size, budget, rows, None if arm == form.reference_arm else reference))
    return entries


def _rows_of(
    form: Experiment, results: dict[str, dict[str, Any]], arm: str, size: str, budget: int
) -> dict[int, dict[str, Any]]:
    """The rows of an arm at a size and a budget, by seed, each with the digest of its parent."""
    family, kind = form.arms[arm].of or arm, form.arms[arm].row or "member"
    rows = {}
    for seed in form.seeds:
        result = results.get(f"{family}-s{seed}-{budget}")
        for row in result["rows"] if result else []:
            if (row["member"], row["kind"]) == (size, kind):
                rows[seed] = row | {"parent": result["inputs"]["parent"] if result else ""}
    return rows


def _entry(
    arm: str, size: str, budget: int, rows: dict[int, dict[str, Any]], reference: dict[int, dict[str, Any]] | None
) -> Entry:
    seed_rows = list(rows.values())
    entry: Entry = {
        "arm": arm,
        "size": size,
        "budget": budget,
        "seeds": list(rows),
        "num_parameters": sorted({row["num_parameters"] for row in seed_rows}),
        "tokens": {key: sorted({row["tokens"][key] for row in seed_rows}) for key in ("hop", "accumulated")},
        "learning_rates": [row["rate"]["learning_rate"] if row["rate"] else None for row in seed_rows],
        "rates_at_edge": [bool(row["rate"] and row["rate"]["edge"]) for row in seed_rows],
        "search_tokens": [row["rate"]["num_tokens"] if row["rate"] else 0 for row in seed_rows],
        "retention": _retention(seed_rows),
        "num_tasks": len({metric["task"] for row in seed_rows for metric in _retained(row)}),
    }
    for metric in METRICS:
        values = [value for row in seed_rows if (value := _heldout_value(row, metric)) is not None]
        entry[metric] = fmean(values) if values else None
        entry[f"{metric}_difference"] = None if reference is None else _difference(metric, rows, reference)
    return entry


def _difference(metric: str, rows: dict[int, dict[str, Any]], reference: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """The difference to the reference over the seeds that both have, or {'why': the reason for no difference}."""
    seeds = [seed for seed in rows if seed in reference]
    if not seeds:
        return {"why": "the reference is not made"}
    pairs = [(rows[seed], reference[seed]) for seed in seeds]
    if metric == "kl_to_teacher" and any(ours["parent"] != theirs["parent"] for ours, theirs in pairs):
        return {"why": "another parent"}
    if any(not row["blocks"] or metric not in row["blocks"] for pair in pairs for row in pair):
        return {"why": "no sums of blocks"}
    first, second = ([row["blocks"] for row in part] for part in zip(*pairs, strict=True))
    if any(ours["text"] != theirs["text"] for ours, theirs in zip(first, second, strict=True)):
        return {"why": "other held-out text"}
    counts = [sums["tokens"] for sums in first]
    if len({len(sums) for sums in counts}) > 1:
        return {"why": "other held-out text at each seed"}
    return paired_difference([sums[metric] for sums in first], [sums[metric] for sums in second], counts).record()


def _retained(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        metric
        for metric in row["metrics"]
        if metric["task"] not in ("heldout", "production") and metric["retention"] is not None
    ]


def _retention(rows: Iterable[dict[str, Any]]) -> float | None:
    """Mean over seeds of the mean retention over tasks; a task with several metrics counts once. None without tasks."""
    means = []
    for row in rows:
        tasks: dict[str, list[float]] = {}
        for metric in _retained(row):
            tasks.setdefault(metric["task"], []).append(metric["retention"])
        if tasks:
            means.append(fmean(fmean(values) for values in tasks.values()))
    return fmean(means) if means else None


def _heldout_value(row: dict[str, Any], metric: str) -> float | None:
    values = [record["value"] for record in row["metrics"] if (record["task"], record["metric"]) == ("heldout", metric)]
    return values[0] if values else None


def _counts(form: Experiment, arms: Sequence[str], entries: Sequence[Entry]) -> dict[str, dict[str, dict[str, int]]]:
    """The number of wins, ties and losses over sizes and budgets, by arm and metric."""
    counts: dict[str, dict[str, dict[str, int]]] = {}
    for arm in arms:
        if arm == form.reference_arm:
            continue
        counts[arm] = {metric: {"win": 0, "tie": 0, "loss": 0} for metric in METRICS}
        for entry in entries:
            for metric in METRICS:
                verdict = (entry[f"{metric}_difference"] or {}).get("verdict") if entry["arm"] == arm else None
                if verdict:
                    counts[arm][metric][verdict] += 1
    return counts


def _intro(summary: dict[str, Any]) -> list[str]:
    """The explanations above the tables, one paragraph each."""
    parent = summary["parent"]
    lines = [
        "Loss and KL to the parent are means over seeds in nats per token of held-out text, smaller is better. "
        "new tokens: of the member's own training, in whole steps; accumulated: and of the members it is cut from. "
        "Arms find shapes of their own: in brackets, how many more parameters than the reference. "
        "Retention: mean over tasks of (member - chance) / (parent - chance), where the parent is at least 5 standard "
        "errors above chance.",
        _of_intervals(summary),
        _RATES[summary["rates"]],
    ]
    if parent and parent["loss"] is not None:
        lines.insert(0, f"Parent: {parent['num_parameters']:,} parameters, loss {parent['loss']:.4f}.")
    for version, names in summary["made_with"].items():
        whose = "" if len(summary["made_with"]) == 1 else f" ({', '.join(names)})"
        lines.append(f"Made with {version}{whose}.")
    missing = [cell["cell"] for cell in summary["cells"] if not cell["done"] and not cell["failed"]]
    lines += [f"Not made yet: {', '.join(missing)}."] if missing else []
    return lines + [f"Failed: {cell['cell']}: {cell['failed']}" for cell in summary["cells"] if cell["failed"]]


_RATES = {
    "searched": "The learning rate of each training was searched for in the same way, by short trainings from its own "
    "start; their tokens are not counted as the member's.",
    "given": "Learning rates are those of the recipes (fixed_rates: true); what suits one arm may not suit another.",
}


def _of_intervals(summary: dict[str, Any]) -> str:
    """The paragraph that explains the intervals and their limits."""
    seeds, few = summary["seeds"], ""
    over = "over held-out blocks" if len(seeds) == 1 else f"over {len(seeds)} seeds, then held-out blocks"
    if len(seeds) == 1:
        few = f"There is one seed ({seeds[0]}): another may give another verdict. "
    elif len(seeds) < 10:
        few = (
            "So few seeds show less of their chance than there is: where it outweighs the blocks', such an interval "
            "holds the truth in about 55% of cases with 2 seeds, 78% with 3, 85% with 5. "
        )
    return (
        f"In brackets the 95% interval of the difference to {summary['reference']}: a paired bootstrap {over}, "
        f"{summary['resamples']:,} resamples. {few}win, tie, loss: whether it is below 0, holds it, or is above it; of "
        "comparisons in which nothing differs about one in twenty is called a win or loss."
    )


def _sections(summary: dict[str, Any]) -> list[tuple[str, Table, list[str]]]:
    """(heading, table, lines below the table) for each accounting and budget, then for the learning rates."""
    sections: list[tuple[str, Table, list[str]]] = []
    for account, heading in _ACCOUNTS.items():
        comparison = summary["accounts"][account]
        if not comparison["measured"]:
            arm = "no arm beside the reference" if account == "new" else "no arm has `tokens: accumulated`"
            sections.append((heading, [], [f"not measured: {arm}."]))
            continue
        for budget in summary["tokens"]:
            rows = [entry for entry in comparison["rows"] if entry["budget"] == budget]
            if rows:
                sections.append(
                    (f"{heading}: {_BUDGETS[account].format(budget)}", _table(rows, summary["reference"]), [])
                )
        if not comparison["rows"]:
            sections.append((heading, [], ["nothing is made yet."]))
        sections[-1][2].extend(_count_lines(comparison["counts"], summary["reference"]))
    rows = [entry for account in _ACCOUNTS for entry in summary["accounts"][account]["rows"]]
    edges = sorted({entry["arm"] for entry in rows if any(entry["rates_at_edge"])})
    notes = [_EDGE.format(", ".join(edges))] if edges else []
    return [*sections, ("Learning rates", _rate_table(rows), notes)] if rows else sections


_EDGE = (
    "(edge): the highest or lowest rate tried was the best when the search had spent its tries; one beyond it may be "
    "better, so that these arms may be worth more than is shown: {}."
)


def _table(rows: Sequence[Entry], reference: str) -> Table:
    """The table with a line for each size and arm, the reference first in each size."""
    head = ["", "parameters", "new tokens", "accumulated", "seeds"]
    for name in ("KL", "loss"):
        head += [name, f"less {reference}", "95% interval", "verdict"]
    table, width = [[*head, "retention"]], max(len(row["size"]) for row in rows)
    parameters = {row["size"]: row["num_parameters"] for row in rows if row["arm"] == reference}
    for row in rows:
        cells = [f"{row['size']:{width}} {row['arm']}", _size(row["num_parameters"], parameters.get(row["size"]))]
        cells += [_span(row["tokens"][key]) for key in ("hop", "accumulated")]
        cells.append(str(len(row["seeds"])))
        for metric in METRICS:
            mean = row[metric]
            cells += ["" if mean is None else f"{mean:.4f}", *_difference_cells(row[f"{metric}_difference"])]
        retention = f"{row['retention']:.0%} of {row['num_tasks']}" if row["retention"] is not None else "no task"
        table.append([*cells, retention])
    return table


def _size(numbers: Sequence[int], reference: Sequence[int] | None) -> str:
    """Parameters, and the difference in percent to the reference, whose shape may be another."""
    share = fmean(numbers) / fmean(reference) - 1 if reference else 0.0
    return _span(numbers) + (f" ({share:+.1%})" if abs(share) >= 0.0005 else "")


def _difference_cells(difference: dict[str, Any] | None) -> list[str]:
    if difference is None:
        return ["", "", ""]
    if "why" in difference:
        return ["", "", difference["why"]]
    interval = f"[{difference['low']:+.4f}, {difference['high']:+.4f}]"
    agree = max(difference["num_below"], difference["num_seeds"] - difference["num_below"])
    shows_seeds = difference["num_seeds"] > 1 and difference["verdict"] != "tie"
    seeds = f" ({agree}/{difference['num_seeds']} seeds)" if shows_seeds else ""
    return [f"{difference['value']:+.4f}", interval, f"{difference['verdict']}{seeds}"]


def _count_lines(counts: dict[str, dict[str, dict[str, int]]], reference: str) -> list[str]:
    lines = []
    for arm, metrics in counts.items():
        if not any(sum(count.values()) for count in metrics.values()):
            lines.append(f"{arm} against {reference}: not compared yet.")
            continue
        verdicts = [f"{METRICS[metric]} {', '.join(map(_counted, count.items()))}" for metric, count in metrics.items()]
        lines.append(f"{arm} against {reference}: {'; '.join(verdicts)}.")
    return lines


def _counted(verdict: tuple[str, int]) -> str:
    name, count = verdict
    return f"{count} {name}" if count == 1 else f"{count} {name}{'es' if name == 'loss' else 's'}"


def _rate_table(rows: Sequence[Entry]) -> Table:
    """The table of learning rates, with the tokens of each search."""
    table = [["", "budget", "learning rate at each seed", "tokens of its search"]]
    width = max(len(row["size"]) for row in rows)
    for row in rows:
        pairs = zip(row["learning_rates"], row["rates_at_edge"], strict=True)
        rates = ", ".join("none" if rate is None else f"{rate:.3g}{' (edge)' * edge}" for rate, edge in pairs)
        line = [
            f"{row['size']:{width}} {row['arm']}",
            f"{row['budget']:,}",
            rates,
            _span(sorted(set(row["search_tokens"]))),
        ]
        if line not in table:
            table.append(line)
    return table


def _span(values: Sequence[int]) -> str:
    return f"{values[0]:,}" if values[0] == values[-1] else f"{values[0]:,} to {values[-1]:,}"


def _charts(summary: dict[str, Any]) -> dict[str, list[str]]:
    """The SVG charts under each heading: each metric against size and, with several budgets, against tokens."""
    accounts = {heading: summary["accounts"][account]["rows"] for account, heading in _ACCOUNTS.items()}
    return {heading: _account_charts(rows, summary["tokens"]) for heading, rows in accounts.items() if rows}


def _account_charts(rows: Sequence[Entry], budgets: Sequence[int]) -> list[str]:
    charts = []
    for metric, title in METRICS.items():
        for budget in budgets:
            entries = [row for row in rows if row["budget"] == budget]
            name = f"{title}, {short_number(budget)} tokens"
            charts.append(_chart(entries, metric, name, "parameters", lambda row: row["num_parameters"][0]))
        if len(budgets) > 1:
            for size in dict.fromkeys(row["size"] for row in rows):
                entries = [row for row in rows if row["size"] == size]
                name = f"{title}, {size}"
                charts.append(_chart(entries, metric, name, "new tokens", lambda row: row["tokens"]["hop"][0]))
    return [chart for chart in charts if chart]


def _chart(rows: Sequence[Entry], metric: str, y_title: str, x_title: str, x_of: Any) -> str:
    series = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        entries = [row for row in rows if row["arm"] == arm and row[metric] is not None]
        points = [Point(x_of(row), row[metric], None, "") for row in sorted(entries, key=x_of)]
        series.append(Series(arm, points))
    return line_chart(series, x_title=x_title, y_title=y_title, log_x=True)
