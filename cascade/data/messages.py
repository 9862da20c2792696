"""Chat messages -> tokens through the model's own template; only what the assistant says counts for the loss.

A conversation is a list of {"role": ..., "content": ...}.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from cascade.data.blocks import IGNORE_INDEX
from cascade.errors import UserError

Conversation = list[dict[str, Any]]


def conversation_tokens(messages: Conversation, tokenizer: Any) -> tuple[list[int], list[int]]:
    """(ids, labels) of one conversation; labels are IGNORE_INDEX outside the assistant's turns.

    A turn of the assistant is what the template adds to the conversation before it, opened for an answer.

    Raises:
        UserError: the tokenizer has no chat template, or its text before a turn changes with the turn.
    """
    if not tokenizer.chat_template:
        raise UserError("data.messages_field: the parent's tokenizer has no chat template")
    whole = _tokens(messages, tokenizer)
    labels = [IGNORE_INDEX] * len(whole)
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _tokens(messages[:number], tokenizer, add_generation_prompt=True)
        after = _tokens(messages[: number + 1], tokenizer)
        # Some templates end the text with a line break that belongs to the next turn.
        if after != whole[: len(after)] or before != after[: len(before)]:
            raise UserError(
                "data.messages_field: the parent's chat template writes earlier turns differently once a later one "
                f"follows (message {number + 1}); such conversations cannot be taken apart into what counts"
            )
        labels[len(before) : len(after)] = after[len(before) :]
    return whole, labels


def chat_documents(
    conversations: Iterable[Conversation], tokenizer: Any, name: str
) -> Iterator[tuple[list[int], list[int] | None, int]]:
    """What `pack_tokens` takes, one document per conversation.

    Raises:
        UserError: a row is no list of messages.
    """
    for number, messages in enumerate(conversations):
        good = (
            isinstance(messages, list)
            and messages
            and all(
                isinstance(one, dict) and isinstance(one.get("role"), str) and isinstance(one.get("content"), str)
                for one in messages
            )
        )
        if not good:
            raise UserError(
                f"{name}: row {number + 1}: expected a list of {{role, content}} messages, found {str(messages)[:80]}"
            )
        ids, labels = conversation_tokens(messages, tokenizer)
        yield ids, labels, sum(len(one["content"].encode()) for one in messages)


def _tokens(messages: Conversation, tokenizer: Any, **options: Any) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
