"""Copies of finished members in fewer bits: trained with rounded weights if asked, rounded, evaluated as any row."""

import json
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from cascade.cutting import selection_size
from cascade.data.examples import load_training
from cascade.distillation.options import Hooks
from cascade.distillation.range_test import find_learning_rate
from cascade.distillation.supervision import Selection
from cascade.distillation.trainer import distill
from cascade.estimates import flops_of
from cascade.evaluating import evaluation_settings, make_evaluation
from cascade.evaluation.evaluate import default_device
from cascade.evaluation.reload import write_reference
from cascade.models.checkpoint import (
    CHECKPOINT,
    ModelSource,
    copy_companions,
    load_config,
    load_model,
    save_checkpoint,
    stored_dtype,
)
from cascade.models.older_keys import add_older_keys
from cascade.models.quantised import load_rounded, round_while_training
from cascade.models.tensor_file import sort_metadata
from cascade.models.value_range import require_held
from cascade.progress import OnStep
from cascade.recipe.distill import WITHOUT_EFFECT
from cascade.recipe.finish import Finish
from cascade.recipe.schema import Recipe
from cascade.rows import RoundedCopy
from cascade.runner import StageRunner
from cascade.seeding import Shared
from cascade.store import COST_FILE, output_digest, partial_of, write_atomically
from cascade.training_options import execution_of, optimization_of, safekeeping_of, supervision_of


def make_copies(
    runner: StageRunner, recipe: Recipe, shared: Shared, owner: str, checkpoint: ModelSource, digest: str
) -> list[RoundedCopy]:
    """The copies that the recipe's `finish` asks for of one member, or of the parent; `digest` is its checkpoint's."""
    wanted = [entry for entry in recipe.finish if not entry.members or owner in entry.members]
    return [_make_copy(runner, recipe, shared, owner, checkpoint, digest, entry) for entry in wanted]


def _make_copy(
    runner: StageRunner,
    recipe: Recipe,
    shared: Shared,
    owner: str,
    checkpoint: ModelSource,
    digest: str,
    entry: Finish,
) -> RoundedCopy:
    compared = {} if shared.vocab_size is None else {"vocab_size": shared.vocab_size}
    settings: dict[str, Any] = {"quantise": entry.quantise, "dtype": recipe.save.dtype}
    inputs = {"checkpoint": digest}
    if entry.budget and recipe.distill is not None:
        settings |= {"budget": entry.budget, "learning_rate": entry.learning_rate, "seed": recipe.seed}
        unused = {"tokens", "examples", "teacher", "learning_rate", "features", "on_policy", *WITHOUT_EFFECT}
        settings |= {"training": recipe.distill.model_dump(mode="json", exclude=unused)} | compared
        inputs |= {"teacher": shared.digests["parent"], "data": shared.digests["data"]}
    made = runner.run(
        owner,
        "quantise",
        settings,
        inputs,
        lambda folder, on_step: make_rounded(folder, recipe, entry, checkpoint, shared, on_step),
    )
    evaluation = runner.run(
        owner,
        "evaluate-quantised",
        evaluation_settings(recipe) | compared,
        shared.digests | {"checkpoint": output_digest(made), "parent_evaluation": output_digest(shared.evaluation)},
        lambda folder, on_step: make_evaluation(
            folder,
            recipe,
            ModelSource(made / CHECKPOINT, f"{owner}-{entry.suffix}"),
            teacher=shared.teacher(),
            parent_evaluation=shared.evaluation,
            reference=made / "reference.safetensors",
            trained_with=shared.parent,
            vocab_size=shared.vocab_size,
        ),
    )
    return RoundedCopy(
        name=f"{owner}-{entry.suffix}",
        kind=entry.quantise,
        made=made,
        evaluation=evaluation,
        num_tokens=entry.budget,
    )


def make_rounded(
    folder: Path,
    recipe: Recipe,
    entry: Finish,
    checkpoint: ModelSource,
    shared: Shared,
    on_step: OnStep,
) -> None:
    """The copy as a checkpoint that transformers reads (with torchao), and logits for the reload gate."""
    plain, source = load_model(checkpoint), checkpoint.folder
    dtype = stored_dtype(checkpoint)
    if recipe.save.dtype != "parent":
        dtype = getattr(torch, recipe.save.dtype)
    with TemporaryDirectory() as temporary:
        if entry.budget:
            student = load_model(checkpoint).to(default_device())
            round_while_training(student, entry.quantise)
            _train(folder, recipe, entry, student, shared, on_step)
            plain.load_state_dict(student.state_dict())
            source = Path(temporary)
            save_checkpoint(plain, source, companions=None, dtype=dtype)
            per_token = flops_of(recipe, load_config(shared.parent))
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


def _train(folder: Path, recipe: Recipe, entry: Finish, student: nn.Module, shared: Shared, on_step: OnStep) -> None:
    """Recovery with rounded weights, by the recipe's own way; no feature losses, nothing the student writes."""
    if recipe.distill is None:
        raise ValueError("a quantisation-aware training needs a distill section")
    teacher, vocab_size = shared.teacher(), None if recipe.counts_examples else shared.vocab_size
    blocks = load_training(shared.data / "train.safetensors")
    selection = load_training(shared.data / "selection.safetensors").take(selection_size(recipe))
    # Rounded weights were not measured with Muon: what is settled for recoveries is not for them.
    optimizer = "adamw" if recipe.distill.optimizer == "auto" else recipe.distill.optimizer
    supervision = replace(supervision_of(recipe.distill, vocab_size), on_policy=None)
    optimization = optimization_of(recipe.distill, learning_rate=0.0, optimizer=optimizer, seed=recipe.seed)
    execution = replace(execution_of(recipe.distill), compiled=False)
    rate_file = partial_of(folder) / "rate.json"  # a run that was killed goes on at the rate that it had found
    rate = entry.learning_rate
    if rate == "auto" and rate_file.exists():
        rate = float(json.loads(rate_file.read_text(encoding="utf-8")))
    if rate == "auto":
        rate = find_learning_rate(
            student,
            teacher,
            blocks,
            num_tokens=entry.budget,
            selection=selection,
            supervision=supervision,
            optimization=optimization,
            execution=execution,
            on_try=on_step,
        ).learning_rate
        rate_file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(rate_file, json.dumps(rate))
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
