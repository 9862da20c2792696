"""Text that is too large to read at once: documents one after another, packed shard by shard, with a cursor on disk.

After each shard the cursor says where reading stands, so that preparing data goes on where it was stopped, to the same
blocks.

Shapes: T = tokens; the three rows of a [3, T] stream are ids, labels and places in the document.
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cascade.data.blocks import TokenBlocks, append_document, batched, blocks_of, encoded
from cascade.data.framing import Framing, framing_of
from cascade.data.messages import chat_documents
from cascade.data.sources import TextData, belongs, kept_elsewhere, open_stream
from cascade.store import file_sha256, sync_file, write_atomically

logger = logging.getLogger(__name__)

SHARD_TOKENS = 1 << 22
_BATCH = 256


def stream_blocks(
    data: TextData,
    split: str,
    tokenizer: Any,
    *,
    block_size: int,
    max_blocks: int,
    document_masks: bool,
    framing: Framing | None = None,
    folder: Path,
    shard_tokens: int = SHARD_TOKENS,
) -> TokenBlocks:
    """The first `max_blocks` blocks of a split, in the order of its files; shards and cursor are kept in `folder`.

    Raises:
        UserError: the text does not fill one block, or no token in it counts.
    """
    framing = framing or framing_of(tokenizer, f"data.{split}")
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / f"{split}-cursor.json"
    cursor: dict[str, Any] = {"file": 0, "reader": None, "shards": 0, "bytes": 0, "tokens": 0, "sha256": []}
    found = _cursor(place, folder, split)
    if found is not None:
        cursor = found
        logger.warning("data.%s: going on after %d tokens", split, cursor["tokens"])
    shards = [load_file(_path(folder, split, number))["tokens"] for number in range(cursor["shards"])]
    waiting: list[Tensor] = []
    for documents, file, reader in _batches(data, split, cursor):
        if cursor["tokens"] + sum(part.shape[1] for part in waiting) >= max_blocks * block_size:
            break
        waiting.append(_tokens(documents, data, tokenizer, split, framing))
        cursor |= {"file": file, "reader": reader, "bytes": cursor["bytes"] + _bytes(documents)}
        if sum(part.shape[1] for part in waiting) >= shard_tokens:
            shard, waiting = torch.cat(waiting, 1), []
            path = _path(folder, split, cursor["shards"])
            save_file({"tokens": shard}, path)
            sync_file(path)
            shards.append(shard)
            cursor |= {"shards": cursor["shards"] + 1, "tokens": cursor["tokens"] + shard.shape[1]}
            cursor["sha256"] = [*cursor["sha256"], file_sha256(path)]
            write_atomically(place, json.dumps(cursor) + "\n")
    whole = torch.cat([*shards, *waiting], 1) if shards or waiting else torch.zeros(3, 0, dtype=torch.int32)
    return blocks_of(
        whole,
        cursor["bytes"],
        block_size=block_size,
        max_blocks=max_blocks,
        document_masks=document_masks,
        framing=framing,
        name=f"data.{split}",
    )


def _path(folder: Path, split: str, number: int) -> Path:
    return folder / f"{split}-{number:05d}.safetensors"


def _cursor(place: Path, folder: Path, split: str) -> dict[str, Any] | None:
    """Where an earlier try was; None without one, or where what it left is not as it was written."""
    if not place.exists():
        return None
    try:
        cursor: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
        for number, sha256 in enumerate(cursor["sha256"]):
            if file_sha256(_path(folder, split, number)) != sha256:
                raise ValueError(f"shard {number} is not as it was written")
        if len(cursor["sha256"]) != cursor["shards"]:
            raise ValueError("its shards are not those it counts")
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("data.%s: what an earlier try left cannot be used (%s); read from the start", split, error)
        return None
    return cursor


def _batches(data: TextData, split: str, cursor: dict[str, Any]) -> Iterator[tuple[list[Any], int, dict[str, Any]]]:
    """(documents of the split, number of the file, where its reader stands after them)."""
    names, elsewhere = data.names_of(split), kept_elsewhere(data, split)
    for number in range(cursor["file"], len(names)):
        rows = open_stream(data, names[number])
        if number == cursor["file"] and cursor["reader"] is not None:
            rows.load_state_dict(cursor["reader"])
        field = data.messages_field or data.text_field
        for some in batched(rows, _BATCH):
            yield [row[field] for row in some if belongs(data, split, row[field], elsewhere)], number, rows.state_dict()


def _tokens(documents: list[Any], data: TextData, tokenizer: Any, split: str, framing: Framing) -> Tensor:
    """int32 [3, T] of these documents."""
    pieces = (
        chat_documents(documents, tokenizer, f"data.{split}", template=data.chat_template, framing=framing)
        if data.messages_field
        else encoded(documents, tokenizer, framing)
    )
    rows: list[list[int]] = [[], [], []]
    for one in pieces:
        append_document(rows, one.ids, one.labels)
    return torch.tensor(rows, dtype=torch.int32).view(3, -1)


def _bytes(documents: list[Any]) -> int:
    texts = (one if isinstance(one, str) else "".join(part["content"] for part in one) for one in documents)
    return sum(len(text.encode()) for text in texts)
