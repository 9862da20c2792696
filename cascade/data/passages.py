"""Few long texts as passages, so that a book can fill all splits: what stands together stays in one split.

A corpus is cut only where its documents are too few to give each split one.
"""

import re
from collections.abc import Sequence

PASSAGE_LETTERS = 2000
"""Of a passage, about; of short texts fewer, so that there are enough of them."""

_LEAST_LETTERS, _WANTED = 200, 100

_ROUND = 33
"""Of so many stretches one goes to each split that has no files of its own: 3 in 100, as of documents."""

_MOST_TOGETHER = 8
"""Passages of a stretch at most."""


def cut_documents(documents: Sequence[str], missing: Sequence[str]) -> dict[str, list[str]]:
    """The texts of 'train' and of each of the `missing` splits, cut from these documents.

    Each document is cut at paragraph borders into passages and these are dealt out in stretches of neighbours, the
    missing splits' spread over the document; what is left between them is training text. A text has one split alone: a
    passage that stands in several places goes, of all its splits, to the one that `missing` names last.
    """
    order = ["train", *missing]
    dealt = [_dealt(passages(text), missing) for text in documents]
    highest: dict[str, int] = {}
    for document in dealt:
        for split, passage in document:
            said = passage.strip()
            highest[said] = max(order.index(split), highest.get(said, 0))
    found: dict[str, list[str]] = {name: [] for name in order}
    for document in dealt:
        last = ""
        for split, passage in document:
            if not passage.strip() or highest[passage.strip()] != order.index(split):
                last = ""
            elif split == last:
                found[split][-1] += passage
            else:
                found[split].append(passage)
                last = split
    return found


def passages(text: str) -> list[str]:
    """A text cut at the borders of paragraphs, or of lines, sentences or words where those are too long.

    One after another they are the text.
    """
    size = max(_LEAST_LETTERS, min(PASSAGE_LETTERS, len(text) // _WANTED))
    pieces = _finer(text, size, (r"(?<=\n)\n+", r"\n+", r"(?<=[.!?…。])\s+", r"\s+"))
    found: list[str] = []
    for piece in pieces:
        if found and (len(found[-1]) + len(piece) <= size or not piece.strip()):
            found[-1] += piece
        else:
            found.append(piece)
    return found


def _finer(text: str, size: int, borders: Sequence[str]) -> list[str]:
    """Pieces that end at the first kind of border, the longer ones at the next."""
    ends = [match.end() for match in re.finditer(borders[0], text)] + [len(text)]
    pieces = [text[start:end] for start, end in zip([0, *ends], ends, strict=False) if end > start]
    if len(borders) == 1:
        return [piece[start : start + size] for piece in pieces for start in range(0, len(piece), size)]
    return [part for piece in pieces for part in ([piece] if len(piece) <= size else _finer(piece, size, borders[1:]))]


def _dealt(passages: Sequence[str], missing: Sequence[str]) -> list[tuple[str, str]]:
    """(split, passage) of each, in their order."""
    together = max(1, min(_MOST_TOGETHER, len(passages) // (2 * _ROUND)))
    stretches = -(-len(passages) // together)
    whole = min(_ROUND, stretches)
    places = {whole * (number + 1) // (len(missing) + 1): name for number, name in enumerate(missing)}
    if stretches <= len(missing):
        return [("train", passage) for passage in passages]
    return [(places.get(number // together % whole, "train"), passage) for number, passage in enumerate(passages)]
