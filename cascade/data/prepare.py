"""One split of a source -> token blocks: texts or conversations, one file or a weighted mixture of several."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from cascade.data.bad_rows import BadRows
from cascade.data.blocks import TokenBlocks
from cascade.data.endpoint_logprobs import ListedReader
from cascade.data.framing import framing_of
from cascade.data.messages import chat_documents
from cascade.data.packing import BlockFormat, encoded, pack_blocks
from cascade.data.sources import TextData, cuts_passages, read_placed
from cascade.data.splits import Heldout, Split
from cascade.data.streaming import stream_blocks

MOST_STREAMED = 4096
"""Most blocks of a streamed split for which no limit is given."""


def prepare_blocks(
    data: TextData,
    split: Split | Heldout,
    tokenizer: Any,
    block_format: BlockFormat,
    *,
    name: str = "",
    stream_folder: Path | None = None,
    bad: BadRows | None = None,
) -> TokenBlocks:
    """The packed blocks of a split; of 'train' with weights, a mixture.

    How documents are framed is said by `data`, not by `block_format`. Where text is streamed, what was read is kept in
    `stream_folder` until all is done. Rows that cannot be used are counted in `bad`. Messages name `name`,
    'data.`split`' where it is not given.

    Raises:
        UserError: there is not one block of text, or a source cannot be read.
    """
    name = name or f"data.{split}"
    framing = framing_of(tokenizer, name, begin_blocks=data.begin_blocks, end_token=data.end_token)
    block_format = replace(block_format, framing=framing)
    bad = data.bad_row_counter() if bad is None else bad
    max_blocks = block_format.max_blocks
    if data.streaming and not cuts_passages(data):
        with nullcontext(stream_folder) if stream_folder else TemporaryDirectory() as folder:
            limited = replace(block_format, max_blocks=max_blocks or MOST_STREAMED)
            return stream_blocks(data, split, tokenizer, limited, folder=Path(folder), bad=bad)
    if split != "train" or not data.weights:
        return _pack(data, split, tokenizer, block_format, name=name, bad=bad)
    shares = [weight / sum(data.weights) for weight in data.weights]
    limits = [None if max_blocks is None else max(1, round(share * max_blocks)) for share in shares]
    files = data.files["train"]
    data.parts_of(files, name)  # no file in two sources
    sources = [
        _pack(data, split, tokenizer, replace(block_format, max_blocks=limit), name=name, bad=bad, only=file)
        for file, limit in zip(files, limits, strict=True)
    ]
    return mixed(sources, shares, max_blocks)


def _pack(
    data: TextData,
    split: Split | Heldout,
    tokenizer: Any,
    block_format: BlockFormat,
    *,
    name: str,
    bad: BadRows,
    only: str = "",
) -> TokenBlocks:
    """The blocks of a split that is read at once, or of `only` one file of it."""
    files = (only,) if only else None
    placed = read_placed(data, split, only=files, bad=bad, key=name)
    documents: list[Any] = [document for _, document in placed]
    place = f"{name}: {only}" if only else name
    if not data.messages_field:
        return pack_blocks(encoded(documents, tokenizer, block_format.framing), block_format, name=place)
    listed = ListedReader(tokenizer) if data.listed else None
    conversations = chat_documents(
        documents,
        tokenizer,
        place,
        template=data.chat_template,
        framing=block_format.framing,
        turns=data.turns,
        listed=listed,
        refused=lambda number, reason: bad.skip(placed[number][0], reason, key=name),
    )
    blocks = pack_blocks(conversations, block_format, name=place)
    bad.require_few(data.places_of(files or data.names_of(split)), key=name)
    if listed is not None:
        listed.require_agreement(place)
    return blocks


def mixed(sources: list[TokenBlocks], shares: list[float], max_blocks: int | None) -> TokenBlocks:
    """Blocks of several sources, each with its share of at most `max_blocks`.

    There are so many that no source is cut short without need; those that are too short for their share are repeated.
    """
    whole = max(len(source) / share for source, share in zip(sources, shares, strict=True))
    total = whole if max_blocks is None else min(whole, max_blocks)
    counts = [max(1, round(share * total)) for share in shares]
    parts = [source.rows(torch.arange(count) % len(source)) for source, count in zip(sources, counts, strict=True)]
    places = [part.position_ids for part in parts if part.position_ids is not None]
    return TokenBlocks(
        torch.cat([part.input_ids for part in parts]),
        torch.cat([part.labels for part in parts]),
        sum(count * part.bytes_per_token for count, part in zip(counts, parts, strict=True)) / sum(counts),
        torch.cat(places) if places else None,
    )
