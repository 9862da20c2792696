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

    A turn of the assistant is what the template adds to the conversation before it, opened for an answer; a token
    counts if it ends in one.

    Raises:
        UserError: the tokenizer has no chat template, or the template refuses the messages, or writes what came before
            a turn differently once the turn follows.
    """
    if not tokenizer.chat_template:
        raise UserError("the parent's tokenizer has no chat template")
    whole = _written(messages, tokenizer)
    turns = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if number == 0:
            raise UserError("it starts with the assistant; there is nothing to answer")
        before = _written(messages[:number], tokenizer, add_generation_prompt=True)
        after = _written(messages[: number + 1], tokenizer)
        if not whole.startswith(after) or not after.startswith(before):
            raise UserError(
                "the parent's chat template writes earlier turns differently once a later one follows (message "
                f"{number + 1}); what counts cannot be told apart"
            )
        turns.append((len(before), len(after)))
    found = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    labels = [
        token if any(start < end <= stop for start, stop in turns) else IGNORE_INDEX
        for token, (_, end) in zip(found["input_ids"], found["offset_mapping"], strict=True)
    ]
    return list(found["input_ids"]), labels


def chat_documents(
    conversations: Iterable[Conversation], tokenizer: Any, name: str
) -> Iterator[tuple[list[int], list[int] | None, int]]:
    """What `pack_tokens` takes, one document per conversation.

    Raises:
        UserError: one is no list of messages, or cannot be written; it is shown.
    """
    if not tokenizer.is_fast:
        raise UserError(f"{name}: the parent's tokenizer does not say where its tokens stand; messages need that")
    for messages in conversations:
        good = (
            isinstance(messages, list)
            and messages
            and all(
                isinstance(one, dict) and isinstance(one.get("role"), str) and isinstance(one.get("content"), str)
                for one in messages
            )
        )
        if not good:
            raise UserError(f"{name}: expected a list of {{role, content}} messages, found {str(messages)[:200]}")
        try:
            ids, labels = conversation_tokens(messages, tokenizer)
        except UserError as error:
            raise UserError(f"{name}: {error}. The conversation: {str(messages)[:200]}") from error
        yield ids, labels, sum(len(one["content"].encode()) for one in messages)


def _written(messages: Conversation, tokenizer: Any, **options: Any) -> str:
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except (TemplateError, ValueError) as error:
        raise UserError(f"the parent's chat template refuses it: {error}") from error
