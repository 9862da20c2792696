"""What a recipe reads besides models: its text as the data package takes it, and digests of text and tasks."""

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from cascade.data.blocks import TokenBlocks
from cascade.data.examples import LabelledData, class_names
from cascade.data.masking import masked_blocks
from cascade.data.sources import TextData
from cascade.data.splits import SPLITS
from cascade.data.stdlib import FROZEN_HELDOUT, stdlib_documents
from cascade.evaluation.tasks_lm_eval.harness import find_tasks
from cascade.evaluation.tasks_lm_eval.task_code import CodeTask
from cascade.recipe.data import Data
from cascade.recipe.schema import Recipe
from cascade.runtime.files import file_sha256
from cascade.runtime.paths import files_of


def text_data(data: Data) -> TextData:
    """The recipe's data section as the data package takes it."""
    splits = {
        "train": data.train,
        "calibration": data.calibration,
        "selection": data.selection,
        "heldout": data.heldout,
    }
    files = {name: tuple(values) for name, values in splits.items() if values}
    return TextData(
        source=data.source,
        files=files if data.source == "files" else {},
        text_field=data.text_field,
        dataset=data.dataset,
        revision=data.revision,
        dataset_config=data.dataset_config,
        hub_splits={name: values[0] for name, values in files.items()} if data.source == "hub" else None,
        messages_field=data.messages_field,
        chat_template=data.template == "model",
        weights=tuple(data.weights),
        streaming=data.streaming,
        begin_blocks=data.begin_token != "documents",
        end_token=data.end_token != "none",
        turns=data.turns,
        bad_rows=data.bad_rows,
        max_bad_rows=data.max_bad_rows,
    )


def framing_settings(recipe: Recipe) -> dict[str, Any]:
    """What the keys of stages that read packed text take from it; nothing where the tokenizer begins no text."""
    values = recipe.data.model_dump(include={"begin_token", "end_token"})
    return {} if "auto" in values.values() else values


def as_guessed(
    recipe: Recipe, blocks: TokenBlocks, split: str, tokenizer: Any, vocab_size: int | None = None
) -> TokenBlocks:
    """A split's blocks as the recipe's task reads them: with hidden tokens where those are to be guessed."""
    if recipe.task != "masked_language":
        return blocks
    copies = recipe.data.mask_copies if split == "train" else 1
    seed = recipe.seed + SPLITS.index(split)
    return masked_blocks(blocks, tokenizer, seed=seed, copies=copies, vocab_size=vocab_size)


def labelled_data(data: Data, task: str) -> LabelledData:
    """The examples of a recipe that classifies."""
    return LabelledData(
        text_data(data),
        images=task == "image_classification",
        labelled=task != "embedding",
        label_field=data.label_field,
        image_field=data.image_field,
        unlabelled=tuple(name for name in data.unlabelled if name != "rest"),
        train_examples=data.train_examples,
        rest="rest" in data.unlabelled,
    )


def classes_of(recipe: Recipe) -> tuple[str, ...]:
    """The names of the classes, as the training labels have them."""
    data = recipe.data.model_copy(update={"train_examples": None, "unlabelled": []})
    return _classes(data.model_dump_json(), recipe.task, data_fingerprint(data))


@lru_cache(maxsize=8)
def _classes(data: str, task: str, fingerprint: str) -> tuple[str, ...]:
    return tuple(class_names(labelled_data(Data.model_validate_json(data), task)))


def data_fingerprint(data: Data) -> str:
    """sha256 of the source's content: of local files and the standard library; a hub dataset's revision."""
    digest = hashlib.sha256()
    if data.source == "stdlib":
        for path, text in stdlib_documents():
            digest.update(f"{path}:{hashlib.sha256(text.encode()).hexdigest()}\n".encode())
        digest.update(file_sha256(FROZEN_HELDOUT).encode())
    unlabelled = tuple(name for name in data.unlabelled if name != "rest")
    files = text_data(data).files | ({"unlabelled": unlabelled} if unlabelled else {})
    for split, names in files.items():
        for name in names:
            for file in files_of(name, f"data.{split}"):
                digest.update(f"{split}:{file_sha256(Path(file))}\n".encode())
    digest.update(json.dumps([data.dataset, data.dataset_config, data.revision, text_data(data).hub_splits]).encode())
    return digest.hexdigest()


def production_fingerprint(data: Data) -> str:
    """sha256 of the files of production text.

    Raises:
        UserError: one of them is not there.
    """
    digest = hashlib.sha256()
    for name in data.production:
        for file in files_of(name, "data.production"):
            digest.update(f"{file_sha256(Path(file))}\n".encode())
    return digest.hexdigest()


def task_fingerprint(recipe: Recipe) -> str:
    """sha256 of the tasks' definitions and data files; an lm-eval task of its own by name."""
    digest = hashlib.sha256()
    for task in find_tasks(recipe.evaluate.tasks, [Path(folder) for folder in recipe.evaluate.task_folders]):
        if isinstance(task, str):
            digest.update(task.encode())
            continue
        if isinstance(task, CodeTask):
            digest.update(task.digest().encode())
            continue
        files = task["dataset_kwargs"].get("data_files") or {}
        for part in files.values() if isinstance(files, dict) else [files]:
            for file in part if isinstance(part, list) else [part]:
                digest.update(file_sha256(Path(file)).encode())
        arguments = {key: argument for key, argument in task["dataset_kwargs"].items() if key != "data_files"}
        digest.update(json.dumps(task | {"dataset_kwargs": arguments}, sort_keys=True, default=str).encode())
    return digest.hexdigest()


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
    if not recipe.counts_examples:
        heldout |= framing_settings(recipe)
    if recipe.task != "language":
        heldout |= {"task": recipe.task, "seed": recipe.seed}
    if recipe.data.turns != "all":
        heldout["turns"] = recipe.data.turns
    if recipe.counts_examples:
        heldout |= recipe.data.model_dump(include={"label_field", "image_field", "max_length"})
    if heldout_only:
        return heldout
    return heldout | recipe.evaluate.model_dump(exclude={"task_folders", "at_least"}) | {"seed": recipe.seed}
