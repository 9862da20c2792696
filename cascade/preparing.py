"""The stages that all members share: the parent, the text, the parent's evaluation, production text."""

import json
from functools import partial
from pathlib import Path
from typing import Any

from cascade import parallel
from cascade.classifier import new_padding
from cascade.context import Run
from cascade.evaluating import make_drift, make_evaluation
from cascade.inputs import (
    data_fingerprint,
    evaluation_settings,
    framing_settings,
    production_fingerprint,
    task_fingerprint,
)
from cascade.models.checkpoint import (
    ModelSource,
    fingerprint,
    load_config,
    load_tokenizer,
    resolve_model,
)
from cascade.models.dims import dims_of
from cascade.parent import existing_parent
from cascade.pretraining import make_pretrained
from cascade.recipe.schema import Recipe
from cascade.report.production import DRIFT
from cascade.report.skipped import SKIPPED, merged_skipped
from cascade.report.write import resealed
from cascade.runner import StageRunner
from cascade.stage_convert import make_converted
from cascade.stage_fit import make_fitted
from cascade.stage_output import Checkpoint, Made
from cascade.stages import CLASSIFYING, make_data, reads_logprobs
from cascade.store import write_atomically

_PACKING = {
    "source",
    "text_field",
    "messages_field",
    "template",
    "weights",
    "streaming",
    "block_size",
    "max_tokens",
}
"""Keys of data that the packed text depends on, besides those that have a say in some tasks alone."""


def make_parent(runner: StageRunner, recipe: Recipe) -> ModelSource:
    """The parent as a folder of safetensors: found, trained, or converted."""
    existing = existing_parent(recipe)
    if existing is None and recipe.parent.pretrain is not None:
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
        pretrained = runner.make(
            "pretrain",
            "parent",
            settings=settings,
            inputs={"source": data_fingerprint(recipe.data)},
            write=partial(make_pretrained, recipe),
        )
        return pretrained.model(recipe.name).source
    if recipe.parent.fit is not None:
        return _fitted(runner, recipe)
    if existing is None:
        raise ValueError("a parent is either found or trained")
    if not existing.gguf_file:
        return existing
    converted = runner.make(
        "convert",
        "parent",
        settings={},
        inputs={"gguf": fingerprint(existing)},
        write=partial(make_converted, existing),
    )
    return converted.model(existing.reference).source


def _fitted(runner: StageRunner, recipe: Recipe) -> ModelSource:
    data, model = recipe.data, recipe.parent.model
    settings = recipe.parent.fit.model_dump(exclude={"microbatch_size"}) if recipe.parent.fit else {}
    settings |= data.model_dump(include={"text_field", "label_field", "image_field", "max_length"})
    token = new_padding(recipe)
    settings |= {"pad_token": token} if token else {}
    fitted = runner.make(
        "fit",
        "parent",
        settings=settings | {"task": recipe.task, "seed": recipe.seed, "dtype": recipe.save.dtype},
        inputs={
            "source": data_fingerprint(data.model_copy(update={"unlabelled": []})),
            "model": fingerprint(resolve_model(model, revision=recipe.parent.revision)) if model else "",
        },
        write=partial(make_fitted, recipe),
    )
    return fitted.model(model or recipe.name).source


def prepare(runner: StageRunner, recipe: Recipe, parent: ModelSource) -> Run:
    """What all members of a run read, but for the parent's evaluation: above all the packed text."""
    model, source = Checkpoint(parent, fingerprint(parent)), data_fingerprint(recipe.data)
    return Run(
        recipe=recipe,
        runner=runner,
        parent=model,
        source=source,
        tasks=task_fingerprint(recipe),
        production=production_fingerprint(recipe.data) if recipe.data.production else "",
        data=_pack_text(runner, recipe, model, source),
    )


def evaluate_parent(run: Run) -> Made:
    """The parent's own evaluation; skipped.json in the run directory lists the rows of text that were left out."""
    evaluation = run.runner.make(
        "evaluate",
        "parent",
        settings=evaluation_settings(run.recipe),
        inputs=run.evaluation_inputs(),
        write=partial(make_evaluation, run, run.parent.source, None),
    )
    if parallel.rank() == 0:
        skipped = merged_skipped({"training text": run.data.folder, "held-out text": evaluation.folder})
        _write_beside(run.folder, SKIPPED, json.dumps(skipped, indent=1) + "\n" if skipped else "")
    return evaluation


def _pack_text(runner: StageRunner, recipe: Recipe, parent: Checkpoint, source: str) -> Made:
    """The recipe's text as the parent's tokens; `source` is the digest of its files."""
    vocab_size = dims_of(load_config(parent.source)).vocab_size
    tokenizer = load_tokenizer(parent.source, vocab_size=vocab_size) if vocab_size else None
    data = recipe.data
    settings = data.model_dump(include=_PACKING) | {"document_masks": data.masks_documents} | framing_settings(recipe)
    if recipe.task == "masked_language":
        settings |= {"mask_copies": data.mask_copies, "seed": recipe.seed}
    if reads_logprobs(recipe):
        settings |= {"listed": True}
    if data.turns != "all":
        settings |= {"turns": data.turns}
    if recipe.counts_examples:
        settings |= _classifying(recipe)
    return runner.make(
        "data",
        "parent",
        settings=settings,
        inputs={"source": source, "parent": parent},
        write=partial(make_data, recipe, parent.source, tokenizer),
    )


def compare_with_production(run: Run) -> None:
    """drift.json in the run directory; none without production text."""
    text = ""
    if run.production:
        drift = run.runner.make(
            "drift",
            "parent",
            settings=evaluation_settings(run.recipe, heldout_only=True),
            inputs={"source": run.source, "parent": run.parent, "data": run.data, "production": run.production},
            write=partial(make_drift, run),
        )
        text = (drift.folder / DRIFT).read_text(encoding="utf-8")
    if parallel.rank() == 0:
        _write_beside(run.folder, DRIFT, text)


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
