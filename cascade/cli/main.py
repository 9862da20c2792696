"""The command line: load, validate, call. Exit codes: docs/cli.md."""

import json
import logging
import os

import click

from cascade import __version__
from cascade.cli.cache import cache
from cascade.cli.experiment import experiment
from cascade.cli.options import (
    JSON,
    OUTPUT,
    PRIVATE,
    RECIPE,
    SET,
    TASK_CODE,
    CommandGroup,
    finish,
    interruptible,
    quiet_libraries,
)
from cascade.cli.runs import doctor, report, verify
from cascade.cli.single_stage import distill, evaluate, prune
from cascade.runtime.failpoints import arm
from cascade.runtime.permissions import Permissions
from cascade.runtime.secrets import Redacting, redact_tracebacks
from cascade.store.stage_table import REMAKE_POINTS


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Turn one language model into a family of smaller ones."""
    handler = logging.StreamHandler()
    handler.setFormatter(Redacting("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    redact_tracebacks()
    arm(os.environ)
    # Progress is ours to show; the libraries' own bars would run across it.
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


for _command in (cache, experiment, report, verify, doctor):
    main.add_command(_command)


@main.command()
@RECIPE
@OUTPUT
@SET
@TASK_CODE
@PRIVATE
@click.option("--only", multiple=True, metavar="MEMBER", help="Make only this member (and what it is cut from).")
@click.option(
    "--from",
    "from_stage",
    metavar="STAGE",
    help=f"Make the stages again from here: {', '.join(REMAKE_POINTS)}.",
)
@JSON
@click.pass_obj
def run(
    permissions: Permissions,
    recipe: str,
    output: str | None,
    overrides: tuple[str, ...],
    only: tuple[str, ...],
    from_stage: str | None,
    as_json: bool,
) -> None:
    """Make the whole family of RECIPE, or go on where an earlier run stopped."""
    from cascade.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides)
    quiet_libraries()
    from cascade.pipeline.run import run_recipe
    from cascade.report.summary import run_summary, run_texts
    from cascade.runtime import ranks

    with interruptible():
        folder = run_recipe(loaded, output=output, only=only, from_stage=from_stage, permissions=permissions)
    is_follower = ranks.rank() > 0
    ranks.leave()
    if is_follower:
        return
    click.echo(json.dumps(run_summary(folder)) if as_json else run_texts(folder))


@main.command()
@RECIPE
@OUTPUT
@SET
@TASK_CODE
@PRIVATE
@JSON
@click.pass_obj
def plan(permissions: Permissions, recipe: str, output: str | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Check RECIPE and say what would be made, how large and how long. Loads no weights."""
    from cascade.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides)
    quiet_libraries()
    from cascade.planning.preview import preview
    from cascade.planning.preview_text import preview_text

    family_preview = preview(loaded, output, permissions)
    click.echo(json.dumps(family_preview) if as_json else preview_text(family_preview))


@main.command()
@RECIPE
@OUTPUT
@SET
@click.option(
    "--filter",
    "filter_path",
    default="",
    metavar="FILE.py:NAME",
    help="Your own function (messages, answer) -> bool, which says whether an answer is kept.",
)
@PRIVATE
@JSON
@click.pass_obj
def generate(
    permissions: Permissions,
    recipe: str,
    output: str | None,
    overrides: tuple[str, ...],
    filter_path: str,
    as_json: bool,
) -> None:
    """Let the teacher of RECIPE's `generate` section write its dataset, or go on where it was stopped.

    `cascade run` does so by itself; with --filter, give the dataset that is printed to a recipe as data.train.
    """
    from cascade.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides)
    quiet_libraries()
    from cascade.pipeline.run import run_generate

    with interruptible():
        summary = run_generate(loaded, output=output, filter_path=filter_path, permissions=permissions)
        finish(summary, as_json)


for _command in (prune, distill, evaluate):
    main.add_command(_command)
