"""The stage framing: where begin and end tokens stand in the text, and the recipe with these settings filled in.

Depends on: the text, its settings and the parent. Leaves: `framing.json` with the choice and the losses behind it.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from cascade.data.blocks import TokenBlocks
from cascade.data.framing import Framing, framing_of, require_end_token
from cascade.data.packing import BlockFormat
from cascade.data.prepare import prepare_blocks
from cascade.evaluation.evaluate import default_device
from cascade.evaluation.framing_test import choose_framing
from cascade.models.architecture.dims import dims_of
from cascade.models.architecture.vocabulary import require_ids
from cascade.models.checkpoint.load import ModelSource, fingerprint, load_config, load_model, load_tokenizer
from cascade.pipeline.runner import StageRunner
from cascade.planning.inputs import data_fingerprint, text_data
from cascade.recipe.schema import Recipe
from cascade.runtime.progress import OnStep
from cascade.store.strict_json import write_json

FRAMING = "framing.json"


def framed(runner: StageRunner, recipe: Recipe, parent: ModelSource) -> Recipe:
    """The recipe with data.begin_token and data.end_token settled; unchanged where the tokenizer adds no begin token.

    Encoders get the token at the start of every block, as in their own training. Of a language model, the parent's
    losses on selection text decide what the recipe leaves open.

    Raises:
        UserError: the recipe asks for an end token that the tokenizer lacks.
    """
    if dims_of(load_config(parent)).vocab_size == 0:
        return recipe
    data, tokenizer = recipe.data, load_tokenizer(parent)
    if data.end_token == "none":
        require_end_token(tokenizer)
    if not framing_of(tokenizer, "data").prefix:
        return recipe
    if recipe.task != "language" or "auto" not in (data.begin_token, data.end_token):
        begin = "blocks" if data.begin_token == "auto" else data.begin_token
        end = "documents" if data.end_token == "auto" else data.end_token
        return _with_tokens(recipe, begin, end)
    settings = data.model_dump(
        include={"source", "text_field", "messages_field", "template", "block_size", "begin_token", "end_token"}
    )
    framing = runner.make(
        "framing",
        "parent",
        settings=settings | {"document_masks": data.masks_documents},
        inputs={"source": data_fingerprint(data), "parent": fingerprint(parent)},
        write=partial(make_framing, recipe, parent),
    )
    record = framing.json(FRAMING)
    return _with_tokens(recipe, record["begin_token"], record["end_token"])


def make_framing(recipe: Recipe, parent: ModelSource, folder: Path, on_step: OnStep) -> None:
    """Write framing.json: where begin and end tokens stand, and the parent's losses behind that choice."""
    data, tokenizer = recipe.data, load_tokenizer(parent)
    source, rows = text_data(data), dims_of(load_config(parent)).vocab_size

    def pack(framing: Framing) -> TokenBlocks:
        blocks = prepare_blocks(
            replace(source, begin_blocks=framing.begin_blocks, end_token=bool(framing.suffix)),
            "selection",
            tokenizer,
            BlockFormat(block_size=data.block_size, document_masks=data.masks_documents),
        )
        require_ids(blocks.input_ids, rows, tokenizer, "data.selection")
        return blocks

    choice = choose_framing(
        load_model(parent).to(default_device()),
        framing_of(tokenizer, "data", begin_blocks=source.begin_blocks, end_token=source.end_token),
        pack,
        choose_begin=data.begin_token == "auto",
        choose_end=data.end_token == "auto" and not (data.messages_field and source.chat_template),
    )
    write_json(folder / FRAMING, choice.record())


def _with_tokens(recipe: Recipe, begin_token: str, end_token: str) -> Recipe:
    update: dict[str, Any] = {"begin_token": begin_token, "end_token": end_token}
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=update)})
