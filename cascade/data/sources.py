"""Where text comes from, as documents of one split."""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cascade.data.bad_rows import BadRows
from cascade.data.passages import cut_documents
from cascade.data.rows import Place, Row, read_rows, require_fields, without_padding
from cascade.data.splits import SPLIT_SHARE, SPLITS, Heldout, Split, drop_near_copies, require_open, split_of_text
from cascade.data.stdlib import frozen_heldout, split_of_module, stdlib_documents
from cascade.models.checkpoint.hub import bound_waiting, hub_cause
from cascade.runtime.errors import UserError
from cascade.runtime.paths import distinct_files

logger = logging.getLogger(__name__)

Document = str | list[dict[str, Any]]
"""A text, or a conversation."""

Placed = tuple[Place, Document]
"""(place of its row, document)"""


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
    """Share of the tokens of 'train' for each of its files; empty: by their size"""
    streaming: bool = False
    """Documents are read one after another, only as many as are needed"""
    begin_blocks: bool = False
    """Whether a block that starts inside a document begins as the tokenizer begins a text"""
    end_token: bool | None = None
    """Whether an end token stands behind each document where the tokenizer begins the next one; None: as it writes"""
    whole_documents: bool = False
    """Whether documents stay whole where they are too few to give each split one"""
    turns: str = "all"
    """Which answers of a conversation count: 'all', or the 'last' alone"""
    bad_rows: str = "skip"
    """Rows that cannot be used: 'skip' up to `max_bad_rows`, or 'stop'"""
    max_bad_rows: float = 0.01
    """The largest share of rows that is skipped"""
    recipe: bool = True
    """Whether a recipe says all this, so that messages may name its keys; else a single command's --data"""

    @property
    def own_splits(self) -> dict[str, tuple[str, ...]]:
        """Files, or the hub dataset's splits, by split; those that are not here are cut from 'train'."""
        if self.source == "files":
            return self.files
        return {name: (value,) for name, value in (self.hub_splits or {}).items()}

    @property
    def missing_splits(self) -> list[str]:
        """The splits that are cut from 'train'."""
        return [name for name in SPLITS if name not in self.own_splits and name != "train"]

    @property
    def field(self) -> str:
        """Name of the rows' field that holds a document."""
        return self.messages_field or self.text_field

    def names_of(self, split: str) -> tuple[str, ...]:
        """Files, or the hub dataset's split, that a split is read from."""
        return self.own_splits.get(split, self.own_splits["train"])

    def parts_of(self, names: Sequence[str], key: str = "data") -> list[str]:
        """The files that names of a split stand for, in the order in which they are read; of the hub the names."""
        return list(names) if self.source == "hub" else distinct_files(names, key)

    def places_of(self, names: Sequence[str]) -> list[str]:
        """The `Place.file` of all rows that are read for names of a split."""
        return [self.place_of(part) for part in self.parts_of(names)]

    def place_of(self, part: str) -> str:
        """The `Place.file` of a file, or of a split of the hub's dataset."""
        return f"{self.dataset} ({part})" if self.source == "hub" else part

    def bad_row_counter(self) -> BadRows:
        """A new counter of bad rows, under the recipe's rules for them."""
        return BadRows(self.bad_rows, self.max_bad_rows, recipe=self.recipe)

    @property
    def field_remedy(self) -> str:
        """What to do where rows lack the documents' field."""
        if not self.recipe:
            return f"Rename the field with the texts to '{self.field}'"
        return f"Set {'data.messages_field' if self.messages_field else 'data.text_field'}"


def read_documents(
    data: TextData,
    split: Split | Heldout,
    *,
    only: Sequence[str] | None = None,
    bad: BadRows | None = None,
    key: str = "",
) -> list[Any]:
    """The documents of one split.

    No document is in two splits, and no near copy of a split's text is in 'train' (stdlib). A document that stands in
    the files of two splits belongs to the one that needs it untouched more: heldout before selection before calibration
    before train. `only` names the files to read, of those of the split. Rows that cannot be used are counted in `bad`.
    Messages name `key`, 'data.`split`' where it is not given.

    Raises:
        UserError: a file is missing or malformed, the field is missing, too many rows cannot be used, or there is no
            text.
    """
    return [document for _, document in read_placed(data, split, only=only, bad=bad, key=key)]


def read_placed(
    data: TextData,
    split: Split | Heldout,
    *,
    only: Sequence[str] | None = None,
    bad: BadRows | None = None,
    key: str = "",
) -> list[Placed]:
    """The documents of one split as `read_documents` gives them, each with its row's place.

    Where the documents are too few to give each split one, they are cut into passages (`cascade.data.passages`).
    """
    require_open(split)
    if data.source == "stdlib":
        return [(Place("stdlib", number, "row"), text) for number, text in enumerate(_stdlib(split), start=1)]
    bad, key = data.bad_row_counter() if bad is None else bad, key or f"data.{split}"
    train_key = "data.train" if data.recipe else key
    elsewhere = kept_elsewhere(data, split)
    names = only or data.names_of(split)
    if (split == "train" or split not in data.own_splits) and cuts_passages(data, train_key):
        documents = _placed_passages(data, split, names, elsewhere, bad, (key, train_key))
    else:
        placed = documents_of(data, names, bad, key=key)
        documents = [(place, text) for place, text in placed if belongs(data, split, text, elsewhere)]
    bad.require_few(data.places_of(names), key=key)
    if not documents:
        more = f", or data.{split} files of its own" if data.recipe else ""
        place = "data" if data.recipe else key
        raise UserError(f"{place}: no documents for the {split} split that are not in another; give more text{more}")
    return documents


def documents_of(
    data: TextData, names: Sequence[str], bad: BadRows | None = None, *, key: str = "data"
) -> Iterator[Placed]:
    """All documents of these files, or splits of the hub's dataset; what cannot be used is left out, and counted.

    Raises:
        UserError: a file is missing or malformed, the field is missing, or the recipe says to stop at a bad row.
    """
    for part in data.parts_of(names, key):
        for place, values, _ in part_rows(data, part, key=key):
            document = usable(data, place, values, bad, key=key)
            if document is not None:
                yield place, document


def usable(
    data: TextData, place: Place, values: dict[str, Any], bad: BadRows | None, *, key: str = "data"
) -> Document | None:
    """A row's document; None where it cannot be used, which `bad` then counts."""
    document: Any = values.get(data.field)
    empty = isinstance(document, str) and not document.strip()
    if bad is not None:
        bad.read(place, empty=empty)
    if empty:
        return None
    field_name = data.field
    if field_name not in values:
        reason = f"it has no field '{field_name}'"
    else:
        if data.messages_field:
            document = with_contents(document)
            reason = unfit_messages(document) or unanswered(document)
        else:
            reason = unfit_text(document)
        reason = f"field '{field_name}' {reason}" if reason else ""
    if reason and bad is not None:
        bad.skip(place, reason, key=key)
    whole: Document | None = None if reason else document
    return whole


def unfit_text(value: Any) -> str:
    """Why a value is no text; '' if it is."""
    if value is None:
        return "is null"
    if not isinstance(value, str):
        return f"is no text: {_shown(value)}"
    try:
        value.encode()
    except UnicodeEncodeError as error:
        return f"is no text that can be written: {error.reason} at letter {error.start + 1}"
    return ""


def unfit_messages(value: Any) -> str:
    """Why a value is no conversation; '' if it is."""
    expected = "; expected a list of {role, content} messages"
    if not isinstance(value, list) or not value:
        return f"is {'null' if value is None else _shown(value)}{expected}"
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return f"has no role in message {number}: {_shown(message)}{expected}"
        reason = unfit_text(message.get("content"))
        if reason:
            remedy = '; write "" for an empty text' if message.get("content") is None else ""
            return f"has a message {number} ({message['role']}) whose content {reason}{remedy}"
    return ""


def unanswered(messages: list[dict[str, Any]]) -> str:
    """Why a conversation has nothing to learn from, or an answer that would not count; '' if all is well."""
    roles = [message["role"] for message in messages]
    wrong = next((role for role in roles if role != "assistant" and role.strip().casefold() == "assistant"), None)
    if "assistant" not in roles:
        return f"has no answer of the assistant (its roles: {', '.join(dict.fromkeys(roles))})"
    return "" if wrong is None else f"has the roles 'assistant' and {wrong!r}, which would not count; write them alike"


def with_contents(value: Any) -> Any:
    """A conversation whose messages that only call tools have the content '': many write null there, or nothing."""
    if not isinstance(value, list):
        return value
    return [
        message | {"content": ""}
        if isinstance(message, dict) and message.get("tool_calls") and message.get("content") is None
        else message
        for message in value
    ]


def _shown(content: Any) -> str:
    return str(content)[:80]


def cuts_passages(data: TextData, key: str = "data.train") -> bool:
    """Whether the documents of 'train' are too few to give each split that is cut from them one, so that they are cut.

    With weights, each source needs one of 'train' as well. Conversations are never cut.
    """
    missing = data.missing_splits
    if data.source == "stdlib" or data.messages_field or data.whole_documents or not missing:
        return False
    shares = {name: SPLIT_SHARE for name in missing}
    names = data.names_of("train")
    waiting, none = {*missing, *(names if data.weights else ["train"])}, True
    for name in names:
        source = name if data.weights else "train"
        for _, document in documents_of(data, [name], key=key):
            none = False
            split = split_of_text(opening(document), shares=shares)
            waiting.discard(source if split == "train" else split)
            if not waiting:
                return False
            if source not in waiting and not waiting & set(missing):
                break
    return not none


def passages_of(
    data: TextData, bad: BadRows, elsewhere: frozenset[str] = frozenset(), *, key: str = "data.train"
) -> dict[str, list[str]]:
    """The texts of each split, of documents that are too few: those of 'train' cut into passages."""
    placed = documents_of(data, data.names_of("train"), bad, key=key)
    texts = [document for _, document in placed if isinstance(document, str) and document not in elsewhere]
    return cut_documents(texts, data.missing_splits)


def _placed_passages(
    data: TextData, split: str, names: Sequence[str], elsewhere: frozenset[str], bad: BadRows, keys: tuple[str, str]
) -> list[Placed]:
    """The passages of one split, of those of the files `names` of 'train'; `keys`: of the split and of 'train'."""
    key, train_key = keys
    parts = passages_of(data, bad, elsewhere, key=train_key)[split]
    if list(names) != list(data.names_of("train")):
        texts = [document for _, document in documents_of(data, names)]
        parts = [part for part in parts if any(isinstance(text, str) and part in text for text in texts)]
    logger.warning(
        "%s: too few documents to give each split one: they are dealt out in stretches, long ones cut at "
        "paragraphs; %d pieces with %d letters in all are this split's",
        key, len(parts), sum(map(len, parts)),
    )  # fmt: skip
    file = data.places_of(names)[0]
    return [(Place(file, number, "row"), part) for number, part in enumerate(parts, start=1)]


def kept_elsewhere(data: TextData, split: str) -> frozenset[str]:
    """Texts of files of later splits: what stands in two splits belongs to the one that needs it untouched more."""
    split_files, above = data.own_splits, splits_above(data, split)
    return frozenset(
        _as_text(document)
        for name in above
        for _, document in documents_of(data, split_files[name], key=f"data.{name}")
    )


def splits_above(data: TextData, split: str) -> list[str]:
    """The splits with files of their own that need what stands in them untouched more than this one does."""
    above = SPLITS[SPLITS.index(split) + 1 :] if split in data.own_splits else SPLITS[1:]
    return [name for name in above if name in data.own_splits]


def belongs(data: TextData, split: str, document: Any, elsewhere: frozenset[str]) -> bool:
    """Whether a document that stands where the split is read is the split's; `elsewhere` is `kept_elsewhere`."""
    split_files, text = data.own_splits, _as_text(document)
    if split == "train" or split not in split_files:
        shares = {name: SPLIT_SHARE for name in SPLITS if name not in split_files}
        if split_of_text(opening(document), shares=shares) != split:
            return False
    return text not in elsewhere


def opening(document: Document) -> str:
    """What decides the split: of a conversation all before its first answer; answers to one prompt stay together."""
    if isinstance(document, str):
        return document
    turns = [
        (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, message)
        for message in document
    ]
    roles = [role for role, _ in turns]
    return json.dumps(turns[: roles.index("assistant")] if "assistant" in roles[1:] else turns)


def _as_text(document: Document) -> str:
    return document if isinstance(document, str) else json.dumps(document, sort_keys=True, default=str)


def _stdlib(split: str) -> list[str]:
    if split == "heldout":
        return frozen_heldout()
    by_split: dict[str, list[str]] = {name: [] for name in SPLITS}
    for path, text in stdlib_documents():
        by_split[split_of_module(path)].append(text)
    if split != "train":
        return by_split[split]
    references = by_split["calibration"] + by_split["selection"] + by_split["heldout"] + frozen_heldout()
    return [by_split["train"][index] for index in drop_near_copies(by_split["train"], references)]


def part_rows(
    data: TextData,
    part: str,
    fields: dict[str, str] | None = None,
    *,
    key: str = "data",
    after: tuple[int, int] = (0, 0),
) -> Iterator[Row]:
    """The rows of a file, or of a split of the hub's dataset; of a file those behind row `after`.

    `fields`: {field: what to do without it}; the documents' where not given. Streamed text of the hub is
    fetched as far as it is read.

    Raises:
        UserError: it cannot be read, or no row has the field.
    """
    if fields is None and data.source == "hub" and data.streaming:
        return (
            Row(Place(data.place_of(part), number, "row"), without_padding(values))
            for number, values in enumerate(hub_stream(data, part), start=1)
        )
    if fields is None:
        fields = {data.field: data.field_remedy}
    if data.source != "hub":
        rows = read_rows(part, list(fields), key=key, after=after)
        return rows if after[0] else require_fields(rows, fields, key=key)
    table = _load_hub(data, part)
    missing = [name for name in fields if name not in table.column_names]
    if missing:
        has = ", ".join(table.column_names)
        raise UserError(f"{key}: {part}: no field '{missing[0]}'; it has: {has}. {fields[missing[0]]}.")
    return _hub_rows(data, part, table.select_columns(list(fields)))


def hub_stream(data: TextData, part: str) -> Any:
    """The rows of a split of the hub's dataset, read one after another; `state_dict` says where reading stands."""
    rows = _load_hub(data, part, streaming=True)
    first = next(iter(rows), None)
    if first is not None and data.field not in first:
        raise UserError(f"{part}: no field '{data.field}'; it has: {', '.join(first)}. {data.field_remedy}.")
    return rows.select_columns([data.field])


def _hub_rows(data: TextData, part: str, table: Any) -> Iterator[Row]:
    file, number = data.place_of(part), 0
    for columns in table.iter(batch_size=256):
        for values in zip(*columns.values(), strict=True):
            number += 1
            yield Row(Place(file, number, "row"), without_padding(dict(zip(columns, values, strict=True))))


def _load_hub(data: TextData, split: str, **options: Any) -> Any:
    from datasets import load_dataset

    bound_waiting()
    try:
        return load_dataset(data.dataset, data.dataset_config or None, split=split, revision=data.revision, **options)
    except Exception as error:  # network, missing dataset, missing split: all the user's to mend
        complaint = f"data: {data.dataset}@{data.revision}, split {split}: cannot be loaded: {hub_cause(error)}"
        raise UserError(complaint) from error
