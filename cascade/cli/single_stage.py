"""`cascade prune`, `distill` and `evaluate`: one stage on models and text that are named on the command line."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from cascade.cli.options import (
    ABOVE_ZERO,
    BLOCK,
    DATA,
    JSON,
    NOTHING_KEPT,
    POSITIVE,
    TASK_CODE,
    as_record,
    dims_of_texts,
    finish,
    interruptible,
    quiet_libraries,
)
from cascade.distillation.losses.divergences import DIVERGENCES
from cascade.pruning.importance.table import HIDDEN_SCORES
from cascade.runtime.errors import UserError
from cascade.runtime.permissions import Permissions


@dataclass(frozen=True, kw_only=True)
class PruneOptions:
    """The options of `cascade prune`, by the names that they have there."""

    model: str
    params: float | None
    dims: tuple[str, ...]
    output: str
    calibration_blocks: int
    data: str | None
    block_size: int
    hidden: str
    repair: bool
    offload: bool
    plan: str | None
    as_json: bool


@click.command()
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
    type=click.Choice(["auto", *HIDDEN_SCORES]),
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
@as_record(PruneOptions)
def prune(options: PruneOptions) -> None:
    """Score MODEL on calibration text, cut it to a size and repair it in closed form, without training.

    With --plan, only the cut: from disk to disk, one tensor at a time. With --offload, the scores too, without repair.
    """
    quiet_libraries()
    from cascade.pipeline.single_stage import Text, prune_model, prune_model_on_disk
    from cascade.pruning.size.target import Target

    if options.plan is not None:
        _refuse_beside_plan(click.get_current_context())
        with interruptible(NOTHING_KEPT):
            result = prune_model_on_disk(options.model, Path(options.plan), Path(options.output))
            finish(result, options.as_json)
        return
    if options.offload and options.repair:
        raise UserError("--offload cannot repair: that needs the cut model in memory; add --no-repair")
    target = Target(params=options.params, dims=dims_of_texts(options.dims))
    with interruptible(NOTHING_KEPT):
        result = prune_model(
            options.model,
            target,
            Path(options.output),
            text=Text(data=options.data, block_size=options.block_size, num_blocks=options.calibration_blocks),
            hidden=options.hidden,
            repaired=options.repair,
            offload=options.offload,
        )
    finish(result, options.as_json)


def _refuse_beside_plan(context: click.Context) -> None:
    """Refuse the options that a plan answers already."""
    typed = {name for name in context.params if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    refused = typed - {"model", "output", "plan", "as_json"}
    if refused:
        named = ", ".join(option.opts[0] for option in context.command.params if option.name in refused)
        raise UserError(f"--plan already says how MODEL is cut, and cuts only; leave out: {named}")


@dataclass(frozen=True, kw_only=True)
class DistillOptions:
    """The options of `cascade distill`, by the names that they have there."""

    student: str
    teacher: str
    tokens: int
    output: str
    learning_rate: float | None
    batch_size: int
    loss: str
    temperature: float
    seed: int
    data: str | None
    block_size: int
    as_json: bool


@click.command()
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
@as_record(DistillOptions)
def distill(options: DistillOptions) -> None:
    """Train STUDENT to predict what a teacher predicts."""
    quiet_libraries()
    from cascade.distillation.options import Objective, Optimization
    from cascade.pipeline.single_stage import Recovery, Text, distill_model

    optimization = Optimization(batch_size=options.batch_size, seed=options.seed)
    if options.learning_rate is not None:
        optimization = replace(optimization, learning_rate=options.learning_rate)
    recovery = Recovery(
        num_tokens=options.tokens,
        objective=Objective(options.loss, options.temperature),
        optimization=optimization,
        search_rate=options.learning_rate is None,
    )
    text = Text(data=options.data, block_size=options.block_size)
    with interruptible(NOTHING_KEPT):
        result = distill_model(options.student, options.teacher, Path(options.output), text=text, recovery=recovery)
        finish(result, options.as_json)


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """The options of `cascade evaluate`, by the names that they have there."""

    checkpoint: str
    tasks: tuple[str, ...]
    task_folders: tuple[str, ...]
    teacher: str | None
    limit: int | None
    heldout_blocks: int
    data: str | None
    block_size: int
    as_json: bool


@click.command()
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
@as_record(EvaluateOptions)
def evaluate(options: EvaluateOptions) -> None:
    """Measure CHECKPOINT: held-out loss, tasks, speed and memory."""
    quiet_libraries()
    permissions: Permissions = click.get_current_context().obj
    from cascade.evaluation.tasks_lm_eval.task_options import HarnessOptions, TaskOptions
    from cascade.pipeline.single_stage import Text, evaluate_model

    tasks = TaskOptions(
        names=options.tasks,
        folders=[Path(folder) for folder in options.task_folders],
        harness=HarnessOptions(limit=options.limit),
        allow_code=permissions.task_code,
    )
    text = Text(data=options.data, block_size=options.block_size, num_blocks=options.heldout_blocks)
    with interruptible(NOTHING_KEPT):
        result = evaluate_model(options.checkpoint, text=text, tasks=tasks, teacher=options.teacher)
    finish(result if options.as_json else _evaluation_lines(result), options.as_json)


def _evaluation_lines(result: dict[str, Any]) -> dict[str, Any]:
    """An evaluation with a line for each metric, its standard error behind it."""
    lines = {
        f"{metric['task']}/{metric['metric']}": f"{metric['value']}"
        + (f" ± {metric['stderr']:.2g}" if metric["stderr"] else "")
        for metric in result["metrics"]
    }
    speed: dict[str, Any] = result["speed"]
    return {"checkpoint": result["checkpoint"], "text": result["text"]} | lines | speed
