"""The stages that measure: what each reads, and what it writes."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cascade.data.blocks import IGNORE_INDEX, TokenBlocks
from cascade.evaluation.evaluate import default_device, evaluate
from cascade.evaluation.heldout import (
    PRODUCTION_METRICS,
    block_metrics,
)
from cascade.evaluation.retention import with_retention
from cascade.evaluation.tasks_lm_eval.task_options import HarnessOptions, TaskOptions
from cascade.models.architecture.model_class import reads_images
from cascade.models.checkpoint.load import (
    ModelSource,
    load_config,
    load_model,
    load_tokenizer,
)
from cascade.pipeline.context import Run
from cascade.pipeline.stage_output import Made
from cascade.pipeline.stages.heldout import heldout_text, production_text
from cascade.planning.inputs import (
    evaluation_settings,
    text_data,
)
from cascade.recipe.schema import Recipe
from cascade.report.block_sums import BLOCK_SUMS
from cascade.report.records import metrics_of
from cascade.report.skipped_rows import SKIPPED, merged_skipped
from cascade.report.write import resealed
from cascade.runtime import ranks
from cascade.runtime.errors import RunError
from cascade.runtime.files import write_atomically
from cascade.runtime.permissions import Permissions
from cascade.runtime.progress import OnStep
from cascade.runtime.secrets import redact_all
from cascade.store.commits import COST_FILE, INCOMPLETE, partial_of
from cascade.store.strict_json import write_json

_SHOWN_TOKENS, _SHOWN_LETTERS = 64, 80


def make_evaluation(run: Run, checkpoint: ModelSource, reference: Path | None, folder: Path, on_step: OnStep) -> None:
    """eval.json (metrics with retention, item scores), lm_eval.json (lm-eval's own result), the speed in cost.json.

    In heldout_blocks.json is what each block of held-out text adds to the metrics. The checkpoint's logits must be
    those in the file `reference`; None: nothing is compared. Before the parent's own evaluation is made, the checkpoint
    is the parent: it has no teacher, and skipped.json lists the rows of held-out and production text that were left
    out.

    Raises:
        RunError: something about the parent cannot be measured.
    """
    recipe, vocab_size, trained_with = run.recipe, run.vocab_size, run.parent.source
    teacher = None if run.parent_evaluation is None else run.teacher()
    bad = text_data(recipe.data).bad_row_counter()
    heldout = heldout_text(run, checkpoint, bad, vocab_size=vocab_size)
    result = evaluate(
        checkpoint,
        tasks=_task_options(recipe, run.runner.permissions, partial_of(folder) / "tasks"),
        teacher=teacher,
        heldout=heldout,
        vocab_size=vocab_size,
        reference=reference,
        trained_tokenizer=None if reads_images(load_config(trained_with)) else load_tokenizer(trained_with),
    )
    if result.failed and run.parent_evaluation is None:  # before anything is trained: nothing is lost by stopping here
        raise RunError(f"the parent's evaluation: {failures(result.failed)}")
    if recipe.data.production:
        model = load_model(checkpoint).to(default_device())
        production = production_text(run, checkpoint, bad, vocab_size=vocab_size)
        metrics, _ = block_metrics(model, teacher, production, vocab_size=vocab_size)
        result.metrics.extend(
            replace(metric, task="production") for metric in metrics if metric.metric in PRODUCTION_METRICS
        )
    parent_metrics, parent_items = result.metrics, result.items
    if run.parent_evaluation is not None:
        parent = run.parent_evaluation.json("eval.json")
        parent_metrics, parent_items = list(metrics_of(parent["metrics"])), parent["items"]
    metrics = with_retention(result.metrics, parent_metrics, result.items, parent_items, seed=recipe.seed)
    tail = None if result.tail is None else _with_beginnings(result.tail, heldout, checkpoint)
    write_json(folder / "eval.json", {"metrics": metrics, "items": result.items, "tail": tail})
    write_json(folder / "lm_eval.json", redact_all(result.raw))
    write_json(folder / COST_FILE, {"speed": result.speed})
    if result.blocks is not None:
        write_json(folder / BLOCK_SUMS, result.blocks)
    if run.parent_evaluation is None:
        write_json(folder / SKIPPED, bad.record())
    if result.failed:
        write_json(folder / INCOMPLETE, redact_all(result.failed))


def _task_options(recipe: Recipe, permissions: Permissions, results_folder: Path) -> TaskOptions:
    settings = recipe.evaluate
    harness = HarnessOptions(
        limit=settings.limit, num_fewshot=settings.num_fewshot, seed=recipe.seed, batch_size=settings.batch_size
    )
    folders = [Path(folder) for folder in settings.task_folders]
    return TaskOptions(
        names=settings.tasks,
        folders=folders,
        harness=harness,
        allow_code=permissions.task_code,
        results_folder=results_folder,
    )


def evaluate_checkpoint(run: Run, stage: str, owner: str, output: Made, reference: str) -> Made:
    """The evaluation of the checkpoint that a stage has left, with its reload gate; messages call it `reference`."""
    return run.runner.make(
        stage,
        owner,
        settings=evaluation_settings(run.recipe) | run.comparison_settings(),
        inputs=run.evaluation_inputs() | {"checkpoint": output},
        write=partial(make_evaluation, run, output.model(reference).source, output.folder / "reference.safetensors"),
    )


def failures(failed: dict[str, str]) -> str:
    """One sentence a task that could not be measured, with the reason."""
    return "; ".join(f"{name} could not be measured: {why}" for name, why in failed.items())


def block_ids(blocks: TokenBlocks) -> Tensor:
    """int64 [T]: the text's own ids, also where they are hidden from the model."""
    return torch.where(blocks.labels != IGNORE_INDEX, blocks.labels, blocks.input_ids).flatten().long()


def _with_beginnings(tail: dict[str, Any], heldout: Any, checkpoint: ModelSource) -> dict[str, Any]:
    """The long tail with blocks by how they begin, instead of by their numbers."""
    if not isinstance(heldout, TokenBlocks):
        return tail
    tokenizer = load_tokenizer(checkpoint)
    slices = []
    for block in tail["slices"]:
        row = torch.tensor([int(block["slice"])])
        text = tokenizer.decode(block_ids(heldout.rows(row))[:_SHOWN_TOKENS])
        slices.append(block | {"slice": " ".join(text.split())[:_SHOWN_LETTERS]})
    return tail | {"slices": slices}


def evaluate_parent(run: Run) -> Made:
    """The parent's own evaluation; skipped.json in the run directory lists the rows of text that were left out."""
    evaluation = run.runner.make(
        "evaluate",
        "parent",
        settings=evaluation_settings(run.recipe),
        inputs=run.evaluation_inputs(),
        write=partial(make_evaluation, run, run.parent.source, None),
    )
    if ranks.rank() == 0:
        skipped = merged_skipped({"training text": run.data.folder, "held-out text": evaluation.folder})
        write_beside(run.folder, SKIPPED, json.dumps(skipped, indent=1) + "\n" if skipped else "")
    return evaluation


def write_beside(run_folder: Path, name: str, text: str) -> None:
    """Write a file of the run directory, or remove it where there is no text for it."""
    path = run_folder / name
    if text == (path.read_text(encoding="utf-8") if path.exists() else ""):
        return
    with resealed(run_folder):
        if text:
            write_atomically(path, text)
        else:
            path.unlink()
