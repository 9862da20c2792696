"""Few long texts as passages, so that a book can fill all splits: what stands together stays in one split.

A corpus is cut only where its documents are too few to give each split one.
"""

import re
from collections.abc import Sequence

PASSAGE_LETTERS = 2000
"""Letters of a passage, about; a small corpus has shorter ones, so that there are enough."""

_LEAST_LETTERS = 200

_ROUND = 33
"""One of so many stretches goes to each split without files of its own: 3 in 100, as with documents."""

_MOST_TOGETHER = 8
"""Most passages of a stretch."""


def cut_documents(documents: Sequence[str], missing: Sequence[str]) -> dict[str, list[str]]:
    """The texts of 'train' and of each of the `missing` splits, cut from these documents.

    The documents are cut at paragraph borders into passages, where they are not many enough already, and these are
    dealt out in stretches of neighbours, the missing splits' spread over the corpus; what is left between them is
    training text. A text has one split alone: a passage that stands in several places goes, of all its splits, to the
    one that `missing` names last.
    """
    order = ["train", *missing]
    size = max(_LEAST_LETTERS, min(PASSAGE_LETTERS, sum(map(len, documents)) // (2 * _ROUND)))
    cut = [[text] if len(documents) >= _ROUND else passages(text, size) for text in documents]
    whole = [(number, passage) for number, parts in enumerate(cut) for passage in parts]
    dealt = list(zip(_splits(len(whole), missing), whole, strict=True))
    highest: dict[str, int] = {}
    for split, (_, passage) in dealt:
        stripped = passage.strip()
        highest[stripped] = max(order.index(split), highest.get(stripped, 0))
    by_split: dict[str, list[str]] = {name: [] for name in order}
    last: tuple[str, int] | None = None
    for split, (number, passage) in dealt:
        if not passage.strip() or highest[passage.strip()] != order.index(split):
            last = None
        elif (split, number) == last:
            by_split[split][-1] += passage
        else:
            by_split[split].append(passage)
            last = (split, number)
    return by_split


def passages(text: str, size: int = PASSAGE_LETTERS) -> list[str]:
    """A text cut at the borders of paragraphs, or of lines, sentences or words where those are longer than `size`.

    One after another they are the text.
    """
    pieces = _finer(text, size, (r"(?<=\n)\n+", r"\n+", r"(?<=[.!?…。])\s+", r"\s+"))
    joined: list[str] = []
    for piece in pieces:
        if joined and (len(joined[-1]) + len(piece) <= size or not piece.strip()):
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined


def _finer(text: str, size: int, borders: Sequence[str]) -> list[str]:
    """Pieces that end at the first kind of border, the longer ones at the next."""
    ends = [match.end() for match in re.finditer(borders[0], text)] + [len(text)]
    pieces = [text[start:end] for start, end in zip([0, *ends], ends, strict=False) if end > start]
    if len(borders) == 1:
        return [piece[start : start + size] for piece in pieces for start in range(0, len(piece), size)]
    return [part for piece in pieces for part in ([piece] if len(piece) <= size else _finer(piece, size, borders[1:]))]


def _splits(count: int, missing: Sequence[str]) -> list[str]:
    """The split of each of so many passages in a row."""
    together = max(1, min(_MOST_TOGETHER, count // (2 * _ROUND)))
    stretches = -(-count // together)
    if stretches <= len(missing):
        return ["train"] * count
    period = min(_ROUND, stretches)
    places = {period * (number + 1) // (len(missing) + 1): name for number, name in enumerate(missing)}
    return [places.get(number // together % period, "train") for number in range(count)]
