"""Chat messages -> tokens through the model's own template; only what the assistant says counts for the loss.

A conversation is a list of {"role": ..., "content": ...}.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from cascade.data.blocks import IGNORE_INDEX, Tokenized
from cascade.data.framing import Framing, framing_of
from cascade.data.listed import ListedReader
from cascade.errors import UserError

Conversation = list[dict[str, Any]]


def conversation_tokens(
    messages: Conversation, tokenizer: Any, *, template: bool = True, framing: Framing | None = None
) -> tuple[list[int], list[int]]:
    """(ids, labels) of one conversation; labels are IGNORE_INDEX outside the assistant's turns.

    A turn of the assistant is what the template adds to the conversation before it, opened for an answer; a token
    counts if it ends in one. Without `template` the messages' texts follow one another, framed as `framing`
    (`framing_of` the tokenizer where not given) frames a text; a template writes the tokens that begin a text itself.
    What ends a message that is marked as `truncated` does not count: it would teach to stop there.

    Raises:
        UserError: the tokenizer has no chat template, or the template refuses the messages, or writes what came before
            a turn differently once the turn follows.
    """
    whole, turns = _templated(messages, tokenizer) if template else _joined(messages)
    found = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = list(found["input_ids"])
    labels = [
        token if any(start < end <= stop for start, stop in turns) else IGNORE_INDEX
        for token, (_, end) in zip(ids, found["offset_mapping"], strict=True)
    ]
    if not template:
        framing = framing or framing_of(tokenizer, "data.template: none")
        last = messages[-1]
        counts = last["role"] == "assistant" and not last.get("truncated")
        ids = framing.around(ids)
        labels = [IGNORE_INDEX] * len(framing.prefix) + labels
        labels += [token if counts else IGNORE_INDEX for token in framing.suffix]
    return ids, labels


def _joined(messages: Conversation) -> tuple[str, list[tuple[int, int]]]:
    """(the texts one after another, where the assistant's stand)."""
    turns, length = [], 0
    for message in messages:
        end = length + len(message["content"])
        turns += [(length, end)] if message["role"] == "assistant" else []
        length = end
    return "".join(message["content"] for message in messages), turns


def _templated(messages: Conversation, tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """(the conversation as the template writes it, where the assistant's turns stand)."""
    if not tokenizer.chat_template:
        raise UserError(
            "the parent's tokenizer has no chat template; with data.template: none the messages' texts follow one "
            "another"
        )
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
        end = len(after)
        if message.get("truncated"):  # templates may trim what was said
            said = message["content"].strip()
            place = after.find(said, len(before))
            end = place + len(said) if place >= 0 else len(before)
        turns.append((len(before), end))
    return whole, turns


def chat_documents(
    conversations: Iterable[Conversation],
    tokenizer: Any,
    name: str,
    *,
    template: bool = True,
    framing: Framing | None = None,
    listed: ListedReader | None = None,
) -> Iterator[Tokenized]:
    """What `pack_tokens` takes, one document per conversation; with what `listed` reads in its last message.

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
            ids, labels = conversation_tokens(messages, tokenizer, template=template, framing=framing)
        except UserError as error:
            raise UserError(f"{name}: {error}. The conversation: {str(messages)[:200]}") from error
        theirs = None if listed is None else listed.read(messages[-1], ids, labels)
        yield Tokenized(ids, labels, sum(len(one["content"].encode()) for one in messages), theirs)


def _written(messages: Conversation, tokenizer: Any, **options: Any) -> str:
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except (TemplateError, ValueError) as error:
        raise UserError(f"the parent's chat template refuses it: {error}") from error
