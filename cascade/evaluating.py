"""The stages that measure: what each reads, and what it writes."""

import json
from pathlib import Path
from typing import Any

from torch import nn

from cascade.classifier import examples_of
from cascade.data.blocks import TokenBlocks
from cascade.evaluation.evaluate import default_device, evaluate
from cascade.evaluation.heldout import heldout_blocks, heldout_examples, heldout_metrics
from cascade.evaluation.retention import with_retention
from cascade.inputs import as_guessed, text_data
from cascade.models.architecture import reads_images
from cascade.models.checkpoint import (
    ModelSource,
    load_config,
    load_model,
    load_tokenizer,
)
from cascade.recipe.schema import Recipe
from cascade.stages import write_json
from cascade.store import COST_FILE

_SHOWN_TOKENS, _SHOWN_LETTERS = 64, 80


def make_evaluation(
    folder: Path,
    recipe: Recipe,
    checkpoint: ModelSource,
    *,
    teacher: nn.Module | None,
    parent_evaluation: Path | None,
    reference: Path | None,
) -> None:
    """eval.json (metrics with retention, item scores), lm_eval.json (lm-eval's own result), the speed in cost.json."""
    settings, heldout = recipe.evaluate, _heldout(recipe, checkpoint)
    result = evaluate(
        checkpoint,
        tasks=settings.tasks,
        teacher=teacher,
        heldout=heldout,
        task_folders=[Path(task_folder) for task_folder in settings.task_folders],
        limit=settings.limit,
        num_fewshot=settings.num_fewshot,
        batch_size=settings.batch_size,
        reference=reference,
        seed=recipe.seed,
    )
    if parent_evaluation is None:
        parent: dict[str, Any] = {"metrics": result.metrics, "items": result.items}
    else:
        parent = json.loads((parent_evaluation / "eval.json").read_text())
    metrics = with_retention(result.metrics, parent["metrics"], result.items, parent["items"], seed=recipe.seed)
    tail = None if result.tail is None else _told(result.tail, heldout, checkpoint)
    write_json(folder / "eval.json", {"metrics": metrics, "items": result.items, "tail": tail})
    write_json(folder / "lm_eval.json", result.raw)
    write_json(folder / COST_FILE, {"speed": result.speed})


def evaluation_settings(recipe: Recipe, *, heldout_only: bool = False) -> dict[str, Any]:
    """What an evaluation's key takes from the recipe; the tasks' contents are an input."""
    heldout = {
        "heldout_blocks": recipe.evaluate.heldout_blocks,
        "block_size": recipe.data.block_size,
        "document_masks": recipe.data.masks_documents,
        "text_field": recipe.data.text_field,
        "messages_field": recipe.data.messages_field,
        "template": recipe.data.template,
    }
    if recipe.task != "language":
        heldout |= {"task": recipe.task, "seed": recipe.seed}
    if recipe.classifies:
        heldout |= recipe.data.model_dump(include={"label_field", "image_field", "max_length"})
    if heldout_only:
        return heldout
    return heldout | recipe.evaluate.model_dump(exclude={"task_folders", "at_least"}) | {"seed": recipe.seed}


def make_baseline(
    folder: Path, recipe: Recipe, checkpoint: ModelSource, parent: ModelSource, teacher: nn.Module
) -> None:
    """Held-out metrics of a model that is only there to be compared with."""
    model = load_model(checkpoint).to(default_device())
    metrics = heldout_metrics(model, teacher, _heldout(recipe, parent))
    write_json(folder / "eval.json", {"metrics": metrics, "items": {}})


def _told(tail: dict[str, Any], heldout: Any, checkpoint: ModelSource) -> dict[str, Any]:
    """The long tail with blocks by how they begin, instead of by their numbers."""
    if not isinstance(heldout, TokenBlocks):
        return tail
    tokenizer = load_tokenizer(checkpoint)
    shown = []
    for one in tail["slices"]:
        text = tokenizer.decode(heldout.labels[int(one["slice"])].clamp_min(0)[:_SHOWN_TOKENS])
        shown.append(one | {"slice": " ".join(text.split())[:_SHOWN_LETTERS]})
    return tail | {"slices": shown}


def _heldout(recipe: Recipe, checkpoint: ModelSource) -> Any:
    config = load_config(checkpoint)
    tokenizer = None if reads_images(config) else load_tokenizer(checkpoint)
    if recipe.classifies:
        return heldout_examples(lambda split: examples_of(recipe, config, split, tokenizer))
    blocks = heldout_blocks(
        text_data(recipe.data),
        tokenizer,
        block_size=recipe.data.block_size,
        max_blocks=recipe.evaluate.heldout_blocks,
        document_masks=recipe.data.masks_documents,
    )
    return as_guessed(recipe, blocks, "heldout", tokenizer)
