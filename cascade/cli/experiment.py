"""`cascade experiment`: several ways to make a family, compared."""

import json

import click

from cascade.cli.options import JSON, PRIVATE, TASK_CODE, interruptible, quiet_libraries
from cascade.runtime.permissions import Permissions


@click.command()
@click.argument("file", type=click.Path(dir_okay=False))
@click.option(
    "--output", type=click.Path(file_okay=False), help="Where cells and tables go (default: runs/experiments/NAME)."
)
@click.option("--only", multiple=True, metavar="ARM", help="Make the cells of this arm only; repeatable.")
@click.option("--list", "listed", is_flag=True, help="Show the cells, which are done and the time of the rest.")
@TASK_CODE
@PRIVATE
@JSON
@click.pass_obj
def experiment(
    permissions: Permissions, file: str, output: str | None, only: tuple[str, ...], listed: bool, as_json: bool
) -> None:
    """Make the families of FILE (arms x seeds x token budgets, over one parent) and say which arms are better.

    Goes on where an earlier start stopped. The keys of FILE: docs/experiment.md.
    """
    from cascade.pipeline.experiment.comparison import experiment_texts, list_texts, load_experiment_summary
    from cascade.recipe.experiment import load_experiment

    load_experiment(file)  # what is wrong with it is told before the libraries are loaded
    quiet_libraries()
    from cascade.pipeline.experiment.run import list_experiment, run_experiment

    if listed:
        listed_cells = list_experiment(file, output=output, only=only, permissions=permissions)
        click.echo(json.dumps(listed_cells) if as_json else list_texts(listed_cells))
        return
    with interruptible():
        folder = run_experiment(file, output=output, only=only, permissions=permissions)
    click.echo(json.dumps(load_experiment_summary(folder)) if as_json else experiment_texts(folder))
