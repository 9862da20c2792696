"""Labelled examples -> tensors: texts or images, each with a class; without a label they are there for their teacher.

Shapes: N = examples, S = tokens, H, W = pixels.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from cascade.data.bad_rows import BadRows, tell_once
from cascade.data.blocks import IGNORE_INDEX, TokenBlocks, load_blocks, require_split
from cascade.data.images import open_image, pillow_needed
from cascade.data.labels import is_number, label_of, require_clear_labels, require_known_labels
from cascade.data.rows import Place, Row
from cascade.data.sources import TextData, part_rows, splits_above, unfit_text
from cascade.data.splits import SPLIT_SHARE, Heldout, Split, require_open, split_of_text
from cascade.runtime.errors import UserError
from cascade.runtime.paths import distinct_files

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Examples:
    """Inputs of a classifier or an encoder, with the classes that are known."""

    tensors: dict[str, Tensor]
    """The model's inputs: input_ids and attention_mask int64 [N, S], or pixel_values float32 [N, C, H, W]."""
    labels: Tensor
    """int64 [N]; IGNORE_INDEX where there is none."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def block_size(self) -> int:
        """1: an example counts once, however long it is."""
        return 1

    def num_counted(self) -> int:
        """Examples, which a step's loss is divided by."""
        return len(self)

    def labelled(self) -> "Examples":
        """The examples that have a label."""
        return self.rows((self.labels != IGNORE_INDEX).nonzero()[:, 0])

    def rows(self, rows: Tensor) -> "Examples":
        """Examples picked by their numbers; texts are cut to the longest of them."""
        tensors = {name: tensor[rows] for name, tensor in self.tensors.items()}
        if "attention_mask" in tensors:
            longest = max(1, int(tensors["attention_mask"].sum(1).max()))
            tensors = {name: tensor[:, :longest] for name, tensor in tensors.items()}
        return Examples(tensors, self.labels[rows])

    def take(self, count: int) -> "Examples":
        """`count` examples spread evenly over all of them (all, if there are fewer)."""
        return self if count >= len(self) else self.rows(torch.arange(count) * len(self) // count)

    def inputs(self, device: torch.device | None = None) -> dict[str, Tensor]:
        """The keyword arguments of a model's forward pass."""
        return {name: tensor.to(device) for name, tensor in self.tensors.items()}

    def split(self, batch_size: int) -> "list[Examples]":
        """Batches of `batch_size` examples in stored order; the last may be smaller."""
        return [self.rows(rows) for rows in torch.arange(len(self)).split(batch_size)]


@dataclass(frozen=True)
class LabelledData:
    """Where examples come from."""

    text: TextData
    """Where the rows are read, by split."""
    images: bool
    labelled: bool = True
    """Whether rows have labels; without them a teacher's outputs are all that is learned."""
    label_field: str = "label"
    image_field: str = "image"
    unlabelled: tuple[str, ...] = ()
    """Files whose examples are trained on without their labels, if they have any."""
    train_examples: int | None = None
    """Examples of the training split that keep their labels, spread evenly over it; None: all."""
    rest: bool = False
    """Whether the rest of the training split is read without its labels."""


class Raw(NamedTuple):
    """An example as it stands in its file."""

    content: Any
    """Text, or pixels [C, H, W] from 0 to 1"""
    label: str | None
    """The class's name"""
    place: Place | None = None


def read_examples(data: LabelledData, split: Split | Heldout, bad: BadRows | None = None) -> list[Raw]:
    """The examples of one split, as they stand there. Rows without a text are counted in `bad`.

    What stands in the files of two splits belongs to the one that needs it untouched more, as documents do.

    Raises:
        UserError: a file is missing or malformed, or a field or a label is, or nothing is left.
    """
    require_open(split)
    bad = data.text.bad_row_counter() if bad is None else bad
    if data.text.source == "digits":
        digits = [example for example in _digits() if _split(example, {"selection": 0.1, "heldout": 0.3}) == split]
        return _known(data, digits) if split == "train" else digits
    split_files, names = data.text.own_splits, data.text.names_of(split)
    shares = {name: SPLIT_SHARE for name in data.text.missing_splits}
    parts = data.text.parts_of(names, f"data.{split}")
    raw = [example for part in parts for example in _read(data, part, data.labelled, bad, key=f"data.{split}")]
    bad.require_few(data.text.places_of(names), key=f"data.{split}")
    if split == "train" or split not in split_files:
        raw = [example for example in raw if _split(example, shares) == split]
    elsewhere = _kept_elsewhere(data, split)
    raw = _untouched(raw, elsewhere, f"data.{split}")
    if not raw:
        raise UserError(
            f"data: no examples for the {split} split that are not in another; give more, or data.{split} files of its "
            "own"
        )
    if split != "train":
        return raw
    files = distinct_files(data.unlabelled, "data.unlabelled")
    extra = [example for file in files for example in _read(data, file, False, bad, key="data.unlabelled")]
    bad.require_few(files, key="data.unlabelled")
    return _known(data, raw) + _untouched(extra, elsewhere, "data.unlabelled")


def class_names(data: LabelledData) -> list[str]:
    """The labels of the training split, each a class: whole numbers in their order, else names in the alphabet's.

    Raises:
        UserError: some are one number in two forms, or one word with and without white space around it.
    """
    return classes_in(read_examples(data, "train"))


def classes_in(raw: Sequence[Raw]) -> list[str]:
    """The classes that labels of these examples name, in the order of `class_names`."""
    first: dict[str, Raw] = {}
    for example in raw:
        if example.label is not None:
            first.setdefault(example.label, example)
    if not first:
        raise UserError("data: no example of the train split has a label, so there are no classes")
    require_clear_labels(list(first.values()))
    return sorted(first, key=int) if all(map(is_number, first)) else sorted(first)


def text_examples(raw: Sequence[Raw], classes: Sequence[str], tokenizer: Any, max_length: int) -> Examples:
    """Texts as the tokenizer writes them, cut at `max_length` tokens and padded at the end.

    Raises:
        UserError: a label is not among the classes.
    """
    # Without a padding token (an embedding's only) what is filled in does not matter: the mask hides it.
    texts, pad = [example.content for example in raw], 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    encodings = tokenizer(texts, truncation=True, max_length=max_length, verbose=False)["input_ids"]
    longest = max(map(len, encodings))
    ids = torch.full((len(encodings), longest), pad)
    mask = torch.zeros(len(encodings), longest, dtype=torch.int64)
    for row, encoding in enumerate(encodings):
        ids[row, : len(encoding)] = torch.tensor(encoding)
        mask[row, : len(encoding)] = 1
    return Examples({"input_ids": ids, "attention_mask": mask}, _labels(raw, classes))


def image_examples(raw: Sequence[Raw], classes: Sequence[str]) -> Examples:
    """Pixels from -1 to 1.

    Raises:
        UserError: the images are not all of one size, or a label is not among the classes.
    """
    first = raw[0].content.shape
    shape = next((example.content.shape for example in raw if example.content.shape != first), None)
    if shape is not None:
        raise UserError(
            f"data: images of {tuple(first)} and of {tuple(shape)} (channels, height, width); bring them to one size"
        )
    return Examples({"pixel_values": torch.stack([example.content for example in raw]) * 2 - 1}, _labels(raw, classes))


def save_examples(examples: Examples, path: Path, *, split: str = "") -> None:
    """Write one safetensors file; a file with a `split` opens only for that name."""
    save_file(examples.tensors | {"labels": examples.labels}, path, metadata={"split": split} if split else None)


def load_training(path: Path, *, split: str = "") -> TokenBlocks | Examples:
    """What `save_blocks` or `save_examples` wrote.

    Raises:
        ValueError: the file is kept for a split that is not the one named.
    """
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        if not names & {"attention_mask", "pixel_values"}:
            return load_blocks(path, split=split)
        require_split(file.metadata(), split, path)
        tensors = {name: file.get_tensor(name) for name in names}
    return Examples({name: value for name, value in tensors.items() if name != "labels"}, tensors["labels"])


def _labels(raw: Sequence[Raw], classes: Sequence[str]) -> Tensor:
    require_known_labels(raw, classes)
    number = {name: place for place, name in enumerate(classes)}
    return torch.tensor([IGNORE_INDEX if example.label is None else number[example.label] for example in raw])


def _read(data: LabelledData, part: str, labelled: bool, bad: BadRows, *, key: str) -> list[Raw]:
    field = data.image_field if data.images else data.text.text_field
    fields = {field: "Set data.image_field" if data.images else "Set data.text_field"}
    fields |= {data.label_field: "Set data.label_field"} if labelled else {}
    examples: list[Raw] = []
    unlabelled: Place | None = None
    for place, values, _ in _rows(data, part, fields, key):
        content, where = values.get(field), f"{key}: {place}"
        reason = "" if data.images else unfit_text(content)
        bad.read(place)
        if reason:
            complaint = f"field '{field}' {reason}" if field in values else f"it has no field '{field}'"
            bad.skip(place, complaint, key=key)
            continue
        if labelled and data.label_field not in values:  # a field that no row has is told by its name, at the end
            unlabelled = unlabelled or place
            continue
        label = label_of(values[data.label_field], where) if labelled else None
        pixels = open_image(content, where, Path(part).parent) if data.images else content
        examples.append(Raw(pixels, label, place))
    if unlabelled is not None:
        label_of(None, f"{key}: {unlabelled}")
    return examples


def _rows(data: LabelledData, part: str, fields: dict[str, str], key: str) -> Iterator[Row]:
    with pillow_needed(key) if data.images else nullcontext():  # datasets reads the pictures of the hub's rows
        yield from part_rows(data.text, part, fields, key=key)


def _kept_elsewhere(data: LabelledData, split: str) -> frozenset[str]:
    """Contents that stand in files of later splits, which need them untouched more."""
    split_files, bad = data.text.own_splits, BadRows()
    parts = [
        (part, f"data.{name}")
        for name in splits_above(data.text, split)
        for part in data.text.parts_of(split_files[name])
    ]
    return frozenset(
        _content(example) for part, key in parts for example in _read(data, part, data.labelled, bad, key=key)
    )


def _untouched(raw: list[Raw], elsewhere: frozenset[str], key: str) -> list[Raw]:
    """The examples that do not stand in a later split's files; a warning counts the rest."""
    left = [example for example in raw if _content(example) not in elsewhere] if elsewhere else raw
    if len(left) < len(raw):
        tell_once(
            logger,
            f"{key}: {len(raw) - len(left):,} of {len(raw):,} examples stand in the files of a later split, too "
            "(selection, heldout), and are left out here",
        )
    return left


def _split(example: Raw, shares: dict[str, float]) -> str:
    return split_of_text(_content(example), shares=shares)


def _content(example: Raw) -> str:
    """The text, or the pixels as hexadecimal digits: equal for equal examples."""
    content = example.content
    return content if isinstance(content, str) else str(content.numpy().tobytes().hex())


def _known(data: LabelledData, raw: list[Raw]) -> list[Raw]:
    """The examples that keep their labels, then the rest without labels where that is read."""
    count = data.train_examples
    if count is None or count >= len(raw):
        return raw
    labelled = [number * len(raw) // count for number in range(count)]
    unlabelled = sorted(set(range(len(raw))) - set(labelled)) if data.rest else []
    return [raw[number] for number in labelled] + [Raw(raw[number].content, None) for number in unlabelled]


def _digits() -> list[Raw]:
    """The 1,797 handwritten digits, 8 x 8 pixels, that scikit-learn ships (UCI, Alpaydin and Kaynak 1998)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    return [Raw(image, str(label)) for image, label in zip(pixels, digits.target, strict=True)]
