"""Blocks of tokens: what every stage reads, and their files.

Shapes: N = blocks, S = block size (tokens).
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from cascade.data.token_targets import KnownTargets, ListedTargets, StoredTargets
from cascade.models.checkpoint.tensor_file import sort_metadata

IGNORE_INDEX = -100
"""Label of a token that no loss counts (padding, prompts), as in transformers."""


@dataclass(frozen=True)
class TokenBlocks:
    """Packed text: what every stage reads."""

    input_ids: Tensor
    """int32 or int64 [N, S]: packed text has 4 bytes a token, and a file of it is read where it is needed."""
    labels: Tensor
    """As many, unshifted as in transformers; IGNORE_INDEX where no loss is wanted."""
    bytes_per_token: float
    """UTF-8 bytes of text per token, for bits per byte; 0 where not all tokens count, and there is no such number."""
    position_ids: Tensor | None = None
    """Whole numbers [N, S]: each token's place in its document, from the block's start on; None where the documents of
    a block see each other."""
    known: KnownTargets | StoredTargets | None = None
    """A teacher's probabilities of each token, where they were kept or came with the text."""
    masked: bool = False
    """Whether a label is the hidden token at its own place (masked language models), not the next place's input."""

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
        return (self.labels if self.masked else self.labels[:, 1:]).to(torch.int64)

    def predicting(self, hidden: Tensor) -> Tensor:
        """The places of [N, S, ...] that predict a target: all but the last, or all of masked blocks."""
        return hidden if self.masked else hidden[:, :-1]

    def take(self, count: int) -> "TokenBlocks":
        """`count` blocks spread evenly over all of them (all, if there are fewer), so that every document counts."""
        if count >= len(self):
            return self
        return self.rows(torch.arange(count) * len(self) // count)

    def rows(self, rows: Tensor) -> "TokenBlocks":
        """Blocks picked by their numbers, in that order."""
        positions = None if self.position_ids is None else self.position_ids[rows]
        ids = self.input_ids[rows]
        return replace(
            self,
            input_ids=ids,
            labels=ids if self.labels is self.input_ids else self.labels[rows],
            position_ids=positions,
            known=None if self.known is None else self.known.rows(rows),
        )

    def inputs(self, device: torch.device | None = None) -> dict[str, Tensor]:
        """What a model takes, in int64: places start again at 0 with each document, which masks it for transformers."""
        tensors = {"input_ids": self.input_ids, "position_ids": self.position_ids}
        return {name: ids.to(device, torch.int64) for name, ids in tensors.items() if ids is not None}

    def split(self, batch_size: int) -> "list[TokenBlocks]":
        """Blocks in stored order, `batch_size` at a time; the last may be fewer."""
        return [self.rows(rows) for rows in torch.arange(len(self)).split(batch_size)]


def save_blocks(blocks: TokenBlocks, path: Path, *, split: str = "") -> None:
    """One safetensors file; labels are stored only where they differ from the ids.

    A file with a `split` opens only for that name (`require_split`).
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
    """Refuse to open a file that is kept for one split without the name of that split.

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
    """What `save_blocks` wrote, in the integers of the file and mapped into memory, not copied.

    Raises:
        ValueError: the file is kept for a split that is not the one named.
    """
    with safe_open(path, framework="pt") as file:
        require_split(file.metadata(), split, path)
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    listed = None
    if "listed_ids" in tensors:
        listed = ListedTargets(tensors["listed_ids"], tensors["listed_log_p"])
    return TokenBlocks(
        tensors["input_ids"],
        tensors.get("labels", tensors["input_ids"]),
        float(metadata["bytes_per_token"]),
        tensors.get("position_ids"),
        listed,
        metadata.get("masked") == "True",
    )
