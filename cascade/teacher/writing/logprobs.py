"""An endpoint's log-probabilities, in either of OpenAI's two shapes -> one: [[token, [[token, logprob], ...]], ...].

A token is a text, or a list of bytes where these are no text of their own.
"""

import math
from typing import Any


def top_logprobs(logprobs: list[Any] | None) -> list[list[Any]]:
    """Of each token of an answer: itself, and the likeliest at its place with itself among them; [] for none."""
    if not logprobs or not isinstance(logprobs[0], dict):
        return []
    found = logprobs[0]
    if isinstance(found.get("content"), list):
        return [_chat(one) for one in found["content"] if isinstance(one, dict)]
    tokens, own, top = (found.get(name) or [] for name in ("tokens", "token_logprobs", "top_logprobs"))
    if not len(tokens) == len(own) == len(top):
        return []
    return [
        [token, _listed([(token, value), *(others or {}).items()])]
        for token, value, others in zip(tokens, own, top, strict=True)
    ]


def _chat(one: dict[str, Any]) -> list[Any]:
    others = [each for each in one.get("top_logprobs") or [] if isinstance(each, dict)]
    return [_token(one), _listed([(_token(each), each.get("logprob")) for each in [one, *others]])]


def _token(one: dict[str, Any]) -> str | list[int]:
    """The text if it says all that the bytes do; a character's part does not."""
    text, raw = str(one.get("token", "")), one.get("bytes")
    if isinstance(raw, list) and bytes(raw) != text.encode():
        return [int(byte) for byte in raw]
    return text


def _listed(pairs: list[tuple[Any, Any]]) -> list[list[Any]]:
    """Each token once, the first time it stands there; without numbers that are none."""
    seen: dict[str, list[Any]] = {}
    for token, value in pairs:
        if isinstance(value, int | float) and math.isfinite(value):
            seen.setdefault(str(token), [token, round(float(value), 5)])
    return list(seen.values())
