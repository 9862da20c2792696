"""Text that is too large to read at once: documents one after another, packed shard by shard, with a cursor on disk.

After each shard the cursor says where reading stands, so that preparing data goes on where it was stopped, to the same
blocks.

Shapes: T = tokens; the three rows of a [3, T] stream are ids, labels and places in the document.
"""

import json
import logging
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cascade.data.bad_rows import BadRows
from cascade.data.blocks import TokenBlocks
from cascade.data.framing import Framing
from cascade.data.messages import chat_documents
from cascade.data.packing import BlockBuilder, BlockFormat, batched, encoded, token_rows
from cascade.data.rows import Place, Row, without_padding
from cascade.data.sources import (
    Document,
    Placed,
    TextData,
    belongs,
    hub_stream,
    kept_elsewhere,
    part_rows,
    usable,
)
from cascade.data.splits import Heldout, Split, require_open
from cascade.runtime.files import file_sha256, read_json, sync_file, write_atomically

logger = logging.getLogger(__name__)

SHARD_TOKENS = 1 << 22
_BATCH = 256


def stream_blocks(
    data: TextData,
    split: Split | Heldout,
    tokenizer: Any,
    block_format: BlockFormat,
    *,
    folder: Path,
    shard_tokens: int = SHARD_TOKENS,
    bad: BadRows | None = None,
) -> TokenBlocks:
    """The first blocks of a split, in the order of its files; shards and cursor are kept in `folder`.

    Another call with the same folder goes on where this one was stopped, after its last shard of at least
    `shard_tokens` tokens. Rows that cannot be used are counted in `bad`.

    Raises:
        UserError: the text does not fill one block, no token in it counts, or too many rows cannot be used.
    """
    require_open(split)
    folder.mkdir(parents=True, exist_ok=True)
    bad = data.bad_row_counter() if bad is None else bad
    path = folder / f"{split}-cursor.json"
    cursor: dict[str, Any] = {"file": 0, "reader": None, "shards": 0, "bytes": 0, "tokens": 0, "sha256": []}
    builder = BlockBuilder(block_format)
    earlier = _cursor(path, folder, split)
    if earlier is not None:
        cursor = earlier
        bad.restore(cursor["rows"])
        logger.warning("data.%s: going on after %d tokens", split, cursor["tokens"])
        for number in range(cursor["shards"]):
            _append(builder, load_file(_shard_path(folder, split, number))["tokens"])
    waiting: list[Tensor] = []
    whole = True
    for documents, file, reader in _batches(data, split, cursor, bad):
        if builder.has_all():
            whole = False
            break
        waiting.append(_tokens(documents, data, tokenizer, split, block_format.framing, bad))
        _append(builder, waiting[-1])
        size = sum(_num_bytes(document) for _, document in documents)
        cursor |= {"file": file, "reader": reader, "bytes": cursor["bytes"] + size}
        if sum(part.shape[1] for part in waiting) >= shard_tokens:
            shard, waiting = torch.cat(waiting, 1), []
            _keep_shard(shard, cursor, path, split, bad)
    bad.require_few(data.places_of(data.names_of(split)), key=f"data.{split}", whole=whole)
    builder.num_bytes = cursor["bytes"]
    return builder.finish(f"data.{split}")


def _append(builder: BlockBuilder, stream: Tensor) -> None:
    """Append the whole documents of a stream [3, T]."""
    rows = stream.numpy()
    starts = [*np.flatnonzero(rows[2] == 0).tolist(), rows.shape[1]]
    for start, end in pairwise(starts):
        builder.append(rows[:2, start:end])


def _keep_shard(shard: Tensor, cursor: dict[str, Any], path: Path, split: str, bad: BadRows) -> None:
    """Put a shard on the disk, then the cursor at `path` that counts it and says where reading stands."""
    shard_path = _shard_path(path.parent, split, cursor["shards"])
    save_file({"tokens": shard}, shard_path)
    sync_file(shard_path)
    cursor |= {"shards": cursor["shards"] + 1, "tokens": cursor["tokens"] + shard.shape[1]}
    cursor |= {"sha256": [*cursor["sha256"], file_sha256(shard_path)], "rows": bad.state()}
    write_atomically(path, json.dumps(cursor) + "\n")


def _shard_path(folder: Path, split: str, number: int) -> Path:
    return folder / f"{split}-{number:05d}.safetensors"


def _cursor(path: Path, folder: Path, split: str) -> dict[str, Any] | None:
    """Where an earlier process stood; None without one, or where its files are not as it wrote them."""
    if not path.exists():
        return None
    try:
        cursor: dict[str, Any] = read_json(path)
        for number, sha256 in enumerate(cursor["sha256"]):
            if file_sha256(_shard_path(folder, split, number)) != sha256:
                raise ValueError(f"shard {number} is not as it was written")
        if len(cursor["sha256"]) != cursor["shards"]:
            raise ValueError("its shards are not those it counts")
        BadRows().restore(cursor["rows"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("data.%s: what an earlier try left cannot be used (%s); read from the start", split, error)
        return None
    return cursor


def _batches(
    data: TextData, split: str, cursor: dict[str, Any], bad: BadRows
) -> Iterator[tuple[list[Placed], int, Any]]:
    """(documents of the split, number of the file, where its reader stands after them)."""
    parts, elsewhere = data.parts_of(data.names_of(split), f"data.{split}"), kept_elsewhere(data, split)
    for number in range(cursor["file"], len(parts)):
        start = cursor["reader"] if number == cursor["file"] else None
        for rows, reader in _read(data, parts[number], start, split):
            placed = ((place, usable(data, place, values, bad, key=f"data.{split}")) for place, values, _ in rows)
            documents = [(place, document) for place, document in placed if document is not None]
            yield [pair for pair in documents if belongs(data, split, pair[1], elsewhere)], number, reader


def _read(data: TextData, part: str, start: Any, split: str) -> Iterator[tuple[list[Row], Any]]:
    """(rows, where reading stands after them); `start`: where it stood, None at the beginning."""
    if data.source != "hub":
        for rows in batched(part_rows(data, part, key=f"data.{split}", after=tuple(start or (0, 0))), _BATCH):
            yield rows, (rows[-1].place.number, rows[-1].offset)
        return
    stream, file = hub_stream(data, part), data.place_of(part)
    number = 0
    if start is not None:
        number, state = start
        stream.load_state_dict(state)
    for values in batched(stream, _BATCH):
        rows = [
            Row(Place(file, number + place, "row"), without_padding(row)) for place, row in enumerate(values, start=1)
        ]
        number += len(rows)
        yield rows, (number, stream.state_dict())


def _tokens(
    documents: list[Placed], data: TextData, tokenizer: Any, split: str, framing: Framing, bad: BadRows
) -> Tensor:
    """The documents as a stream, int32 [3, T]; conversations that cannot be written are counted in `bad`."""
    contents: list[Any] = [document for _, document in documents]
    encodings = (
        chat_documents(
            contents,
            tokenizer,
            f"data.{split}",
            template=data.chat_template,
            framing=framing,
            turns=data.turns,
            refused=lambda number, reason: bad.skip(documents[number][0], reason, key=f"data.{split}"),
        )
        if data.messages_field
        else encoded(contents, tokenizer, framing)
    )
    streams = [np.zeros((3, 0), dtype=np.int32)]
    for document in encodings:
        rows = token_rows(document)
        streams.append(np.concatenate([rows, np.arange(rows.shape[1], dtype=np.int32)[None]]))
    return torch.from_numpy(np.concatenate(streams, axis=1))


def _num_bytes(document: Document) -> int:
    """UTF-8 bytes of a text, or of the contents of a conversation's messages."""
    text = document if isinstance(document, str) else "".join(message["content"] for message in document)
    return len(text.encode())
