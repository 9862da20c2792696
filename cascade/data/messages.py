"""Chat messages -> tokens through the model's own template; only what the assistant says counts for the loss.

A conversation is a list of {"role": ..., "content": ...}.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import Any, NamedTuple

from cascade.data.blocks import IGNORE_INDEX
from cascade.data.endpoint_logprobs import ListedReader
from cascade.data.framing import Framing, framing_of
from cascade.data.packing import Tokenized
from cascade.data.sources import unfit_messages
from cascade.runtime.errors import UserError

Conversation = list[dict[str, Any]]


class Example(NamedTuple):
    """A conversation, or its beginning up to one of its answers, as tokens to train on."""

    ids: list[int]
    labels: list[int]
    """IGNORE_INDEX where a token does not count."""
    messages: Conversation
    """The conversation's messages that the tokens are of."""


Rendered = tuple[str, list[tuple[int, int]], Conversation]
"""(text, where the answers that count stand, the messages)"""


def conversation_tokens(
    messages: Conversation, tokenizer: Any, *, template: bool = True, framing: Framing | None = None
) -> tuple[list[int], list[int]]:
    """(ids, labels) of a conversation that is one example.

    Raises:
        UserError: as `conversation_examples`, or the template writes an earlier turn differently once a later one
            follows.
    """
    examples = conversation_examples(messages, tokenizer, template=template, framing=framing)
    if len(examples) > 1:
        raise UserError("the parent's chat template writes earlier turns differently once a later one follows")
    return examples[0].ids, examples[0].labels


def conversation_examples(
    messages: Conversation,
    tokenizer: Any,
    *,
    template: bool = True,
    turns: str = "all",
    framing: Framing | None = None,
) -> list[Example]:
    """The examples of one conversation; labels are IGNORE_INDEX outside the assistant's turns.

    A turn of the assistant is what the template adds to the conversation before it, opened for an answer; a token
    counts if it ends in one. A template that leaves earlier turns as they are gives one example. One that writes a turn
    differently once a later one follows (Qwen3's thinking block) gives an example per turn, as it was when it was the
    last. With `turns` 'last' only the last one counts. Without `template` the messages' texts follow one another,
    framed as `framing` (`framing_of` the tokenizer where not given) frames a text; a template writes the tokens that
    begin a text itself. What ends a message that is marked as `truncated` does not count: it would teach to stop there.

    Raises:
        UserError: the tokenizer has no chat template, or the template refuses the messages, or an answer does not
            continue what the template opens for one.
    """
    rendered = _templated(messages, tokenizer, turns) if template else [_joined(messages, turns)]
    return [_example(conversation, tokenizer, template, framing) for conversation in rendered]


def _example(rendered: Rendered, tokenizer: Any, template: bool, framing: Framing | None) -> Example:
    text, turns, messages = rendered
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = list(encoding["input_ids"])
    labels = [
        token if any(start < end <= stop for start, stop in turns) else IGNORE_INDEX
        for token, (_, end) in zip(ids, encoding["offset_mapping"], strict=True)
    ]
    if not template:
        framing = framing or framing_of(tokenizer, "data.template: none")
        last = messages[-1]
        counts = last["role"] == "assistant" and not last.get("truncated")
        ids = framing.around(ids)
        labels = [IGNORE_INDEX] * len(framing.prefix) + labels
        labels += [token if counts else IGNORE_INDEX for token in framing.suffix]
    return Example(ids, labels, messages)


def _joined(messages: Conversation, turns: str) -> Rendered:
    """The messages' texts one after another, without a template."""
    spans, length = [], 0
    for message in messages:
        end = length + len(message["content"])
        spans += [(length, end)] if message["role"] == "assistant" else []
        length = end
    text = "".join(message["content"] for message in messages)
    return text, spans[-1:] if turns == "last" else spans, messages


def _templated(messages: Conversation, tokenizer: Any, turns: str) -> list[Rendered]:
    """The conversation as the template writes it, or its beginnings, each with the answers that count."""
    if not tokenizer.chat_template:
        raise UserError(
            "the parent's tokenizer has no chat template; with data.template: none the messages' texts follow one "
            "another"
        )
    whole = _written(messages, tokenizer)
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    answers = answers[-1:] if turns == "last" else answers
    beginnings = [_beginning(messages[: number + 1], tokenizer) for number in answers]
    if turns == "last" and beginnings:
        return beginnings
    if all(whole.startswith(text) for text, _, _ in beginnings):
        return [(whole, [span for _, spans, _ in beginnings for span in spans], messages)]
    return beginnings


def _beginning(messages: Conversation, tokenizer: Any) -> Rendered:
    """A conversation up to an answer, which alone counts."""
    number, answer = len(messages), messages[-1]
    if number == 1:
        raise UserError("it starts with the assistant; there is nothing to answer")
    before = _written(messages[:-1], tokenizer, add_generation_prompt=True)
    text = _written(messages, tokenizer)
    if not text.startswith(before):
        raise UserError(
            f"the parent's chat template writes earlier turns differently once message {number} follows, or an answer "
            "differently from how it opens one; what counts cannot be told apart"
        )
    end = len(text)
    if answer.get("truncated"):  # templates may trim what was said
        content = answer["content"].strip()
        place = text.find(content, len(before))
        end = place + len(content) if place >= 0 else len(before)
    return text, [(len(before), end)], messages


def chat_documents(
    conversations: Iterable[Conversation],
    tokenizer: Any,
    name: str,
    *,
    template: bool = True,
    framing: Framing | None = None,
    turns: str = "all",
    listed: ListedReader | None = None,
    refused: Callable[[int, str], None] | None = None,
) -> Iterator[Tokenized]:
    """What `pack_blocks` takes, one document per example; with what `listed` reads in its last message.

    A conversation that cannot be written goes to `refused` (its number, why), where that is given.

    Raises:
        UserError: one is no list of messages, or cannot be written; it is shown.
    """
    require_chat(tokenizer, name, template=template)
    for number, messages in enumerate(conversations):
        reason = unfit_messages(messages)
        if reason:
            raise UserError(f"{name}: expected a list of {{role, content}} messages; found one that {reason}")
        try:
            examples = conversation_examples(messages, tokenizer, template=template, turns=turns, framing=framing)
        except UserError as error:
            if refused is None:
                raise UserError(f"{name}: {error}. The conversation: {str(messages)[:200]}") from error
            refused(number, str(error))
            continue
        for example in examples:
            logprobs = None if listed is None else listed.read(example.messages[-1], example.ids, example.labels)
            num_bytes = sum(len(message["content"].encode()) for message in example.messages)
            yield Tokenized(example.ids, example.labels, num_bytes, logprobs)


def require_chat(tokenizer: Any, name: str, *, template: bool = True) -> None:
    """Refuse a tokenizer that no conversation can be written with.

    Raises:
        UserError: it has no chat template, or does not say where its tokens stand.
    """
    if not tokenizer.is_fast:
        raise UserError(f"{name}: the parent's tokenizer does not say where its tokens stand; messages need that")
    if template and not tokenizer.chat_template:
        raise UserError(
            f"{name}: the parent's tokenizer has no chat template; with data.template: none the messages' texts follow "
            "one another"
        )
    if not template:
        framing_of(tokenizer, name)


def shown_tokens(example: Example, tokenizer: Any, most: int = 400) -> list[tuple[str, bool]]:
    """[(text, whether its tokens count)] of an example's first `most` tokens, those that stand together as one."""
    runs = groupby(range(len(example.ids))[:most], key=lambda place: example.labels[place] != IGNORE_INDEX)
    return [(str(tokenizer.decode([example.ids[place] for place in places])), counts) for counts, places in runs]


def _written(messages: Conversation, tokenizer: Any, **options: Any) -> str:
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except (TemplateError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise UserError(f"the parent's chat template refuses it: {error}") from error
