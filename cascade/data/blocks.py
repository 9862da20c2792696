"""Documents -> blocks of token ids, packed one after another with an end token between documents.

Shapes: N = blocks, S = block size (tokens), B = batch.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from cascade.errors import UserError

IGNORE_INDEX = -100
"""Label of a token that no loss counts (padding, prompts), as in transformers."""


@dataclass(frozen=True)
class TokenBlocks:
    """Packed text: what every stage reads."""

    input_ids: Tensor
    """int64 [N, S]"""
    labels: Tensor
    """int64 [N, S], unshifted as in transformers; IGNORE_INDEX where no loss is wanted."""
    bytes_per_token: float
    """UTF-8 bytes of text per token, for bits per byte."""

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return self.input_ids.shape[1]

    def take(self, count: int) -> "TokenBlocks":
        """`count` blocks spread evenly over all of them (all, if there are fewer), so that every document counts."""
        if count >= len(self):
            return self
        rows = torch.arange(count) * len(self) // count
        return TokenBlocks(self.input_ids[rows], self.labels[rows], self.bytes_per_token)

    def batches(self, batch_size: int) -> list[tuple[Tensor, Tensor]]:
        """(input_ids, labels) [B, S] pairs in stored order; the last may be smaller."""
        return list(zip(torch.split(self.input_ids, batch_size), torch.split(self.labels, batch_size), strict=True))


def pack_documents(
    texts: Sequence[str],
    tokenizer: Any,
    *,
    block_size: int,
    max_blocks: int | None = None,
    name: str = "text",
) -> TokenBlocks:
    """Blocks of exactly `block_size` tokens; the end token stands after each document, the remainder is dropped.

    Raises:
        UserError: the text does not fill one block.
    """
    end = tokenizer.eos_token_id
    if end is None:
        end = tokenizer.sep_token_id  # what encoders end a text with
    if end is None:
        raise UserError(f"{name}: the tokenizer has no end-of-text token, so documents cannot be kept apart")
    stream: list[int] = []
    num_bytes = 0
    for ids, text in zip(_encode(texts, tokenizer), texts, strict=True):
        stream += ids
        stream.append(end)
        num_bytes += len(text.encode())
        if max_blocks is not None and len(stream) >= max_blocks * block_size:
            break
    count = len(stream) // block_size
    if count == 0:
        raise UserError(
            f"{name}: {len(stream)} tokens in {len(texts)} documents do not fill one block of {block_size} tokens; "
            "give more text or a smaller data.block_size"
        )
    count = count if max_blocks is None else min(count, max_blocks)
    packed = torch.tensor(stream[: count * block_size], dtype=torch.int64).view(count, block_size)
    return TokenBlocks(packed, packed, num_bytes / len(stream))


def save_blocks(blocks: TokenBlocks, path: Path) -> None:
    """One safetensors file; labels are stored only where they differ from the ids."""
    tensors = {"input_ids": blocks.input_ids.to(torch.int32)}
    if not torch.equal(blocks.labels, blocks.input_ids):
        tensors["labels"] = blocks.labels.to(torch.int32)
    save_file(tensors, path, metadata={"bytes_per_token": repr(blocks.bytes_per_token)})


def load_blocks(path: Path) -> TokenBlocks:
    """What `save_blocks` wrote."""
    with safe_open(path, framework="pt") as file:
        ids = file.get_tensor("input_ids").to(torch.int64)
        labels = file.get_tensor("labels").to(torch.int64) if "labels" in file.keys() else ids
        return TokenBlocks(ids, labels, float(file.metadata()["bytes_per_token"]))


def _encode(texts: Sequence[str], tokenizer: Any, batch: int = 256) -> Iterable[list[int]]:
    for start in range(0, len(texts), batch):
        yield from tokenizer(
            list(texts[start : start + batch]),
            add_special_tokens=False,
            return_attention_mask=False,
            verbose=False,
        )["input_ids"]
