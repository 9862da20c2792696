"""The command line: load, validate, call. Exit codes: docs/cli.md."""

import json
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from cascade import __version__
from cascade.cli.cache import cache
from cascade.cli.experiment import experiment
from cascade.cli.options import (
    ABOVE_ZERO,
    BLOCK,
    DATA,
    JSON,
    NOTHING_KEPT,
    OUTPUT,
    POSITIVE,
    PRIVATE,
    RECIPE,
    SET,
    TASK_CODE,
    CommandGroup,
    dims_of_texts,
    finish,
    interruptible,
    quiet_libraries,
)
from cascade.cli.runs import doctor, report, verify
from cascade.distillation.losses.divergences import DIVERGENCES
from cascade.runtime.errors import UserError
from cascade.runtime.failpoints import arm
from cascade.runtime.permissions import Permissions
from cascade.runtime.secrets import Redacting, redact_tracebacks


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Turn one language model into a family of smaller ones."""
    shown = logging.StreamHandler()
    shown.setFormatter(Redacting("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[shown])
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
    help="Make the stages again from here: statistics, prune, distill, evaluate, report.",
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
    others = ranks.rank() > 0
    ranks.leave()
    if others:
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
    from cascade.planning.preview import preview, preview_text

    found = preview(loaded, output, permissions)
    click.echo(json.dumps(found) if as_json else preview_text(found))


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


@main.command()
@click.argument("model")
@click.option("--params", type=ABOVE_ZERO, help="Parameters to keep: a fraction (at most 1) or a number.")
@click.option("--dim", "dims", multiple=True, metavar="NAME=N", help="An explicit dim, such as num_hidden_layers=4.")
@click.option(
    "--output",
    required=True,
    type=click.Path(file_okay=False),
    help="Folder for the cut checkpoint and its plan.json.",
)
@click.option(
    "--calibration-blocks", default=64, type=POSITIVE, show_default=True, help="Blocks that importance is scored on."
)
@click.option(
    "--hidden",
    default="auto",
    type=click.Choice(["auto", "activation_norm", "pca"]),
    show_default=True,
    help="Importance score of hidden channels; pca rotates the stream first; auto: pca where it is legal and cheap.",
)
@click.option(
    "--repair/--no-repair", default=True, show_default=True, help="Refit the remaining weights in closed form."
)
@click.option(
    "--offload", is_flag=True, help="Read MODEL layer by layer and cut it on disk, for a model larger than memory."
)
@click.option("--plan", type=click.Path(exists=True, dir_okay=False), help="A plan.json to carry out on disk.")
@DATA
@BLOCK
@JSON
@click.pass_context
def prune(
    context: click.Context,
    model: str,
    params: float | None,
    dims: tuple[str, ...],
    output: str,
    calibration_blocks: int,
    data: str | None,
    block_size: int,
    hidden: str,
    repair: bool,
    offload: bool,
    plan: str | None,
    as_json: bool,
) -> None:
    """Score MODEL on calibration text, cut it to a size and repair it in closed form, without training.

    With --plan, only the cut: from disk to disk, one tensor at a time. With --offload, the scores too, without repair.
    """
    quiet_libraries()
    from cascade.pipeline.single_stage import prune_model, prune_model_on_disk

    if plan is not None:
        given = [name for name in context.params if name not in ("model", "output", "plan", "as_json")]
        own = [name for name in given if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE]
        if own:
            named = ", ".join(option.opts[0] for option in context.command.params if option.name in own)
            raise UserError(f"--plan already says how MODEL is cut, and cuts only; leave out: {named}")
        with interruptible(NOTHING_KEPT):
            finish(prune_model_on_disk(model, Path(plan), Path(output)), as_json)
        return
    if offload and repair:
        raise UserError("--offload cannot repair: that needs the cut model in memory; add --no-repair")
    options: dict[str, Any] = {"hidden": hidden, "repaired": repair, "offload": offload}
    wanted = dims_of_texts(dims)
    with interruptible(NOTHING_KEPT):
        found = prune_model(model, params, wanted, Path(output), calibration_blocks, data, block_size, **options)
    finish(found, as_json)


@main.command()
@click.argument("student")
@click.option("--teacher", required=True, help="The model to learn from.")
@click.option("--tokens", required=True, type=POSITIVE, help="Training tokens.")
@click.option(
    "--output",
    required=True,
    type=click.Path(file_okay=False),
    help="Folder for the trained checkpoint and its log.jsonl.",
)
@click.option("--learning-rate", type=ABOVE_ZERO, help="Peak learning rate; found by short trainings where not given.")
@click.option("--batch-size", default=8, type=POSITIVE, show_default=True, help="Blocks per optimizer step.")
@click.option(
    "--loss",
    default="forward_kl",
    type=click.Choice(list(DIVERGENCES)),
    show_default=True,
    help="The divergence from the teacher.",
)
@click.option(
    "--temperature",
    default=1.0,
    type=ABOVE_ZERO,
    show_default=True,
    help="Divides the logits of both models in the loss.",
)
@click.option("--seed", default=0, show_default=True, help="Random seed.")
@DATA
@BLOCK
@JSON
def distill(
    student: str,
    teacher: str,
    tokens: int,
    output: str,
    learning_rate: float | None,
    batch_size: int,
    loss: str,
    temperature: float,
    seed: int,
    data: str | None,
    block_size: int,
    as_json: bool,
) -> None:
    """Train STUDENT to predict what a teacher predicts."""
    quiet_libraries()
    from cascade.distillation.options import Objective, Optimization
    from cascade.pipeline.single_stage import distill_model

    optimization = Optimization(batch_size=batch_size, seed=seed)
    if learning_rate is not None:
        optimization = replace(optimization, learning_rate=learning_rate)
    with interruptible(NOTHING_KEPT):
        result = distill_model(
            student,
            teacher,
            Path(output),
            data,
            block_size,
            num_tokens=tokens,
            objective=Objective(loss, temperature),
            optimization=optimization,
            search_rate=learning_rate is None,
        )
        finish(result, as_json)


@main.command()
@click.argument("checkpoint")
@click.option("--task", "tasks", multiple=True, help="An lm-eval task; repeatable.")
@click.option(
    "--task-folder",
    "task_folders",
    multiple=True,
    type=click.Path(file_okay=False),
    help="A folder of lm-eval task files; repeatable.",
)
@click.option("--teacher", help="Also measure KL to this model on the held-out text.")
@click.option("--limit", type=POSITIVE, help="Items per task.")
@click.option("--heldout-blocks", default=128, type=POSITIVE, show_default=True, help="Blocks of held-out text.")
@TASK_CODE
@DATA
@BLOCK
@JSON
@click.pass_obj
def evaluate(
    permissions: Permissions,
    checkpoint: str,
    tasks: tuple[str, ...],
    task_folders: tuple[str, ...],
    teacher: str | None,
    limit: int | None,
    heldout_blocks: int,
    data: str | None,
    block_size: int,
    as_json: bool,
) -> None:
    """Measure CHECKPOINT: held-out loss, tasks, speed and memory."""
    quiet_libraries()
    from cascade.evaluation.tasks_lm_eval.task_options import HarnessOptions, TaskOptions
    from cascade.pipeline.single_stage import evaluate_model

    options = TaskOptions(
        names=tasks,
        folders=[Path(folder) for folder in task_folders],
        harness=HarnessOptions(limit=limit),
        allow_code=permissions.task_code,
    )
    with interruptible(NOTHING_KEPT):
        found = evaluate_model(checkpoint, options, teacher, heldout_blocks, data, block_size)
    if not as_json:
        lines = {
            f"{metric['task']}/{metric['metric']}": f"{metric['value']}"
            + (f" ± {metric['stderr']:.2g}" if metric["stderr"] else "")
            for metric in found["metrics"]
        }
        found = {"checkpoint": found["checkpoint"], "text": found["text"]} | lines | found["speed"]
    finish(found, as_json)
