"""Four disjoint splits, without near copies across them.

`train` trains, `calibration` is what statistics are taken on, `selection` chooses (settings, stopping),
`heldout` is read by `evaluation/` alone, once per finished row.
"""

import hashlib
from typing import Literal

SPLITS = ("train", "calibration", "selection", "heldout")

Split = Literal["train", "calibration", "selection"]
"""The splits that every room may read."""


class Heldout(str):
    """The name of the held-out split as a key: readers open that split for it, and not for the plain text.

    The only one is `cascade.evaluation.heldout.HELDOUT`.
    """

    __slots__ = ()


def require_open(split: Split | Heldout) -> None:
    """Refuse a split that does not exist, and the held-out one to whoever has no key to it.

    Raises:
        ValueError: it is one of these.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split '{split}'; known: {', '.join(SPLITS)}")
    if split == "heldout" and not isinstance(split, Heldout):
        raise ValueError("the held-out split is read by cascade.evaluation alone, with its key `HELDOUT`")


SPLIT_SHARE = 0.03
"""Fraction of the training documents that goes to each other split that has no files of its own."""

_SHINGLE_LINES = 4


def split_of_text(text: str, *, shares: dict[str, float]) -> str:
    """The split of one document, a pure function of its text: equal documents never part.

    `shares` gives the fraction of documents of each split; the rest is 'train'.
    """
    point = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
    for split in ("calibration", "selection", "heldout"):
        point -= shares.get(split, 0.0)
        if point < 0:
            return split
    return "train"


def drop_near_copies(documents: list[str], references: list[str], *, threshold: float = 0.2) -> list[int]:
    """Indices of `documents` to keep: those that share less than `threshold` of their text with `references`.

    Shared means: runs of four consecutive non-blank lines (or the whole text, if shorter) that also stand in
    one of `others`, as a fraction of the document's own runs.
    """
    seen = {shingle for text in references for shingle in _shingles(text)}
    places = []
    for index, text in enumerate(documents):
        shingles = _shingles(text)
        if sum(shingle in seen for shingle in shingles) < threshold * len(shingles):
            places.append(index)
    return places


def _shingles(text: str) -> list[int]:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    last = max(1, len(lines) - _SHINGLE_LINES + 1)
    return [hash(tuple(lines[start : start + _SHINGLE_LINES])) for start in range(last)]
