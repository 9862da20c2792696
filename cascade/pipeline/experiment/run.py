"""`cascade experiment`: the cells one after another, each a run; what is finished is found again."""

import hashlib
import json
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
from cascade.runtime.files import make_folder, write_atomically
from cascade.runtime.permissions import NO_PERMISSIONS, Permissions
from cascade.store.lock import LOCK, locked

_MARK = "experiment-file.yaml"
"""Of a folder that is an experiment's: the file as it was last run."""


@dataclass(frozen=True)
class Found:
    """A cell, and what there is of it."""

    cell: Cell
    result: Result | None
    place: Path | None
    """The file that the result was read from."""
    why: str
    """Why a file that is there is not its result; '' where there is none."""


def experiment_folder(file: ExperimentFile, output: str | Path | None) -> Path:
    """Where an experiment goes: --output, else runs/experiments/NAME.

    Raises:
        UserError: something else is there.
    """
    folder = Path(output or Path("runs") / "experiments" / file.form.name)
    if folder.is_file():
        raise UserError(f"{folder}: is a file; give another --output")
    others = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    others = [name for name in others if not name.startswith((LOCK, f".{LOCK}-", f".{_MARK}-"))]
    if others and _MARK not in others:
        raise UserError(f"{folder}: holds something that is no experiment ({others[0]}); give another --output")
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

    `only` names arms; the others are shown as far as they are made. A cell that fails is told at the end, and tried
    again by the next start; the others are made.

    Raises:
        UserError: the file, or some cell of it, cannot be done; nothing is run then.
        RunError: not all cells could be made.
    """
    console = console or Console(stderr=True)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("an experiment's cells are made by one process; start it without torchrun")
    file = load_experiment(path)
    folder = experiment_folder(file, output)
    cells = plan_cells(file)
    wanted = _wanted(file, cells, only)
    check_cells(file, wanted, permissions)
    with locked(folder):
        write_atomically(folder / _MARK, file.path.read_text(encoding="utf-8-sig"))
        for name in ("cells", "results"):
            make_folder(folder / name)
        states = [find_result(file, folder, cell) for cell in cells]
        results = {state.cell.name: state.result for state in states if state.result is not None}
        for state in states:
            _tell(console, state, folder, again=state.cell in wanted)
        to_do = [cell for cell in wanted if cell.name not in results]
        run_folders = {cell.name: cell_folder(folder, cell) for cell in cells}
        for cell in to_do:
            check_ownership(run_folders[cell.name], cell.recipe)
        failed, budgets = {}, sorted({cell.tokens for cell in cells})
        for number, cell in enumerate(to_do, start=1):
            failpoint("experiment.cell")
            _say(console, f"cell {number} of {len(to_do)}: {cell.name}")
            try:
                results[cell.name] = _make(folder, cell, run_folders, permissions, console)
            except DiskError:
                raise
            except RunError as error:
                failed[cell.name] = str(error)
                _say(console, f"{cell.name}: {error}")
            write_experiment(folder, summarise(file.form, budgets, results, failed))
        write_experiment(folder, summarise(file.form, budgets, results, failed))
    if failed:
        told = "\n  ".join(f"{name}: {why}" for name, why in failed.items())
        raise RunError(f"{len(failed)} of {len(cells)} cells could not be made:\n  {told}")
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
        UserError: as `run_experiment`.
    """
    file = load_experiment(path)
    folder = experiment_folder(file, output)
    wanted = _wanted(file, plan_cells(file), only)
    check_cells(file, wanted, permissions)
    rows = []
    for cell in wanted:
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
    """The run directory of a cell: its name's; with the recipe's digest where that is another recipe's run.

    An experiment whose file has changed thus makes a changed cell again, and what of it stayed the same is taken over.
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


def find_result(file: ExperimentFile, folder: Path, cell: Cell) -> Found:
    """What there is of a cell, in the experiment's folder or in the one that its file names."""
    inputs, why = inputs_of(cell.recipe), ""
    places = [folder / "results", *([Path(file.form.results)] if file.form.results else [])]
    for place in places:
        path = place / f"{cell.name}.json"
        result, reason = read_result(path, cell, inputs)
        if result is not None:
            return Found(cell, result, path, "")
        if reason:
            why = f"{path}: {reason}"
    return Found(cell, None, None, why)


def _make(folder: Path, cell: Cell, run_folders: dict[str, Path], permissions: Permissions, console: Console) -> Result:
    """The result of a cell, whose family is made or, where it is already, read again."""
    run_folder = run_folders[cell.name]
    earlier = folder / "cells" / cell.name  # of another recipe, where that is not the run folder
    known = [other for other in (earlier, *run_folders.values()) if other != run_folder and (other / "stages").is_dir()]
    made = run_recipe(cell.recipe, output=run_folder, known=known, permissions=permissions, console=console)
    result = collect_result(cell, made, inputs_of(cell.recipe))
    failpoint("experiment.made")
    path = folder / "results" / f"{cell.name}.json"
    write_result(path, result)
    written: Result = json.loads(path.read_text(encoding="utf-8"))
    return written


def _wanted(file: ExperimentFile, cells: list[Cell], only: Sequence[str]) -> list[Cell]:
    """The cells of the arms that are asked for; those of its members for a baseline row."""
    arms = file.form.arms
    unknown = [name for name in only if name not in arms]
    if unknown:
        raise UserError(f"--only {unknown[0]}: no such arm; {file.path} has: {', '.join(arms)}")
    names = {arms[name].of or name for name in only or arms}
    return [cell for cell in cells if cell.arm in names]


def _seconds(run_folder: Path, cell: Cell) -> float:
    """What is left of a cell; what other cells share with it, which is not made twice, is counted."""
    config = config_of(cell.recipe)
    shared = remaining_seconds(run_folder, cell.recipe, "parent", parent_seconds(cell.recipe, config))
    members = remaining_members(run_folder, cell.recipe, cell.members)
    return sum(shared.values()) + sum(sum(member.seconds.values()) for member in members)


def _tell(console: Console, state: Found, folder: Path, *, again: bool) -> None:
    """Say of a cell what is worth it: taken from elsewhere, or there and not its result."""
    if state.why:
        _say(console, f"{state.why}; {state.cell.name} is {'made again' if again else 'not shown'}")
    elif state.place is not None and state.place.parent != folder / "results":
        _say(console, f"{state.cell.name}: taken from {state.place}")


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
