"""Where text comes from, as documents of one split."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cascade.data.splits import SPLIT_SHARE, SPLITS, drop_near_copies, split_of_text
from cascade.data.stdlib import frozen_heldout, split_of_module, stdlib_documents
from cascade.errors import UserError
from cascade.models.hub import bound_waiting, hub_cause

_READERS = {
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".txt": "text",
    ".md": "text",
    ".py": "text",
}


@dataclass(frozen=True)
class TextData:
    """One source of text and its splits."""

    source: str
    """'stdlib', 'files' or 'hub'"""
    files: dict[str, tuple[str, ...]]
    """source files: paths by split; a split without any is cut from 'train'"""
    text_field: str = "text"
    dataset: str = ""
    """source hub: the dataset's id"""
    revision: str = ""
    """source hub: a pinned commit"""
    dataset_config: str = ""
    hub_splits: dict[str, str] | None = None
    """source hub: the dataset's own split names by ours"""
    messages_field: str = ""
    """Documents are conversations, in this field, instead of texts."""
    chat_template: bool = True
    """Whether conversations go through the model's template; else their texts follow one another"""
    listed: bool = False
    """Whether answers' `top_logprobs` are read as well"""
    weights: tuple[float, ...] = ()
    """Of the files of 'train': shares of its tokens; by their size where not given"""
    streaming: bool = False
    """Documents are read one after another, only as many as are needed"""
    begin_blocks: bool = False
    """Whether a block that starts inside a document begins as the tokenizer begins a text"""
    end_token: bool = False
    """Whether an end token stands behind each document also where the tokenizer begins the next one with a token"""

    @property
    def own_splits(self) -> dict[str, tuple[str, ...]]:
        """Files, or the hub dataset's splits, by split; those that are not here are cut from 'train'."""
        if self.source == "files":
            return self.files
        return {name: (value,) for name, value in (self.hub_splits or {}).items()}

    def names_of(self, split: str) -> tuple[str, ...]:
        """What is read for a split."""
        return self.own_splits.get(split, self.own_splits["train"])


Document = str | list[dict[str, Any]]
"""A text, or a conversation."""


def read_documents(data: TextData, split: str, *, only: Sequence[str] | None = None) -> list[Any]:
    """The documents of one split.

    No document is in two splits, and no near copy of a split's text is in 'train' (stdlib). A document that stands in
    the files of two splits belongs to the one that needs it untouched more: heldout before selection before calibration
    before train. `only` names the files to read, of those of the split.

    Raises:
        UserError: a file is missing or malformed, the field is missing, or there is no text.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split '{split}'; known: {', '.join(SPLITS)}")
    if data.source == "stdlib":
        return _stdlib(split)
    elsewhere = kept_elsewhere(data, split)
    read = _read(data, only or data.names_of(split))
    documents = [one for one in read if belongs(data, split, one, elsewhere)]
    if not documents:
        raise UserError(
            f"data: no documents for the {split} split that are not in another; give more text, or data.{split} files "
            "of its own"
        )
    return documents


def kept_elsewhere(data: TextData, split: str) -> frozenset[str]:
    """Texts of files of later splits: what stands in two splits belongs to the one that needs it untouched more."""
    own = data.own_splits
    above = SPLITS[SPLITS.index(split) + 1 :] if split in own else [name for name in SPLITS if name != "train"]
    return frozenset(_as_text(one) for name in above if name in own for one in _read(data, own[name]))


def belongs(data: TextData, split: str, document: Any, elsewhere: frozenset[str]) -> bool:
    """Whether a document that stands where the split is read is the split's; `elsewhere` is `kept_elsewhere`."""
    if not document or (isinstance(document, str) and not document.strip()):
        return False
    own, text = data.own_splits, _as_text(document)
    if split == "train" or split not in own:
        shares = {name: SPLIT_SHARE for name in SPLITS if name not in own}
        if split_of_text(opening(document), shares=shares) != split:
            return False
    return text not in elsewhere


def opening(document: Document) -> str:
    """What decides the split: of a conversation all before its first answer; answers to one prompt stay together."""
    if isinstance(document, str):
        return document
    said = [(one.get("role"), one.get("content")) if isinstance(one, dict) else (None, one) for one in document]
    roles = [role for role, _ in said]
    return json.dumps(said[: roles.index("assistant")] if "assistant" in roles[1:] else said)


def _as_text(document: Document) -> str:
    return document if isinstance(document, str) else json.dumps(document, sort_keys=True)


def _stdlib(split: str) -> list[str]:
    if split == "heldout":
        return frozen_heldout()
    by_split: dict[str, list[str]] = {name: [] for name in SPLITS}
    for path, text in stdlib_documents():
        by_split[split_of_module(path)].append(text)
    if split != "train":
        return by_split[split]
    others = by_split["calibration"] + by_split["selection"] + by_split["heldout"] + frozen_heldout()
    return [by_split["train"][index] for index in drop_near_copies(by_split["train"], others)]


def _read(data: TextData, names: Sequence[str]) -> list[Any]:
    from datasets import load_dataset

    documents: list[Any] = []
    field = data.messages_field or data.text_field
    for name in names:
        rows = (_load_hub if data.source == "hub" else _load_table)(data, name, load_dataset)
        if field not in rows.column_names:
            key = "messages_field" if data.messages_field else "text_field"
            raise UserError(f"{name}: no field '{field}'; it has: {', '.join(rows.column_names)}. Set data.{key}.")
        documents += rows[field] if data.messages_field else [one for one in rows[field] if isinstance(one, str)]
    return documents


def open_stream(data: TextData, name: str) -> Any:
    """The rows of a file or hub split, read one after another; its `state_dict` says where reading stands."""
    from datasets import load_dataset

    field = data.messages_field or data.text_field
    rows = (_load_hub if data.source == "hub" else _load_table)(data, name, load_dataset, streaming=True)
    first = next(iter(rows), None)
    if first is not None and field not in first:
        key = "messages_field" if data.messages_field else "text_field"
        raise UserError(f"{name}: no field '{field}'; it has: {', '.join(first)}. Set data.{key}.")
    return rows


def load_file(data: TextData, name: str) -> Any:
    """The rows of a file, or of a split of the hub's dataset: `column_names`, and columns by name.

    Raises:
        UserError: it cannot be read.
    """
    from datasets import load_dataset

    return (_load_hub if data.source == "hub" else _load_table)(data, name, load_dataset)


def _load_table(data: TextData, name: str, load_dataset: Any, **options: Any) -> Any:
    path = Path(name).expanduser()
    if not path.is_file():
        raise UserError(f"data: {name}: no such file")
    suffixes = [suffix for suffix in path.suffixes if suffix in _READERS]
    if not suffixes:
        raise UserError(f"data: {name}: unknown kind of file; known: {', '.join(_READERS)} (also .gz)")
    if _READERS[suffixes[-1]] == "text":
        options["sample_by"] = "document"
    try:
        return load_dataset(_READERS[suffixes[-1]], data_files=str(path), split="train", **options)
    except Exception as error:  # datasets wraps parsers' errors in classes of its own, one per format
        cause = error.__cause__ or error
        raise UserError(f"data: {name}: cannot be read: {cause}") from error


def _load_hub(data: TextData, split: str, load_dataset: Any, **options: Any) -> Any:
    bound_waiting()
    try:
        return load_dataset(data.dataset, data.dataset_config or None, split=split, revision=data.revision, **options)
    except Exception as error:  # network, missing dataset, missing split: all the user's to mend
        told = f"data: {data.dataset}@{data.revision}, split {split}: cannot be loaded: {hub_cause(error)}"
        raise UserError(told) from error
