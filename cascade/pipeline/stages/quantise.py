"""The stages quantise and evaluate-quantised: copies of members, or of the parent, in fewer bits.

Depends on: an entry of the recipe's `finish` and the checkpoint; with a training budget also on the parent, the data
and `distill`. Leaves: the rounded `checkpoint/` and logits for the reload gate; after a training its log and losses.
"""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from cascade.data.examples import load_training
from cascade.distillation.options import Hooks
from cascade.distillation.range_test import find_learning_rate
from cascade.distillation.supervision import Lesson, Selection
from cascade.distillation.trainer import distill
from cascade.evaluation.evaluate import default_device
from cascade.evaluation.reload import write_reference
from cascade.models.checkpoint.load import (
    CHECKPOINT,
    ModelSource,
    copy_companions,
    load_config,
    load_model,
    save_checkpoint,
    stored_dtype,
)
from cascade.models.checkpoint.older_keys import add_older_keys
from cascade.models.checkpoint.quantised import load_rounded, round_while_training
from cascade.models.checkpoint.tensor_file import sort_metadata
from cascade.models.checkpoint.value_range import require_held
from cascade.pipeline.context import Run
from cascade.pipeline.rows import RoundedCopy
from cascade.pipeline.stage_output import Checkpoint, Input
from cascade.pipeline.stages.data import load_selection
from cascade.pipeline.stages.evaluate import evaluate_checkpoint
from cascade.pipeline.training_options import execution_of, optimization_of, safekeeping_of, supervision_of
from cascade.planning.estimates import flops_of
from cascade.recipe.distill import WITHOUT_EFFECT
from cascade.recipe.finish import Finish
from cascade.runtime.files import read_json, write_atomically
from cascade.runtime.progress import OnStep
from cascade.store.commits import COST_FILE, partial_of


def make_copies(run: Run, owner: str, checkpoint: Checkpoint) -> list[RoundedCopy]:
    """The copies of a member, or of the parent, by the entries of the recipe's `finish`."""
    entries = [entry for entry in run.recipe.finish if not entry.members or owner in entry.members]
    return [_make_copy(run, owner, checkpoint, entry) for entry in entries]


def _make_copy(run: Run, owner: str, checkpoint: Checkpoint, entry: Finish) -> RoundedCopy:
    name, recipe = f"{owner}-{entry.suffix}", run.recipe
    settings: dict[str, Any] = {"quantise": entry.quantise, "dtype": recipe.save.dtype}
    inputs: dict[str, Input] = {"checkpoint": checkpoint}
    if entry.budget and recipe.distill is not None:
        settings |= {"budget": entry.budget, "learning_rate": entry.learning_rate, "seed": recipe.seed}
        unused = {"tokens", "examples", "teacher", "learning_rate", "features", "on_policy", *WITHOUT_EFFECT}
        settings |= {"training": recipe.distill.model_dump(mode="json", exclude=unused)}
        settings |= run.comparison_settings()
        inputs |= {"teacher": run.parent, "data": run.data}
    rounded = run.runner.make(
        "quantise",
        owner,
        settings=settings,
        inputs=inputs,
        write=partial(make_rounded, run, checkpoint.source, entry),
    )
    evaluation = evaluate_checkpoint(run, "evaluate-quantised", owner, rounded, name)
    return RoundedCopy(name=name, kind=entry.quantise, rounded=rounded, evaluation=evaluation, num_tokens=entry.budget)


def make_rounded(run: Run, checkpoint: ModelSource, entry: Finish, folder: Path, on_step: OnStep) -> None:
    """Write a copy as a checkpoint that transformers reads (with torchao), and logits for the reload gate.

    Raises:
        UserError: the recipe's dtype cannot hold the weights.
    """
    recipe = run.recipe
    plain, source = load_model(checkpoint), checkpoint.folder
    dtype = stored_dtype(checkpoint)
    if recipe.save.dtype != "parent":
        dtype = getattr(torch, recipe.save.dtype)
    with TemporaryDirectory() as temporary:
        if entry.budget:
            student = load_model(checkpoint).to(default_device())
            round_while_training(student, entry.quantise)
            _train(run, entry, student, folder, on_step)
            plain.load_state_dict(student.state_dict())
            source = Path(temporary)
            save_checkpoint(plain, source, companions=None, dtype=dtype)
            per_token = flops_of(recipe, load_config(run.parent.source))
            (folder / COST_FILE).write_text(json.dumps({"teacher_flops_per_token": per_token}), encoding="utf-8")
        require_held(plain.named_parameters(), dtype, f"finish: {checkpoint.reference}")
        rounded: Any = load_rounded(source, plain, entry.quantise, dtype)
    # As for members: the parent's own is copied below, and transformers refuses to write some that it reads.
    rounded.generation_config = GenerationConfig.from_model_config(rounded.config)
    rounded.save_pretrained(folder / CHECKPOINT)
    add_older_keys(folder / CHECKPOINT)
    for path in (folder / CHECKPOINT).glob("*.safetensors"):
        sort_metadata(path)
    copy_companions(checkpoint.folder, folder / CHECKPOINT)
    write_reference(rounded, folder / "reference.safetensors", folder=folder / CHECKPOINT)


def _train(run: Run, entry: Finish, student: nn.Module, folder: Path, on_step: OnStep) -> None:
    """Train the student with rounded weights by the recipe's `distill`, without feature losses or on-policy text."""
    recipe = run.recipe
    if recipe.distill is None:
        raise ValueError("a quantisation-aware training needs a distill section")
    teacher, vocab_size = run.teacher(), None if recipe.counts_examples else run.vocab_size
    blocks, selection = load_training(run.data.folder / "train.safetensors"), load_selection(run)
    # Rounded weights were not measured with Muon: what is settled for recoveries is not for them.
    optimizer = "adamw" if recipe.distill.optimizer == "auto" else recipe.distill.optimizer
    supervision = replace(supervision_of(recipe.distill, vocab_size), on_policy=None)
    optimization = optimization_of(recipe.distill, learning_rate=0.0, optimizer=optimizer, seed=recipe.seed)
    execution = replace(execution_of(recipe.distill), compiled=False)
    rate_path = partial_of(folder) / "rate.json"  # a run that was killed goes on at the rate that it had found
    rate = entry.learning_rate
    if rate == "auto" and rate_path.exists():
        rate = float(read_json(rate_path))
    if rate == "auto":
        lesson = Lesson(
            student=student,
            teacher=teacher,
            blocks=blocks,
            selection=selection,
            supervision=supervision,
            optimization=optimization,
        )
        search = find_learning_rate(lesson, num_tokens=entry.budget, execution=execution, on_try=on_step)
        rate = search.learning_rate
        rate_path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(rate_path, json.dumps(rate))
    metrics = distill(
        student,
        teacher,
        blocks,
        num_tokens=entry.budget,
        supervision=supervision,
        optimization=replace(optimization, learning_rate=rate),
        execution=execution,
        selection=Selection(blocks=selection, every=recipe.distill.selection_every),
        safekeeping=safekeeping_of(recipe.distill, partial_of(folder)),
        hooks=Hooks(log_path=folder / "log.jsonl", on_step=on_step),
    )
    losses = {"loss": metrics.selection_loss, "kl_to_teacher": metrics.selection_kl, "learning_rate": rate}
    (folder / "losses.json").write_text(json.dumps(losses) + "\n", encoding="utf-8")
