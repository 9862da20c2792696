"""What an endpoint's top log-probabilities say of our tokens.

Its tokenizer is known by the bytes of its tokens alone: laid beside ours, they tell which ids of ours are meant.
"""

import json
import math
from collections.abc import Sequence
from typing import Any

from cascade.data.blocks import IGNORE_INDEX
from cascade.data.token_bytes import token_bytes
from cascade.data.token_targets import Listed
from cascade.runtime.errors import UserError

LEAST_ALIGNED = 0.9
"""Least share of an answer's tokens that begin and end where a token of the teacher does."""


class ListedReader:
    """Reads messages' `top_logprobs`, and counts how far the two tokenizers agree.

    Raises:
        UserError: what the tokenizer's tokens stand for cannot be told.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._bytes = token_bytes(tokenizer)
        self._id_of = {raw: number for number, raw in enumerate(self._bytes) if raw is not None}
        self.num_tokens = 0
        """Tokens, by our tokenizer, of the answers that came with log-probabilities."""
        self.num_aligned = 0
        """Those of `num_tokens` that begin and end where a token of the teacher does."""

    def read(self, message: dict[str, Any], ids: Sequence[int], labels: Sequence[int]) -> list[Listed]:
        """The ids and log-probabilities listed for each token of a conversation that ends with `message`.

        A token that counts and has no list (the end of a turn, or one that the teacher cuts otherwise) is taken for
        what it is: the teacher has written it.
        """
        listed_at: list[Listed] = [[(label, 0.0)] if label != IGNORE_INDEX else [] for label in labels]
        theirs = json.loads(message["top_logprobs"]) if message.get("top_logprobs") else []
        if not theirs:
            return listed_at
        places = _last_turn(labels)
        answer = str(message["content"]).strip().encode()  # templates and servers may trim it
        ours = _spans([self._bytes[ids[place]] or b"" for place in places], answer)
        spans = _spans([_raw(token) for token, _ in theirs], answer)
        tops = dict(zip(spans, (top for _, top in theirs), strict=False))
        inside = [start < len(answer) and end > 0 for start, end in ours]
        self.num_tokens += sum(inside) or len(places)
        for place, span, counts in zip(places, ours, inside, strict=False):
            listed: dict[int, float] = {}
            for token, log_p in tops.get(span, []):
                known = self._id_of.get(_raw(token))
                if known is not None:
                    listed[known] = max(log_p, listed.get(known, -math.inf))
            if listed:
                listed_at[place] = list(listed.items())
                self.num_aligned += counts
        return listed_at

    def require_agreement(self, name: str) -> None:
        """Refuse answers whose teacher cuts text into other tokens than the student's tokenizer does.

        Raises:
            UserError: there are no log-probabilities, or most stand between our tokens.
        """
        where = "with distill.teacher: text the student learns from what the teacher has written alone"
        if not self.num_tokens:
            raise UserError(f"{name}: no answer came with log-probabilities; {where}")
        share = self.num_aligned / self.num_tokens
        if share < LEAST_ALIGNED:
            raise UserError(
                f"{name}: only {share:.0%} of the answers' tokens are the teacher's, too: its tokenizer is another, "
                f"and its log-probabilities are of other tokens; {where}"
            )


def _spans(tokens: Sequence[bytes], answer: bytes) -> list[tuple[int, int]]:
    """(first, end) byte of each token, from the answer's first byte; [] if the tokens do not hold the answer."""
    place = -b"".join(tokens).find(answer)
    if place > 0:
        return []
    spans = []
    for token in tokens:
        spans.append((place, place + len(token)))
        place += len(token)
    return spans


def _last_turn(labels: Sequence[int]) -> list[int]:
    """Places of the last stretch of tokens that count for the loss."""
    places: list[int] = []
    for place in range(len(labels) - 1, -1, -1):
        if labels[place] != IGNORE_INDEX:
            places.append(place)
        elif places:
            break
    return places[::-1]


def _raw(token: str | list[int]) -> bytes:
    return bytes(token) if isinstance(token, list) else token.encode()
