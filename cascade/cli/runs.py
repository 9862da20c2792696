"""`cascade report`, `verify` and `doctor`: commands about runs and machines, which make no models."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import click

from cascade.cli.options import JSON, OUTPUT, PRIVATE, SET, TASK_CODE, finish, quiet_libraries
from cascade.runtime.permissions import Permissions

RUN = click.argument("run_folder", type=click.Path(file_okay=False))


@click.command()
@RUN
@JSON
def report(run_folder: str, as_json: bool) -> None:
    """Write family.csv, report.md and report.html of RUN_FOLDER again from its family.json."""
    from cascade.report.logs import training_logs
    from cascade.report.records import family_of, load_family
    from cascade.report.write import require_whole, resealed, set_damaged_aside, write_family
    from cascade.store.lock import locked

    folder = Path(run_folder)
    family = family_of(load_family(folder))
    with locked(folder):
        require_whole(folder)
        set_damaged_aside(folder)  # reports that somebody has written on
        with resealed(folder):
            write_family(folder, family.name, family.rows, training_logs(folder))
    finish({name: str(Path(run_folder) / name) for name in ("family.csv", "report.md", "report.html")}, as_json)


@click.command()
@RUN
@JSON
def verify(run_folder: str, as_json: bool) -> None:
    """Read all that RUN_FOLDER holds again and compare it with what was written.

    Exit code 1 where something differs. What is kept of teachers: `cascade cache verify --run RUN_FOLDER`.
    """
    from cascade.pipeline.verify import verify_run

    count, faults = verify_run(Path(run_folder))
    if as_json:
        click.echo(json.dumps({"run": run_folder, "files": count, "faults": [asdict(fault) for fault in faults]}))
    else:
        for fault in faults:
            click.echo(f"{fault.place}: {fault.what}. {fault.cure[0].upper()}{fault.cure[1:]}.")
        click.echo(f"{run_folder}: {count:,} files read, {len(faults) or 'no'} fault{'s' * (len(faults) != 1)}.")
    if faults:
        sys.exit(1)


@click.command()
@click.argument("recipe", type=click.Path(dir_okay=False), required=False)
@OUTPUT
@SET
@TASK_CODE
@PRIVATE
@JSON
@click.pass_obj
def doctor(
    permissions: Permissions, recipe: str | None, output: str | None, overrides: tuple[str, ...], as_json: bool
) -> None:
    """Check this machine, and what RECIPE needs of it. Exit code 1 where something would stop a run."""
    from cascade.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides) if recipe else None
    quiet_libraries()
    from cascade.planning.doctor import examine

    checks = examine(loaded, output, permissions)
    if as_json:
        click.echo(json.dumps([asdict(check) for check in checks]))
    else:
        width = max(len(check.name) for check in checks)
        for check in checks:
            cure = f" -> {check.do}" if check.do else ""
            click.echo(f"{check.status:8} {check.name:{width}}  {check.said}{cure}")
    if any(check.status == "fault" for check in checks):
        sys.exit(1)
