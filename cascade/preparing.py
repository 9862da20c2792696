"""The stages that all members share: the parent, the text, the parent's evaluation, production text."""

import json
from pathlib import Path
from typing import Any

from cascade import parallel
from cascade.classifier import make_fitted, new_padding
from cascade.evaluating import evaluation_settings, make_drift, make_evaluation
from cascade.inputs import data_fingerprint, framing_settings, production_fingerprint, task_fingerprint
from cascade.models.checkpoint import (
    CHECKPOINT,
    ModelSource,
    fingerprint,
    load_config,
    load_tokenizer,
    resolve_model,
)
from cascade.models.dims import dims_of
from cascade.parent import existing_parent, make_converted, make_pretrained
from cascade.recipe.schema import Recipe
from cascade.report.production import DRIFT
from cascade.report.skipped import SKIPPED, merged_skipped
from cascade.report.write import resealed
from cascade.runner import StageRunner
from cascade.seeding import Shared
from cascade.stages import CLASSIFYING, make_data, reads_logprobs
from cascade.store import output_digest, write_atomically


def make_parent(runner: StageRunner, recipe: Recipe) -> ModelSource:
    """The parent as a folder of safetensors: found, trained, or converted."""
    found = existing_parent(recipe)
    if found is None and recipe.parent.pretrain is not None:
        settings = recipe.parent.pretrain.model_dump(exclude={"microbatch_size"}) | {
            "seed": recipe.seed,
            "dtype": recipe.save.dtype,
            "text_field": recipe.data.text_field,
            "weights": recipe.data.weights,
            "document_masks": recipe.data.masks_documents,
        }
        if settings["optimizer"] == "adamw":  # runs from before there was a choice stay finished
            del settings["optimizer"]
        if recipe.task == "masked_language":
            settings |= {"task": recipe.task, "mask_copies": recipe.data.mask_copies}
        folder = runner.run(
            "parent",
            "pretrain",
            settings,
            {"source": data_fingerprint(recipe.data)},
            lambda folder, on_step: make_pretrained(folder, recipe, on_step),
        )
        return ModelSource(folder / CHECKPOINT, recipe.name)
    if recipe.parent.fit is not None:
        return _fitted(runner, recipe)
    if found is None:
        raise ValueError("a parent is either found or trained")
    if not found.gguf_file:
        return found
    folder = runner.run(
        "parent",
        "convert",
        {},
        {"gguf": fingerprint(found)},
        lambda folder, on_step: make_converted(folder, found),
    )
    return ModelSource(folder / CHECKPOINT, found.reference)


def _fitted(runner: StageRunner, recipe: Recipe) -> ModelSource:
    data, model = recipe.data, recipe.parent.model
    settings = recipe.parent.fit.model_dump(exclude={"microbatch_size"}) if recipe.parent.fit else {}
    settings |= data.model_dump(include={"text_field", "label_field", "image_field", "max_length"})
    token = new_padding(recipe)
    settings |= {"pad_token": token} if token else {}
    folder = runner.run(
        "parent",
        "fit",
        settings | {"task": recipe.task, "seed": recipe.seed, "dtype": recipe.save.dtype},
        {
            "source": data_fingerprint(data.model_copy(update={"unlabelled": []})),
            "model": fingerprint(resolve_model(model, revision=recipe.parent.revision)) if model else "",
        },
        lambda folder, on_step: make_fitted(folder, recipe, on_step),
    )
    return ModelSource(folder / CHECKPOINT, model or recipe.name)


def prepare(runner: StageRunner, recipe: Recipe, parent: ModelSource) -> Shared:
    """The stages that all members share: data, the parent's evaluation."""
    source = data_fingerprint(recipe.data)
    vocab_size = dims_of(load_config(parent)).vocab_size
    tokenizer = load_tokenizer(parent, vocab_size=vocab_size) if vocab_size else None
    digests = {"source": source, "parent": fingerprint(parent), "tasks": task_fingerprint(recipe)}
    digests |= {"production": production_fingerprint(recipe.data)} if recipe.data.production else {}
    data = runner.run(
        "parent",
        "data",
        recipe.data.model_dump(
            include={
                "source",
                "text_field",
                "messages_field",
                "template",
                "weights",
                "streaming",
                "block_size",
                "max_tokens",
            }
        )  # fmt: skip
        | {"document_masks": recipe.data.masks_documents}
        | framing_settings(recipe)
        | ({"mask_copies": recipe.data.mask_copies, "seed": recipe.seed} if recipe.task == "masked_language" else {})
        | ({"listed": True} if reads_logprobs(recipe) else {})
        | ({"turns": recipe.data.turns} if recipe.data.turns != "all" else {})
        | (_classifying(recipe) if recipe.counts_examples else {}),
        {name: digests[name] for name in ("source", "parent")},
        lambda folder, on_step: make_data(folder, recipe, parent, tokenizer),
    )
    evaluation = runner.run(
        "parent",
        "evaluate",
        evaluation_settings(recipe),
        digests,
        lambda folder, on_step: make_evaluation(
            folder, recipe, parent, teacher=None, parent_evaluation=None, reference=None, trained_with=parent
        ),
    )
    if parallel.rank() == 0:
        skipped = merged_skipped({"training text": data, "held-out text": evaluation})
        _write_beside(runner.folder, SKIPPED, json.dumps(skipped, indent=1) + "\n" if skipped else "")
    return Shared(parent, data, evaluation, digests | {"data": output_digest(data)}, [])


def compare_with_production(runner: StageRunner, recipe: Recipe, shared: Shared) -> None:
    """drift.json in the run directory; none without production text."""
    if not recipe.data.production:
        if parallel.rank() == 0:
            _write_beside(runner.folder, DRIFT, "")
        return
    folder = runner.run(
        "parent",
        "drift",
        evaluation_settings(recipe, heldout_only=True),
        {name: shared.digests[name] for name in ("source", "parent", "data", "production")},
        lambda folder, on_step: make_drift(folder, recipe, shared.parent, shared.teacher(), shared.data),
    )
    if parallel.rank() == 0:
        _write_beside(runner.folder, DRIFT, (folder / DRIFT).read_text(encoding="utf-8"))


def _write_beside(run_folder: Path, name: str, text: str) -> None:
    """A file of the run directory that says what a stage did; without text there is none."""
    path = run_folder / name
    if text == (path.read_text(encoding="utf-8") if path.exists() else ""):
        return
    with resealed(run_folder):
        if text:
            write_atomically(path, text)
        else:
            path.unlink()


def _classifying(recipe: Recipe) -> dict[str, Any]:
    """What a classifier's examples depend on besides their files."""
    rest = "rest" in recipe.data.unlabelled
    return recipe.data.model_dump(include=CLASSIFYING) | {"task": recipe.task, "rest": rest}
