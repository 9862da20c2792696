"""`cascade experiment`: runs the cells one after another; a rerun takes over the cells that are finished."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from cascade.pipeline.experiment.cells import Cell, check_cells, config_of, plan_cells
from cascade.pipeline.experiment.comparison import summarise, write_experiment
from cascade.pipeline.experiment.results import Result, collect_result, inputs_of, read_result, write_result
from cascade.pipeline.run import run_recipe
from cascade.planning.estimates import parent_seconds
from cascade.planning.ownership import check_ownership
from cascade.planning.remaining import remaining_members, remaining_seconds
from cascade.recipe.experiment import ExperimentFile, load_experiment
from cascade.runtime.errors import DiskError, RunError, UserError
from cascade.runtime.failpoints import failpoint
from cascade.runtime.files import make_folder, read_json, write_atomically
from cascade.runtime.permissions import NO_PERMISSIONS, Permissions
from cascade.store.lock import LOCK, locked

_MARK = "experiment-file.yaml"
"""The file that marks an experiment's folder: a copy of the experiment's file as it was last run."""


@dataclass(frozen=True)
class CellState:
    """A cell with its result, if it has one."""

    cell: Cell
    result: Result | None
    place: Path | None
    """The file that the result comes from."""
    why: str
    """The reason why an existing file is not this cell's result; '' without such a file."""


def experiment_folder(file: ExperimentFile, output: str | Path | None) -> Path:
    """The folder of an experiment: `output`, or runs/experiments/NAME.

    Raises:
        UserError: the folder holds something else.
    """
    folder = Path(output or Path("runs") / "experiments" / file.form.name)
    if folder.is_file():
        raise UserError(f"{folder}: is a file; give another --output")
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    names = [name for name in names if not name.startswith((LOCK, f".{LOCK}-", f".{_MARK}-"))]
    if names and _MARK not in names:
        raise UserError(f"{folder}: holds something that is no experiment ({names[0]}); give another --output")
    return folder


def run_experiment(
    path: str | Path,
    *,
    output: str | Path | None = None,
    only: Sequence[str] = (),
    permissions: Permissions = NO_PERMISSIONS,
    console: Console | None = None,
) -> Path:
    """Make the cells of an experiment's file that are not made yet, and its tables; returns its folder.

    `only` names the arms to make; the tables show other arms as far as they exist. A cell that fails does not stop the
    others: the error at the end names it, and the next start tries it again.

    Raises:
        UserError: the file or a cell cannot be run; in that case no cell is run.
        RunError: some cells failed.
    """
    console = console or Console(stderr=True)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("an experiment's cells are made by one process; start it without torchrun")
    file = load_experiment(path)
    folder = experiment_folder(file, output)
    cells = plan_cells(file)
    chosen = _cells_of_arms(file, cells, only)
    check_cells(file, chosen, permissions)
    with locked(folder):
        write_atomically(folder / _MARK, file.path.read_text(encoding="utf-8-sig"))
        for name in ("cells", "results"):
            make_folder(folder / name)
        states = [find_result(file, folder, cell) for cell in cells]
        results = {state.cell.name: state.result for state in states if state.result is not None}
        for state in states:
            _report_state(console, state, folder, again=state.cell in chosen)
        to_do = [cell for cell in chosen if cell.name not in results]
        run_folders = {cell.name: cell_folder(folder, cell) for cell in cells}
        for cell in to_do:
            check_ownership(run_folders[cell.name], cell.recipe)
        failed, budgets = {}, sorted({cell.tokens for cell in cells})
        for number, cell in enumerate(to_do, start=1):
            failpoint("experiment.cell")
            _print(console, f"cell {number} of {len(to_do)}: {cell.name}")
            try:
                results[cell.name] = _make(folder, cell, run_folders, permissions, console)
            except DiskError:
                raise
            except RunError as error:
                failed[cell.name] = str(error)
                _print(console, f"{cell.name}: {error}")
            write_experiment(folder, summarise(file.form, budgets, results, failed))
        write_experiment(folder, summarise(file.form, budgets, results, failed))
    if failed:
        failures = "\n  ".join(f"{name}: {why}" for name, why in failed.items())
        raise RunError(f"{len(failed)} of {len(cells)} cells could not be made:\n  {failures}")
    return folder


def list_experiment(
    path: str | Path,
    *,
    output: str | Path | None = None,
    only: Sequence[str] = (),
    permissions: Permissions = NO_PERMISSIONS,
) -> dict[str, Any]:
    """The cells, which of them are done, and the estimated seconds of the rest; runs nothing.

    Raises:
        UserError: the file or a cell cannot be run.
    """
    file = load_experiment(path)
    folder = experiment_folder(file, output)
    chosen = _cells_of_arms(file, plan_cells(file), only)
    check_cells(file, chosen, permissions)
    rows = []
    for cell in chosen:
        state = find_result(file, folder, cell)
        seconds = 0.0 if state.result else _seconds(cell_folder(folder, cell), cell)
        row = {"cell": cell.name, "arm": cell.arm, "seed": cell.seed, "tokens": cell.tokens}
        rows.append(row | {"done": state.result is not None, "seconds": seconds, "why": state.why})
    return {
        "name": file.form.name,
        "experiment": str(folder),
        "cells": rows,
        "seconds": sum(r["seconds"] for r in rows),
    }


def cell_folder(folder: Path, cell: Cell) -> Path:
    """The run directory of a cell, named after it; a digest follows where that name belongs to a run of another recipe.

    So an experiment whose file has changed makes the changed cells again, and takes over their unchanged stages.
    """
    first = folder / "cells" / cell.name
    if not (first / "recipe.yaml").exists():
        return first
    try:
        check_ownership(first, cell.recipe)
    except UserError:
        digest = hashlib.sha256(cell.recipe.model_dump_json().encode()).hexdigest()
        return first.with_name(f"{first.name}-{digest[:8]}")
    return first


def find_result(file: ExperimentFile, folder: Path, cell: Cell) -> CellState:
    """A cell with its result from the experiment's folder, or from the folder that its file names."""
    inputs, why = inputs_of(cell.recipe), ""
    places = [folder / "results", *([Path(file.form.results)] if file.form.results else [])]
    for place in places:
        path = place / f"{cell.name}.json"
        result, reason = read_result(path, cell, inputs)
        if result is not None:
            return CellState(cell, result, path, "")
        if reason:
            why = f"{path}: {reason}"
    return CellState(cell, None, None, why)


def _make(folder: Path, cell: Cell, run_folders: dict[str, Path], permissions: Permissions, console: Console) -> Result:
    """The result of a cell, after making its family or finding it finished."""
    run_folder = run_folders[cell.name]
    earlier = folder / "cells" / cell.name  # of another recipe, where that is not the run folder
    known = [path for path in (earlier, *run_folders.values()) if path != run_folder and (path / "stages").is_dir()]
    finished_folder = run_recipe(cell.recipe, output=run_folder, known=known, permissions=permissions, console=console)
    result = collect_result(cell, finished_folder, inputs_of(cell.recipe))
    failpoint("experiment.made")
    path = folder / "results" / f"{cell.name}.json"
    write_result(path, result)
    written: Result = read_json(path)
    return written


def _cells_of_arms(file: ExperimentFile, cells: list[Cell], only: Sequence[str]) -> list[Cell]:
    """The cells of the arms in `only`, or of all arms; for a baseline row, the cells of the arm that it belongs to."""
    arms = file.form.arms
    unknown = [name for name in only if name not in arms]
    if unknown:
        raise UserError(f"--only {unknown[0]}: no such arm; {file.path} has: {', '.join(arms)}")
    names = {arms[name].of or name for name in only or arms}
    return [cell for cell in cells if cell.arm in names]


def _seconds(run_folder: Path, cell: Cell) -> float:
    """Estimated seconds of a cell's unfinished stages, including stages that other cells share with it."""
    config = config_of(cell.recipe)
    shared = remaining_seconds(run_folder, cell.recipe, "parent", parent_seconds(cell.recipe, config))
    members = remaining_members(run_folder, cell.recipe, cell.members)
    return sum(shared.values()) + sum(sum(member.seconds.values()) for member in members)


def _report_state(console: Console, state: CellState, folder: Path, *, again: bool) -> None:
    """Print whether a cell's result was taken from elsewhere, or why an existing file is not its result."""
    if state.why:
        _print(console, f"{state.why}; {state.cell.name} is {'made again' if again else 'not shown'}")
    elif state.place is not None and state.place.parent != folder / "results":
        _print(console, f"{state.cell.name}: taken from {state.place}")


def _print(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
