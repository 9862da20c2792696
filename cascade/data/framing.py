"""The tokens that a tokenizer writes around a text, and where packed text repeats them.

A model reads text as it was trained only where the token is there with which its tokenizer begins a text (Llama,
Mistral, Gemma: <s>, <bos>; encoders: [CLS]). Without it a Gemma 3 of 270M parameters has half as much loss again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cascade.runtime.errors import UserError

_PROBES = ("a", "the", "Once upon a time", "1")


@dataclass(frozen=True)
class Framing:
    """What stands around documents, and at the start of blocks."""

    prefix: tuple[int, ...]
    """Ids that begin a document, as the tokenizer begins a text; empty where it writes none."""
    suffix: tuple[int, ...]
    """Ids that end a document; empty where the next document's prefix does."""
    begin_blocks: bool = False
    """Whether a block that starts inside a document begins with the prefix, too."""

    @property
    def prefix_counts(self) -> bool:
        """Whether the prefix is something to predict: where nothing else ends the document before it."""
        return not self.suffix

    def record(self) -> dict[str, str]:
        """With the recipe's words; begin_token is none where there is no prefix."""
        begin = "none" if not self.prefix else "blocks" if self.begin_blocks else "documents"
        return {"begin_token": begin, "end_token": "documents" if self.suffix else "none"}

    def around(self, ids: Sequence[int]) -> list[int]:
        """A document's ids with what begins and ends it."""
        return [*self.prefix, *ids, *self.suffix]


def framing_of(tokenizer: Any, name: str, *, begin_blocks: bool = False, end_token: bool | None = None) -> Framing:
    """How `tokenizer` frames a text: by default exactly the ids that it gives a text by itself.

    Where it writes nothing, the end token (of encoders the separator) stands behind each document, as nothing else
    would keep documents apart. With `end_token` True it stands there also if the tokenizer only begins texts; False: it
    stands nowhere, if the tokenizer begins texts. With `begin_blocks` the blocks that start inside a document begin
    with the prefix, too. Models differ in both: Gemma needs the prefix in every block, others were trained without it;
    most know the end token, and would forget it, some have never seen it (`choose_framing` asks the model).

    Raises:
        UserError: nothing would keep documents apart.
    """
    prefix, suffix = written_around(tokenizer)
    if prefix and end_token is False:
        suffix = ()
    elif not suffix and (end_token or not prefix):
        suffix = end_ids(tokenizer)
    if not prefix and not suffix:
        raise UserError(f"{name}: the tokenizer has no end-of-text token, so documents cannot be kept apart")
    return Framing(prefix, () if suffix == prefix else suffix, begin_blocks=begin_blocks and bool(prefix))


def require_end_token(tokenizer: Any) -> None:
    """Refuse data.end_token: none where the end token is all that keeps documents apart.

    Raises:
        UserError: the tokenizer begins no text with a token.
    """
    prefix, _ = written_around(tokenizer)
    if not prefix:
        raise UserError(
            "data.end_token: none: the parent's tokenizer begins no text with a token, so nothing else would keep "
            "documents apart; remove it"
        )


def end_ids(tokenizer: Any) -> tuple[int, ...]:
    """The end token, or what encoders end a text with; empty where there is neither."""
    end = tokenizer.eos_token_id
    if end is None:
        end = tokenizer.sep_token_id
    return () if end is None else (int(end),)


def written_around(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(ids before, ids behind) that the tokenizer adds to a text by itself.

    Raises:
        UserError: it changes the text's own ids when it adds them.
    """
    for probe in _PROBES:
        plain = list(tokenizer(probe, add_special_tokens=False, verbose=False)["input_ids"])
        whole = list(tokenizer(probe, verbose=False)["input_ids"])
        for start in range(len(whole) - len(plain) + 1):
            if plain and whole[start : start + len(plain)] == plain:
                return tuple(whole[:start]), tuple(whole[start + len(plain) :])
    raise UserError(
        "the tokenizer writes other ids for a text when it adds its special tokens; what begins a text cannot be told"
    )
