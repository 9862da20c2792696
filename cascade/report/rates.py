"""The learning rates that members and cross-entropy baselines were trained at, and the trials of each search."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cascade.report.tables import Table
from cascade.runtime.files import read_json

RATES = "rates.json"
"""The file in the run directory: the `Rate` of each row, by the row's name."""

Rate = dict[str, Any]
"""`learning_rate`; `searched`: found by short trainings, otherwise given by the recipe; `tried`: learning_rate and
selection loss of each trial; `num_tokens`: of all trials together."""


def load_rates(run_folder: Path) -> dict[str, Rate]:
    """The rates of a run's rows, by the row's name; empty for the runs of older versions."""
    path = run_folder / RATES
    rates: dict[str, Rate] = read_json(path) if path.is_file() else {}
    return rates


def rate_of(learning_rate: float, search: Path | None) -> Rate:
    """The rate of a training; `search` is the folder of the stage that found it, None where the recipe gives it."""
    record: dict[str, Any] = {"tried": [], "num_tokens": 0}
    if search is not None:
        record = read_json(search / "rate.json")
    return {
        "learning_rate": learning_rate,
        "searched": search is not None,
        "tried": record["tried"],
        "num_tokens": record["num_tokens"],
    }


def is_at_edge(rate: Rate) -> bool:
    """Whether the best rate of a search is the highest or lowest it tried, so that one beyond may be better."""
    trials = [trial for trial in rate["tried"] if trial["loss"] is not None]
    if not trials:
        return False
    rates = [trial["learning_rate"] for trial in rate["tried"]]
    best = min(trials, key=lambda trial: float(trial["loss"]))["learning_rate"]
    return best in (min(rates), max(rates))


def rates_table(rates: Mapping[str, Rate]) -> Table:
    """A line for each training: its rate, where that comes from, and the loss at each trial."""
    table = [["", "learning rate", "", "tries", "tokens or examples", "selection loss at each"]]
    for name, rate in rates.items():
        losses = ", ".join(
            f"{trial['learning_rate']:.3g}: {'ran off' if trial['loss'] is None else format(trial['loss'], '.4g')}"
            for trial in rate["tried"]
        )
        origin = "found by short trainings" if rate["searched"] else "as the recipe says"
        tokens = f"{rate['num_tokens']:,}" if rate["searched"] else ""
        tries = str(len(rate["tried"])) if rate["searched"] else ""
        table.append([name, f"{rate['learning_rate']:.3g}", origin, tries, tokens, losses])
    return table
