"""Labels as names of classes: one class has one name, however a file writes it, and no name is read as another."""

import math
import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any, Protocol

from cascade.data.rows import Place
from cascade.runtime.errors import UserError

_NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]*)?(e[+-]?[0-9]{1,3})?")
"""Numbers as files write them; 1_0 is a name."""


class Labelled(Protocol):
    """An example with its label and its place."""

    @property
    def label(self) -> str | None:
        """Name of the example's class; None where it has no label."""

    @property
    def place(self) -> Place | None:
        """Where the example stands; None where it is in no file."""


def label_of(value: Any, place: str) -> str:
    """The name of a label: of a number its digits, 0.0 being 0; a text as it is.

    Raises:
        UserError: there is none, or it is a number that counts no class; `place` is named.
    """
    if (
        value is None
        or (isinstance(value, str) and not value.strip())
        or (isinstance(value, float) and math.isnan(value))
    ):
        raise UserError(f"{place}: has no label; files without labels go into data.unlabelled")
    if isinstance(value, float):
        if not value.is_integer():
            raise UserError(
                f"{place}: the label {value!r} is no whole number, so no class; give names or whole numbers"
            )
        value = int(value)
    if not isinstance(value, bool | int | str):
        raise UserError(f"{place}: the label {str(value)[:80]} is neither a name nor a number")
    name = str(value)
    if name.startswith("-") and is_number(name[1:]):
        raise UserError(
            f"{place}: the label {name} marks a row without a label in most datasets; rows without labels go into a "
            "file of data.unlabelled. If it is a class, give the classes names, such as 'negative'"
        )
    return name


def is_number(name: str) -> bool:
    """Whether a label is a whole number from 0 on, written as numbers are."""
    return name.isascii() and name.isdigit() and (name == "0" or not name.startswith("0"))


def require_clear_labels(examples: Sequence[Labelled]) -> None:
    """Refuse labels that look like one class and have several names: '1' and '01', 'good' and ' Good', true and 1.

    Raises:
        UserError: two of them; both places are named.
    """
    first: dict[object, Labelled] = {}
    for example in examples:
        if example.label is None:
            continue
        earlier = first.setdefault(_meant(example.label), example)
        if earlier.label != example.label:
            raise UserError(
                f"data: the labels {earlier.label!r} ({earlier.place}) and {example.label!r} ({example.place}) look "
                "like one class and would be two; write them alike"
            )


def require_known_labels(examples: Sequence[Labelled], classes: Sequence[str]) -> None:
    """Refuse a label that is none of the classes.

    Raises:
        UserError: there is one; its place is named.
    """
    known = set(classes)
    for example in examples:
        if example.label is not None and example.label not in known:
            where = "data" if example.place is None else f"data: {example.place}"
            raise UserError(
                f"{where}: the label '{example.label}' is none of the {len(classes)} classes "
                f"{', '.join(classes)[:200]}; the classes are the labels of the training data, or the parent's"
            )


def _meant(name: str) -> object:
    word = name.strip().casefold()
    if word in ("true", "false"):
        return Decimal(word == "true")
    return Decimal(word) if _NUMBER.fullmatch(word) else word
