"""Documents -> blocks of token ids, packed one after another, each framed as its tokenizer frames a text.

Shapes: N = blocks, S = block size (tokens), T = tokens of a document, P = tokens of the prefix.
"""

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cascade.data.blocks import IGNORE_INDEX, TokenBlocks
from cascade.data.framing import Framing, framing_of
from cascade.data.token_targets import Listed, ListedTargets, as_targets, as_tensors
from cascade.runtime.errors import UserError

_T = TypeVar("_T")

_ROWS = 64
"""Blocks that are worked on at a time where another array of a whole text's size would be needed."""


class Tokenized(NamedTuple):
    """One document."""

    ids: list[int]
    labels: list[int] | None
    """The ids, or IGNORE_INDEX where a token does not count; None: all count."""
    num_bytes: int
    listed: list[Listed] | None = None


_UNFRAMED = Framing((), (), begin_blocks=False)


@dataclass(frozen=True, kw_only=True)
class BlockFormat:
    """How documents are cut into blocks."""

    block_size: int
    """Tokens per block."""
    max_blocks: int | None = None
    """None: as many as the text fills."""
    document_masks: bool = False
    """Whether blocks say where each document starts, so that none sees the one before it."""
    framing: Framing = _UNFRAMED
    """The tokens that documents stand between, and whether blocks inside a document begin with them, too."""


def pack_documents(
    texts: Iterable[str],
    tokenizer: Any,
    *,
    block_size: int,
    max_blocks: int | None = None,
    document_masks: bool = False,
    framing: Framing | None = None,
    name: str = "text",
) -> TokenBlocks:
    """Blocks of exactly `block_size` tokens of documents one after another; the remainder is dropped.

    Each document stands between the tokens of `framing` (`framing_of` the tokenizer where not given). With
    `document_masks` the blocks say where each document starts, so that none sees the one before it.

    Raises:
        UserError: the text does not fill one block.
    """
    framing = framing or framing_of(tokenizer, name)
    block_format = BlockFormat(
        block_size=block_size, max_blocks=max_blocks, document_masks=document_masks, framing=framing
    )
    return pack_blocks(encoded(texts, tokenizer, framing), block_format, name=name)


def encoded(texts: Iterable[str], tokenizer: Any, framing: Framing) -> Iterator[Tokenized]:
    """What `pack_blocks` takes, one document per text: its ids, framed.

    A prefix is no target unless it is also what ends the document before it.
    """
    ignored = [] if framing.prefix_counts else [IGNORE_INDEX] * len(framing.prefix)
    for batch in batched(texts, 256):
        written = tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        for text, plain in zip(batch, written, strict=True):
            ids = framing.around(plain)
            labels = [*ignored, *ids[len(ignored) :]] if ignored else None
            yield Tokenized(ids, labels, len(text.encode()))


def pack_blocks(documents: Iterable[Tokenized], block_format: BlockFormat, *, name: str) -> TokenBlocks:
    """Blocks of documents one after another; those in which no token counts are dropped.

    Raises:
        UserError: they do not fill one block, or no token in them counts.
    """
    builder = BlockBuilder(block_format)
    for document in documents:
        if builder.has_all():
            break
        builder.append(token_rows(document), document.num_bytes, document.listed)
    return builder.finish(name)


def token_rows(document: Tokenized) -> NDArray[np.int32]:
    """int32 [2, T]: a document's ids and labels."""
    ids = np.asarray(document.ids, dtype=np.int32)
    labels = ids if document.labels is None else np.asarray(document.labels, dtype=np.int32)
    return np.stack([ids, labels])


class BlockBuilder:
    """Cuts documents into blocks as they come.

    It holds 4 bytes a token until it is finished: ids, as their complement (~id, which is negative) where a token does
    not count.
    """

    def __init__(self, block_format: BlockFormat) -> None:
        self.format = block_format
        self.num_tokens, self.num_counted, self.num_bytes = 0, 0, 0
        """Of all documents, also of what no block holds."""
        self.text_counts = True
        """Whether all tokens count that are not a document's prefix."""
        self.tokens = array("i")
        """Of the blocks, one after another, with the prefixes that stand at their beginnings."""
        self.starts = array("q")
        """Places in `tokens` at which documents start, where blocks say so."""
        self.inserted = array("i")
        """Of each block: tokens of the prefix that stand there and not in the documents."""
        self.listed: list[ListedTargets] = []

    def has_all(self) -> bool:
        """Whether the documents have as many tokens as the blocks may have."""
        max_blocks = self.format.max_blocks
        return max_blocks is not None and self.num_tokens >= max_blocks * self.format.block_size

    def append(self, rows: NDArray[np.int32], num_bytes: int = 0, listed: list[Listed] | None = None) -> None:
        """One more document: ids and labels [2, T], and what a teacher says of each token, where anything is said."""
        ids, labels = rows
        counts, prefix = labels != IGNORE_INDEX, self.format.framing.prefix
        if not np.array_equal(labels[counts], ids[counts]):
            raise ValueError("a token's label is the token itself or IGNORE_INDEX")
        self.num_tokens += len(ids)
        self.num_counted += int(counts.sum())
        self.num_bytes += num_bytes
        self.text_counts &= bool(counts[len(prefix) :].all())
        self.listed += [] if listed is None else [as_tensors(listed)]
        values = np.where(counts, ids, ~ids)
        if self.format.document_masks and len(values):  # nothing that a document's first token could be told from
            values[0] = ~ids[0]
        self._cut(ids, values)

    def _cut(self, ids: NDArray[np.int32], values: NDArray[np.int32]) -> None:
        """A document's values at the end of the blocks.

        A block that starts inside a document begins with as much of the prefix as stands before it in the document, so
        that no block begins with it twice. What follows a whole prefix there is no target.
        """
        block_size, max_blocks, framing = self.format.block_size, self.format.max_blocks, self.format.framing
        complement = array("i", [~token for token in framing.prefix])
        position = 0
        while position < len(values):
            if len(self.tokens) % block_size == 0:
                if max_blocks is not None and len(self.inserted) >= max_blocks:
                    return
                inserted = min(position, len(complement)) if framing.begin_blocks else 0
                self.tokens.extend(complement[:inserted])
                self.inserted.append(inserted)
                if inserted and inserted == len(complement):
                    values[position] = ~ids[position]
            if position == 0 and self.format.document_masks:
                self.starts.append(len(self.tokens))
            room = block_size - len(self.tokens) % block_size
            self.tokens.frombytes(values[position : position + room].tobytes())
            position += room

    def finish(self, name: str) -> TokenBlocks:
        """The blocks; those in which no token counts are dropped. Nothing can be appended after it.

        Raises:
            UserError: the documents do not fill one block, or no token in them counts.
        """
        block_size = self.format.block_size
        count = len(self.tokens) // block_size
        if count == 0:
            raise UserError(
                f"{name}: {self.num_tokens} tokens do not fill one block of {block_size} tokens; give more text or a "
                "smaller block size (data.block_size, --block-size)"
            )
        values = np.frombuffer(self.tokens, dtype=np.int32, count=count * block_size).reshape(count, block_size)
        counting = (values[:, 1:] >= 0).any(1)
        if not counting.any():
            raise UserError(
                f"{name}: no token of {count} blocks counts for the loss; give more text, or look whether the "
                "conversations have an answer of the assistant"
            )
        known = self._known(count)
        positions = self._positions(count) if self.format.document_masks else None
        if not counting.all():
            values, rows = values[counting], torch.from_numpy(np.flatnonzero(counting))
            positions = None if positions is None else positions[rows]
            known = None if known is None else known.rows(rows)
        self.tokens = array("i")
        ids, labels = _ids_and_labels(values)
        return TokenBlocks(ids, labels, self._bytes_per_token(), positions, known)

    def _bytes_per_token(self) -> float:
        return self.num_bytes / self.num_counted if self.text_counts else 0.0

    def _positions(self, count: int) -> Tensor:
        """[N, S]: each token's place in its document, counted from the block's start where that is later."""
        block_size = self.format.block_size
        dtype = np.int16 if block_size <= 1 << 15 else np.int32
        starts = np.frombuffer(self.starts, dtype=np.int64) if self.starts else np.zeros(0, dtype=np.int64)
        columns = np.arange(block_size, dtype=dtype)
        positions = np.empty((count, block_size), dtype=dtype)
        for first in range(0, count, _ROWS):
            part = positions[first : first + _ROWS]
            bounds = np.searchsorted(starts, [first * block_size, first * block_size + part.size])
            here = starts[bounds[0] : bounds[1]]
            latest = np.zeros_like(part)
            latest.reshape(-1)[here - first * block_size] = here % block_size
            np.subtract(columns, np.maximum.accumulate(latest, axis=1), out=part)
        return torch.from_numpy(positions)

    def _known(self, count: int) -> ListedTargets | None:
        """What a teacher says of the blocks' tokens; nothing of prefixes that stand in no document."""
        if not self.listed:
            return None
        if sum(len(targets.ids) for targets in self.listed) != self.num_tokens:
            raise ValueError("either all documents say what a teacher says of their tokens, or none")
        inserted = torch.tensor(self.inserted[:count], dtype=torch.int64)
        column = torch.arange(self.format.block_size)
        first = torch.arange(count) * self.format.block_size - inserted.cumsum(0)
        index = first[:, None] + column
        return as_targets(self.listed, index.masked_fill(column < inserted[:, None], -1))


def _ids_and_labels(values: NDArray[np.int32]) -> tuple[Tensor, Tensor]:
    """int32 [N, S] each, of ids that are complements where they do not count; one tensor where all do.

    The ids take the place of the values.
    """
    ids = torch.from_numpy(values)
    if int(ids.min()) >= 0:
        return ids, ids
    labels = torch.empty_like(ids)
    for first in range(0, len(values), _ROWS):
        part = ids[first : first + _ROWS]
        silent = part < 0
        labels[first : first + _ROWS] = part.masked_fill(silent, IGNORE_INDEX)
        part.copy_(torch.where(silent, ~part, part))
    return ids, labels


def batched(values: Iterable[_T], size: int) -> Iterator[list[_T]]:
    """Lists of `size` values, the last may be shorter."""
    iterator = iter(values)
    while batch := list(islice(iterator, size)):
        yield batch
