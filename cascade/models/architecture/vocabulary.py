"""Which token ids a tokenizer, a model and its student can all read.

An embedding often has more rows than its tokenizer has tokens (padding: Qwen2.5 has 151,936 or 152,064 rows under one
tokenizer of 151,665 tokens), and sometimes fewer (Gemma 3 1B: 262,144 rows, 262,145 tokens, the last of them a
placeholder for images). Rows without a token have no meaning, and tokens without a row cannot be read.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from cascade.runtime.errors import UserError

_ROLES = ("bos_token", "eos_token", "sep_token", "cls_token", "mask_token", "pad_token", "unk_token")
"""Tokens that tokenizers and tools write into a text by themselves."""


def tokens_beyond(tokenizer: Any, vocab_size: int) -> dict[int, str]:
    """Tokens whose ids are `vocab_size` or more, by id, in rising order."""
    beyond = {number: token for token, number in tokenizer.get_vocab().items() if number >= vocab_size}
    return dict(sorted(beyond.items()))


def require_embedded(tokenizer: Any, vocab_size: int, place: str) -> None:
    """Refuse a tokenizer that has more than added tokens beyond a model's `vocab_size` rows.

    Added tokens (an image placeholder) may be beyond them, as long as no text has one, which `require_ids` sees to.

    Raises:
        UserError: an ordinary token is beyond them, or one that is written without being in the text (end, padding).
    """
    beyond = tokens_beyond(tokenizer, vocab_size)
    if not beyond:
        return
    if not set(beyond.values()) <= set(tokenizer.get_added_vocab()):
        raise UserError(
            f"{place}: the tokenizer has {len(tokenizer)} tokens, the model's vocabulary {vocab_size}; "
            "they do not belong together. Copy the tokenizer files that the model was trained with into its folder."
        )
    for role in _ROLES:
        number = getattr(tokenizer, f"{role}_id", None)
        if number in beyond:
            raise UserError(
                f"{place}: the tokenizer's {role} '{beyond[number]}' has id {number}, and the model's vocabulary ends "
                f"before {vocab_size}: it cannot be read. Name another {role} in tokenizer_config.json, or give the "
                "model the row"
            )


def require_ids(ids: Tensor, vocab_size: int, tokenizer: Any, place: str) -> None:
    """Refuse text with a token that the models have no row for, or that they do not have in common.

    Raises:
        UserError: with the first such token.
    """
    if not ids.numel() or int(ids.max()) < vocab_size:
        return
    number = int(ids[ids >= vocab_size][0])
    raise UserError(_unreadable(place, tokenizer.convert_ids_to_tokens(number), number, vocab_size))


def require_texts(texts: Sequence[str], beyond: Mapping[int, str], vocab_size: int, place: str) -> None:
    """Refuse texts in which a token of `beyond` stands, before they are cut into tokens.

    Raises:
        UserError: with the first such token and the number of its text, from 1.
    """
    for position, text in enumerate(texts, start=1):
        for number, token in beyond.items():
            if token in text:
                raise UserError(_unreadable(f"{place}: document {position}", token, number, vocab_size))


def _unreadable(place: str, token: str, number: int, vocab_size: int) -> str:
    return (
        f"{place}: it has the token '{token}' (id {number}), and only ids below {vocab_size} can be read by all models "
        "that read it; take the token out of the text, or use a model with this token"
    )


def common_vocabulary(teacher: Any, student: Any, teacher_rows: int, student_rows: int, name: str) -> int:
    """The number of ids, from 0 on, over which a teacher and a student can be compared.

    Their tokenizers must give each of these ids the same token, or both none. Added tokens that only one of them has,
    beyond all tokens of the other, are left out, and so are rows that the smaller of both embeddings lacks. Where the
    tokenizers have the same tokens, rows that stand for none count as far as both models have them.

    Raises:
        UserError: the tokenizers differ, with the first ids that do.
    """
    teacher_tokens, student_tokens = (
        {number: token for token, number in tokenizer.get_vocab().items()} for tokenizer in (teacher, student)
    )
    last = min(max(teacher_tokens, default=-1), max(student_tokens, default=-1))
    added = [set(tokenizer.get_added_vocab()) for tokenizer in (teacher, student)]
    differing, extra = [], []
    for number in sorted(teacher_tokens.keys() | student_tokens.keys()):
        taught, learned = teacher_tokens.get(number), student_tokens.get(number)
        if taught == learned:
            continue
        if number > last and (taught in added[0] or learned in added[1]):
            extra.append(number)
        else:
            differing.append(number)
    if differing:
        examples = ", ".join(f"{n}: {teacher_tokens.get(n)!r} / {student_tokens.get(n)!r}" for n in differing[:3])
        raise UserError(
            f"{name}: its tokenizer is not the teacher's: {len(differing)} ids differ (teacher / student: {examples}). "
            "Logits can only be compared id by id over the same vocabulary."
        )
    common: int = min(teacher_rows, student_rows, *extra[:1])
    require_embedded(teacher, common, name)
    return common
