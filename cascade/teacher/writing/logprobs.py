"""An endpoint's log-probabilities, from either of OpenAI's two shapes: [[token, [[token, logprob], ...]], ...].

A token is a text, or a list of bytes where its bytes are not a text.
"""

import math
from typing import Any


def top_logprobs(logprobs: list[Any] | None) -> list[list[Any]]:
    """For each token of an answer: the token, and the likeliest tokens at its place with it among them; [] for none."""
    if not logprobs or not isinstance(logprobs[0], dict):
        return []
    record = logprobs[0]
    if isinstance(record.get("content"), list):
        return [_chat_entry(entry) for entry in record["content"] if isinstance(entry, dict)]
    tokens, logprobs_of_tokens, tops = (record.get(name) or [] for name in ("tokens", "token_logprobs", "top_logprobs"))
    if not len(tokens) == len(logprobs_of_tokens) == len(tops):
        return []
    return [
        [token, _unique([(token, logprob), *(top or {}).items()])]
        for token, logprob, top in zip(tokens, logprobs_of_tokens, tops, strict=True)
    ]


def _chat_entry(entry: dict[str, Any]) -> list[Any]:
    top = [candidate for candidate in entry.get("top_logprobs") or [] if isinstance(candidate, dict)]
    pairs = [(_token(candidate), candidate.get("logprob")) for candidate in [entry, *top]]
    return [_token(entry), _unique(pairs)]


def _token(entry: dict[str, Any]) -> str | list[int]:
    """A token's text if that has all of its bytes, else the bytes: those of part of a character are not a text."""
    text, raw = str(entry.get("token", "")), entry.get("bytes")
    if isinstance(raw, list) and bytes(raw) != text.encode():
        return [int(byte) for byte in raw]
    return text


def _unique(pairs: list[tuple[Any, Any]]) -> list[list[Any]]:
    """[token, logprob] of each token's first occurrence, without what is not a finite number."""
    seen: dict[str, list[Any]] = {}
    for token, logprob in pairs:
        if isinstance(logprob, int | float) and math.isfinite(logprob):
            seen.setdefault(str(token), [token, round(float(logprob), 5)])
    return list(seen.values())
