"""The stages heldout and production: text that evaluations alone read, packed once and read for every row of a run."""

import hashlib
from functools import partial
from pathlib import Path
from typing import Any

from cascade.data.bad_rows import BadRows
from cascade.data.blocks import TokenBlocks
from cascade.data.examples import Examples
from cascade.evaluation.heldout import heldout_blocks, heldout_examples, open_heldout, sample_blocks, save_heldout
from cascade.models.architecture.model_class import reads_images
from cascade.models.architecture.vocabulary import require_ids
from cascade.models.checkpoint.load import ModelSource, load_config, load_tokenizer
from cascade.pipeline.context import Run
from cascade.pipeline.stage_output import Made
from cascade.planning.classifier import examples_of, numbered_classes
from cascade.planning.inputs import as_guessed, classes_of, evaluation_settings, text_data
from cascade.recipe.schema import Recipe
from cascade.runtime.files import file_sha256
from cascade.runtime.progress import OnStep
from cascade.store.strict_json import write_json

ROWS = "rows.json"
"""In the folders of both stages: what was read and left out (`BadRows.state`)."""

_TOKENIZER_FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*.model",
    "*.spm",
    "*.tiktoken",
    "tekken.json",
    "bpe.codes",
    "normalizer.json",
)


def heldout_text(
    run: Run, checkpoint: ModelSource, bad: BadRows | None = None, *, vocab_size: int | None = None
) -> TokenBlocks | Examples:
    """The held-out blocks, or examples, as the recipe's task reads them; rows left out are counted in `bad`.

    They are in ids of the checkpoint's tokenizer, all below `vocab_size` where that is given.

    Raises:
        UserError: the text cannot be read, or has an id for which the models have no row.
    """
    recipe, config = run.recipe, load_config(checkpoint)
    settings, inputs = _read_with(recipe, checkpoint, config), {"source": run.source}
    packed = _packed(run, "heldout", checkpoint, settings, inputs)
    heldout = _opened(packed, bad)
    if isinstance(heldout, TokenBlocks):
        return _as_task_reads(recipe, heldout, checkpoint, vocab_size, "the held-out text")
    if "input_ids" in heldout.tensors:
        tokenizer = load_tokenizer(checkpoint)
        require_ids(heldout.tensors["input_ids"], config.vocab_size, tokenizer, "data.heldout")
    return heldout


def production_text(
    run: Run, checkpoint: ModelSource, bad: BadRows | None = None, *, vocab_size: int | None = None
) -> TokenBlocks:
    """The blocks of production text, as the recipe's task reads them; rows left out are counted in `bad`.

    Raises:
        UserError: as `heldout_text`.
    """
    settings = _read_with(run.recipe, checkpoint, load_config(checkpoint))
    packed = _packed(run, "production", checkpoint, settings, {"production": run.production})
    blocks = _opened(packed, bad)
    if not isinstance(blocks, TokenBlocks):
        raise ValueError("production text is blocks of tokens")
    return _as_task_reads(run.recipe, blocks, checkpoint, vocab_size, "data.production")


def _packed(run: Run, stage: str, checkpoint: ModelSource, settings: dict[str, Any], inputs: dict[str, str]) -> Made:
    """The stage's output, made now if no evaluation has needed it before; all that read text alike share it."""
    inputs = inputs | {"tokenizer": tokenizer_digest(checkpoint)}
    write = partial(make_packed, run.recipe, checkpoint, stage)
    return run.runner.make(stage, "parent", settings=settings, inputs=inputs, write=write)


def make_packed(recipe: Recipe, checkpoint: ModelSource, stage: str, folder: Path, on_step: OnStep) -> None:
    """The packed text in a file that evaluation alone opens, and rows.json, what was read and left out."""
    config, data = load_config(checkpoint), text_data(recipe.data)
    bad, tokenizer = data.bad_row_counter(), None if reads_images(config) else load_tokenizer(checkpoint)
    if recipe.counts_examples:
        save_heldout(heldout_examples(lambda split: examples_of(recipe, config, split, tokenizer, bad=bad)), folder)
    else:
        packing: dict[str, Any] = {
            "block_size": recipe.data.block_size,
            "max_blocks": recipe.evaluate.heldout_blocks,
            "document_masks": recipe.data.masks_documents,
            "bad": bad,
        }
        if stage == "production":
            save_heldout(sample_blocks(data, recipe.data.production, tokenizer, **packing), folder)
        else:
            save_heldout(heldout_blocks(data, tokenizer, **packing), folder)
    write_json(folder / ROWS, bad.state())


def _read_with(recipe: Recipe, checkpoint: ModelSource, config: Any) -> dict[str, Any]:
    """What packed text depends on besides its files and the tokenizer's."""
    settings = evaluation_settings(recipe, heldout_only=True) | {"model_type": config.model_type}
    if recipe.data.streaming:
        settings |= {"streaming": True}
    if recipe.classifies:
        settings |= {"classes": numbered_classes(config, classes_of(recipe))}
    return settings


def tokenizer_digest(checkpoint: ModelSource) -> str:
    """sha256 of the names and contents of the files that say how a checkpoint cuts text into tokens."""
    digest = hashlib.sha256()
    paths = {path for pattern in _TOKENIZER_FILES for path in checkpoint.folder.glob(pattern) if path.is_file()}
    for path in sorted(paths):
        digest.update(f"{path.name}:{file_sha256(path)}\n".encode())
    return digest.hexdigest()


def _opened(packed: Made, bad: BadRows | None) -> TokenBlocks | Examples:
    if bad is not None:
        bad.restore(packed.json(ROWS))
    return open_heldout(packed.folder)


def _as_task_reads(
    recipe: Recipe, blocks: TokenBlocks, checkpoint: ModelSource, vocab_size: int | None, place: str
) -> TokenBlocks:
    """The blocks, with hidden tokens where those are to be guessed; their ids are such as the models have rows for."""
    limit = vocab_size or int(load_config(checkpoint).get_text_config().vocab_size)
    if recipe.task != "masked_language" and int(blocks.input_ids.max()) < limit:
        return blocks
    tokenizer = load_tokenizer(checkpoint)
    require_ids(blocks.input_ids, limit, tokenizer, place)
    return as_guessed(recipe, blocks, "heldout", tokenizer, limit)
