"""Documents -> blocks of token ids, packed one after another, each framed as its tokenizer frames a text.

Shapes: N = blocks, S = block size (tokens), B = batch, T = tokens of all documents, P = tokens of the prefix.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from cascade.data.framing import Framing, framing_of
from cascade.data.token_targets import KnownTargets, Listed, ListedTargets, StoredTargets, as_targets, as_tensors
from cascade.models.checkpoint.tensor_file import sort_metadata
from cascade.runtime.errors import UserError

_T = TypeVar("_T")

IGNORE_INDEX = -100
"""Label of a token that no loss counts (padding, prompts), as in transformers."""


class Tokenized(NamedTuple):
    """One document."""

    ids: list[int]
    labels: list[int] | None
    """None: the ids themselves."""
    num_bytes: int
    listed: list[Listed] | None = None


@dataclass(frozen=True)
class TokenBlocks:
    """Packed text: what every stage reads."""

    input_ids: Tensor
    """int64 [N, S]"""
    labels: Tensor
    """int64 [N, S], unshifted as in transformers; IGNORE_INDEX where no loss is wanted."""
    bytes_per_token: float
    """UTF-8 bytes of text per token, for bits per byte; 0 where not all tokens count, and there is no such number."""
    position_ids: Tensor | None = None
    """int64 [N, S]: each token's place in its document, from the block's start on; None where the documents of a block
    see each other."""
    known: KnownTargets | StoredTargets | None = None
    """What a teacher that is not here says of each token, as far as it is told."""
    masked: bool = False
    """Whether labels are for the tokens that stand there (and are hidden in `input_ids`), not for what follows."""

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return self.input_ids.shape[1]

    def num_counted(self) -> int:
        """Tokens that are predicted and count: what a step's loss is divided by."""
        return int((self.targets() != IGNORE_INDEX).sum())

    def targets(self) -> Tensor:
        """int64 [N, S] or [N, S - 1]: what is to be predicted at each place that predicts (`predicting`)."""
        return self.labels if self.masked else self.labels[:, 1:]

    def predicting(self, hidden: Tensor) -> Tensor:
        """Of [N, S, ...] the places that predict: all, or all but the last."""
        return hidden if self.masked else hidden[:, :-1]

    def take(self, count: int) -> "TokenBlocks":
        """`count` blocks spread evenly over all of them (all, if there are fewer), so that every document counts."""
        if count >= len(self):
            return self
        return self.rows(torch.arange(count) * len(self) // count)

    def rows(self, rows: Tensor) -> "TokenBlocks":
        """The blocks of these numbers."""
        positions = None if self.position_ids is None else self.position_ids[rows]
        return replace(
            self,
            input_ids=self.input_ids[rows],
            labels=self.labels[rows],
            position_ids=positions,
            known=None if self.known is None else self.known.rows(rows),
        )

    def inputs(self, device: torch.device | None = None) -> dict[str, Tensor]:
        """What a model takes: a document's places start again at 0, which transformers reads as a mask between them."""
        places = {} if self.position_ids is None else {"position_ids": self.position_ids.to(device)}
        return {"input_ids": self.input_ids.to(device)} | places

    def split(self, batch_size: int) -> "list[TokenBlocks]":
        """Blocks in stored order, `batch_size` at a time; the last may be fewer."""
        return [self.rows(rows) for rows in torch.arange(len(self)).split(batch_size)]


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
    return pack_tokens(
        encoded(texts, tokenizer, framing),
        block_size=block_size,
        max_blocks=max_blocks,
        document_masks=document_masks,
        framing=framing,
        name=name,
    )


def encoded(texts: Iterable[str], tokenizer: Any, framing: Framing) -> Iterator[Tokenized]:
    """What `pack_tokens` takes, one document per text: its ids, framed.

    A prefix is no target unless it is also what ends the document before it.
    """
    ignored = [] if framing.prefix_counts else [IGNORE_INDEX] * len(framing.prefix)
    for some in batched(texts, 256):
        written = tokenizer(some, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        for text, plain in zip(some, written, strict=True):
            ids = framing.around(plain)
            labels = [*ignored, *ids[len(ignored) :]] if ignored else None
            yield Tokenized(ids, labels, len(text.encode()))


def pack_tokens(
    documents: Iterable[tuple[Any, ...]],
    *,
    block_size: int,
    max_blocks: int | None = None,
    document_masks: bool = False,
    framing: Framing | None = None,
    name: str = "text",
) -> TokenBlocks:
    """Blocks of `Tokenized` documents (or their parts as a tuple), one after another.

    `framing` says what the documents begin with, and whether blocks inside a document do, too; None: with nothing.

    Raises:
        UserError: they do not fill one block, or no token in them counts.
    """
    rows: list[list[int]] = [[], [], []]
    num_bytes = 0
    listed: list[ListedTargets] = []
    for document in documents:
        ids, labels, size, theirs = Tokenized(*document)
        if max_blocks is not None and len(rows[0]) >= max_blocks * block_size:
            break
        append_document(rows, ids, labels)
        listed += [] if theirs is None else [as_tensors(theirs)]
        num_bytes += size
    stream = torch.tensor(rows, dtype=torch.int64).view(3, -1)
    if listed and sum(len(one.ids) for one in listed) != stream.shape[1]:
        raise ValueError("either all documents say what a teacher says of their tokens, or none")
    return blocks_of(
        stream,
        num_bytes,
        BlockFormat(
            block_size=block_size,
            max_blocks=max_blocks,
            document_masks=document_masks,
            framing=framing or _UNFRAMED,
        ),
        name=name,
        listed=listed,
    )


_UNFRAMED = Framing((), (), begin_blocks=False)


@dataclass(frozen=True, kw_only=True)
class BlockFormat:
    """How a stream of documents is cut into blocks."""

    block_size: int
    """Tokens per block."""
    max_blocks: int | None = None
    """None: as many as the text fills."""
    document_masks: bool = False
    """Whether blocks say where each document starts, so that none sees the one before it."""
    framing: Framing = _UNFRAMED
    """The tokens that documents stand between, and whether blocks inside a document begin with them, too."""


def append_document(rows: list[list[int]], ids: list[int], labels: list[int] | None) -> None:
    """One more document at the end of a stream's three rows: ids, labels, places in the document."""
    rows[0] += ids
    rows[1] += ids if labels is None else labels
    rows[2] += range(len(ids))


def blocks_of(
    stream: Tensor,
    num_bytes: int,
    block_format: BlockFormat,
    *,
    name: str,
    listed: Sequence[ListedTargets] = (),
) -> TokenBlocks:
    """A stream [3, T] of ids, labels and places, cut into blocks; those in which no token counts are dropped.

    Raises:
        UserError: it does not fill one block, or no token counts.
    """
    block_size, framing = block_format.block_size, block_format.framing
    index, missing = _cut(stream, block_format)
    count = len(index)
    if count == 0:
        raise UserError(
            f"{name}: {stream.shape[1]} tokens do not fill one block of {block_size} tokens; give more text or a "
            "smaller block size (data.block_size, --block-size)"
        )
    all_ids, all_labels, all_places = stream
    text_counts = torch.equal(
        torch.where(all_places < len(framing.prefix), all_ids, all_labels), all_ids
    )  # all that is not framing
    if bool(missing.any()):
        ids, labels, places = stream[:, index.clamp(min=0)].to(torch.int64).unbind(0)
    else:  # the stream in its order: no copy of it
        ids, labels, places = stream[:, : count * block_size].to(torch.int64).view(3, count, block_size)
    if block_format.document_masks:  # nothing that a document's first token could be told from
        labels = labels.masked_fill(places == 0, IGNORE_INDEX)
    ids, labels, places = _with_prefix(ids, labels, places, index, missing, framing)
    blocks = TokenBlocks(
        ids,
        labels,
        num_bytes / int((all_labels != IGNORE_INDEX).sum()) if text_counts else 0.0,
        from_block_start(places) if block_format.document_masks else None,
        as_targets(listed, index) if listed else None,
    )
    counting = (labels[:, 1:] != IGNORE_INDEX).any(1).nonzero()[:, 0]
    if len(counting) == 0:
        raise UserError(
            f"{name}: no token of {count} blocks counts for the loss; give more text, or look whether the "
            "conversations have an answer of the assistant"
        )
    return blocks if len(counting) == count else blocks.rows(counting)


def _cut(stream: Tensor, block_format: BlockFormat) -> tuple[Tensor, Tensor]:
    """(index [N, S] of each block's tokens in the stream, -1 where the prefix stands instead; [N] of such places).

    A block that starts inside a document begins with as much of the prefix as stands before it in the document, so that
    no block begins with it twice.
    """
    total, places = stream.shape[1], stream[2]
    block_size, max_blocks, framing = block_format.block_size, block_format.max_blocks, block_format.framing
    if not framing.begin_blocks:
        count = total // block_size if max_blocks is None else min(total // block_size, max_blocks)
        return torch.arange(count * block_size).view(count, block_size), torch.zeros(count, dtype=torch.int64)
    starts: list[int] = []
    missing: list[int] = []
    position = 0
    while position < total and (max_blocks is None or len(starts) < max_blocks):
        lacking = min(int(places[position]), len(framing.prefix))
        if position + block_size - lacking > total:
            break
        starts.append(position - lacking)
        missing.append(lacking)
        position += block_size - lacking
    index = torch.tensor(starts, dtype=torch.int64)[:, None] + torch.arange(block_size)
    lacking_N = torch.tensor(missing, dtype=torch.int64)
    return index.masked_fill(torch.arange(block_size) < lacking_N[:, None], -1), lacking_N


def _with_prefix(
    ids: Tensor, labels: Tensor, places: Tensor, index: Tensor, missing: Tensor, framing: Framing
) -> tuple[Tensor, Tensor, Tensor]:
    """[N, S] each: with the prefix where the index is -1; what follows it inside a document is no target."""
    if not bool(missing.any()):
        return ids, labels, places
    block_size = ids.shape[1]
    column = torch.arange(block_size)
    inserted = index < 0
    prefix = torch.tensor(framing.prefix, dtype=torch.int64)
    ids = torch.where(inserted, prefix[column.clamp(max=len(prefix) - 1)], ids)
    whole = missing == len(framing.prefix)
    first = (column == missing[:, None]) & whole[:, None]
    labels = labels.masked_fill(inserted | first, IGNORE_INDEX)
    first_place = places.gather(1, missing[:, None].clamp(max=block_size - 1))
    places = torch.where(inserted, first_place - missing[:, None] + column, places)
    return ids, labels, places


def from_block_start(places: Tensor) -> Tensor:
    """[N, S]: places counted from the block's start where a document began in an earlier block."""
    began = (places[:, 1:] == 0).cummax(1).values
    inherited = torch.cat([torch.ones_like(places[:, :1], dtype=torch.bool), ~began], 1)
    return torch.where(inherited, places - places[:, :1], places)


def save_blocks(blocks: TokenBlocks, path: Path, *, split: str = "") -> None:
    """One safetensors file; labels are stored only where they differ from the ids.

    With a `split` the file opens for who names it alone (`require_split`).
    """
    tensors = {"input_ids": blocks.input_ids.to(torch.int32)}
    if not torch.equal(blocks.labels, blocks.input_ids):
        tensors["labels"] = blocks.labels.to(torch.int32)
    if blocks.position_ids is not None:
        tensors["position_ids"] = blocks.position_ids.to(torch.int32)
    if isinstance(blocks.known, ListedTargets):
        tensors |= {"listed_ids": blocks.known.ids.to(torch.int32), "listed_log_p": blocks.known.log_p}
    metadata = {"bytes_per_token": repr(blocks.bytes_per_token), "masked": str(blocks.masked)}
    save_file(tensors, path, metadata=metadata | ({"split": split} if split else {}))
    sort_metadata(path)


def require_split(metadata: dict[str, str] | None, split: str, path: Path) -> None:
    """Refuse a file that is kept for one split to who does not name that split.

    Raises:
        ValueError: the names differ.
    """
    kept_for = (metadata or {}).get("split", "")
    if kept_for != split:
        raise ValueError(
            f"{path}: holds {f'the {kept_for} split' if kept_for else 'no split of its own'}, and is opened for "
            f"{f'the {split} split' if split else 'training'}; held-out text is read by cascade.evaluation alone"
        )


def load_blocks(path: Path, *, split: str = "") -> TokenBlocks:
    """What `save_blocks` wrote.

    Raises:
        ValueError: the file is kept for a split that is not the one named.
    """
    with safe_open(path, framework="pt") as file:
        require_split(file.metadata(), split, path)
        stored = {name: file.get_tensor(name) for name in file.keys()}
        found = {name: tensor.to(torch.int64) for name, tensor in stored.items() if "listed" not in name}
        ids, about = found["input_ids"], file.metadata()
        listed = None
        if "listed_ids" in stored:
            listed = ListedTargets(stored["listed_ids"], stored["listed_log_p"])
        return TokenBlocks(
            ids,
            found.get("labels", ids),
            float(about["bytes_per_token"]),
            found.get("position_ids"),
            listed,
            about.get("masked") == "True",
        )


def batched(values: Iterable[_T], size: int) -> Iterator[list[_T]]:
    """Lists of `size` values, the last may be shorter."""
    iterator = iter(values)
    while some := list(islice(iterator, size)):
        yield some
