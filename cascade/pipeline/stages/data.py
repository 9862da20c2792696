"""The stage data: the text as blocks of the parent's tokens, or labelled examples, and how later stages load them."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from cascade.data.blocks import TokenBlocks, load_blocks, save_blocks
from cascade.data.examples import Examples, load_training, read_examples, save_examples
from cascade.data.framing import framing_of
from cascade.data.packing import BlockFormat, pack_documents
from cascade.data.prepare import prepare_blocks
from cascade.data.splits import Split
from cascade.models.architecture.dims import dims_of
from cascade.models.architecture.vocabulary import require_ids
from cascade.models.checkpoint.load import (
    ModelSource,
    load_config,
    load_tokenizer,
)
from cascade.pipeline.context import Run
from cascade.pipeline.runner import StageRunner
from cascade.pipeline.stage_output import Checkpoint, Made
from cascade.planning.classifier import examples_of
from cascade.planning.inputs import (
    as_guessed,
    framing_settings,
    labelled_data,
    text_data,
)
from cascade.recipe.schema import Recipe
from cascade.report.skipped_rows import SKIPPED
from cascade.runtime.progress import OnStep
from cascade.store.commits import partial_of
from cascade.store.strict_json import write_json

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
"""Keys of data that packed text always depends on; `pack_text` adds those of some tasks."""


def pack_text(runner: StageRunner, recipe: Recipe, parent: Checkpoint, source: str) -> Made:
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


def _classifying(recipe: Recipe) -> dict[str, Any]:
    """Settings that a classifier's examples depend on besides their files."""
    rest = "rest" in recipe.data.unlabelled
    return recipe.data.model_dump(include=CLASSIFYING) | {"task": recipe.task, "rest": rest}


CLASSIFYING = {"label_field", "image_field", "train_examples", "max_length"}
"""Keys of data that only a recipe that classifies reads."""


def make_data(recipe: Recipe, parent: ModelSource, tokenizer: Any, folder: Path, on_step: OnStep) -> None:
    """train, calibration and selection blocks, or labelled examples, and skipped.json, the rows that were left out.

    The held-out split is not touched here.
    """
    data, config = recipe.data, load_config(parent)
    vocab_size, bad = dims_of(config).vocab_size, text_data(data).bad_row_counter()
    if recipe.counts_examples:
        for split in ("train", "selection"):
            examples = examples_of(recipe, config, split, tokenizer, bad=bad)
            save_examples(examples, folder / f"{split}.safetensors")
        write_json(folder / SKIPPED, bad.record())
        if tokenizer is not None:  # what statistics are taken on: the same texts, packed
            texts = [example.content for example in read_examples(labelled_data(data, recipe.task), "train", bad)]
            framing = framing_of(tokenizer, "data.train", begin_blocks=data.begin_token != "documents")
            packed = pack_documents(texts, tokenizer, block_size=data.max_length, framing=framing, name="data.train")
            require_ids(packed.input_ids, vocab_size, tokenizer, "data.train")
            save_blocks(packed, folder / "calibration.safetensors")
        return
    limits: dict[Split, int | None] = {
        "train": max(1, data.max_tokens // data.block_size),
        "calibration": None,
        "selection": None,
    }
    for split, limit in limits.items():
        blocks = prepare_blocks(
            replace(text_data(data), listed=reads_logprobs(recipe)),
            split,
            tokenizer,
            BlockFormat(block_size=data.block_size, max_blocks=limit, document_masks=data.masks_documents),
            stream_folder=partial_of(folder),
            bad=bad,
        )
        require_ids(blocks.input_ids, vocab_size, tokenizer, f"data.{split}")
        save_blocks(as_guessed(recipe, blocks, split, tokenizer, vocab_size), folder / f"{split}.safetensors")
    write_json(folder / SKIPPED, bad.record())


def reads_logprobs(recipe: Recipe) -> bool:
    """Whether the members learn from log-probabilities that came with the text."""
    return recipe.distill is not None and recipe.distill.teacher == "logprobs"


def load_calibration(run: Run, num_blocks: int) -> TokenBlocks:
    """The first calibration blocks."""
    return load_blocks(run.data.folder / "calibration.safetensors").take(num_blocks)


def selection_size(recipe: Recipe) -> int:
    """Number of blocks, or examples, of the selection split that choices are made on."""
    if recipe.distill is None:
        raise ValueError("a recipe with members has a distill section")
    return recipe.distill.selection_examples if recipe.counts_examples else recipe.distill.selection_blocks


def load_selection(run: Run) -> TokenBlocks | Examples:
    """The blocks, or the labelled examples, that choices are made on."""
    return load_training(run.data.folder / "selection.safetensors").take(selection_size(run.recipe))
