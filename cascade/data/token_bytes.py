"""What bytes a tokenizer's ids stand for, so that tokens that others name can be found among ours."""

import json
from typing import Any

from cascade.runtime.errors import UserError

_PIECES = {"ByteFallback", "Metaspace", "Replace"}
"""Decoders of tokenizers that write a space as '▁'."""


def token_bytes(tokenizer: Any) -> list[bytes | None]:
    """The bytes that each id adds to a text, by id; a special token's own name; None where no token has the id.

    Byte-level tokenizers (GPT-2's) and those that write a space as '▁' (SentencePiece's) are understood.

    Raises:
        UserError: it is of another kind, such as WordPiece, whose tokens do not say where spaces stand.
    """
    if not tokenizer.is_fast:
        raise UserError(
            "the tokenizer's own bytes are needed, and only tokenizers of the `tokenizers` package show them"
        )
    kinds = _kinds(json.loads(tokenizer.backend_tokenizer.to_str()).get("decoder"))
    special = {**tokenizer.get_added_vocab()}
    by_id: list[bytes | None] = [None] * (max(tokenizer.get_vocab().values(), default=-1) + 1)
    for token, number in tokenizer.get_vocab().items():
        if token in special:
            by_id[number] = (token.replace("▁", " ") if kinds & _PIECES else token).encode()
        elif "ByteLevel" in kinds:
            by_id[number] = _byte_level(token)
        elif kinds & _PIECES:
            by_id[number] = _pieces(token)
        else:
            raise UserError(
                f"what text the tokens of a tokenizer with decoder {', '.join(sorted(kinds)) or 'none'} stand for "
                "cannot be told; of byte-level and SentencePiece tokenizers it can"
            )
    return by_id


def _kinds(decoder: Any) -> set[str]:
    if not isinstance(decoder, dict):
        return set()
    inner = decoder.get("decoders") or []
    return {str(decoder.get("type"))}.union(*(_kinds(part) for part in inner))


def _pieces(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()


def _byte_level(token: str) -> bytes:
    return bytes(_BYTES[letter] for letter in token) if all(letter in _BYTES for letter in token) else token.encode()


def _letters() -> dict[str, int]:
    """GPT-2's printable letter of each byte: itself, or the next beyond 255 where it cannot be seen."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    unseen = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + place): byte for place, byte in enumerate(unseen)}


_BYTES = _letters()
