"""Prompts for a teacher: from files, templates, the beginnings of texts and the standard library."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from string import Formatter
from typing import Any

from cascade.data.bad_rows import BadRows
from cascade.data.rows import read_rows
from cascade.data.sources import TextData, read_documents, unfit_messages, unfit_text
from cascade.runtime.errors import UserError

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Prompt:
    """A conversation that waits for an answer. Where there is no chat template, its texts are joined."""

    messages: Messages

    @property
    def id(self) -> str:
        """Digest of the content alone."""
        return hashlib.sha256(json.dumps(self.messages).encode()).hexdigest()[:16]

    @property
    def text(self) -> str:
        """The contents of the messages, joined."""
        return "".join(message["content"] for message in self.messages)


def prompts_of(texts: Sequence[str | Messages], *, system: str = "", count: int | None = None) -> list[Prompt]:
    """Prompts without repetition, `count` of them spread evenly, each after the `system` message.

    Raises:
        UserError: there is no prompt.
    """
    before = [{"role": "system", "content": system}] if system else []
    conversations = [[{"role": "user", "content": text}] if isinstance(text, str) else text for text in texts]
    unique = {prompt.id: prompt for prompt in (Prompt([*before, *messages]) for messages in conversations)}
    prompts = list(unique.values())
    if not prompts:
        raise UserError("generate: there is not one prompt")
    if count is None or count >= len(prompts):
        return prompts
    return [prompts[number * len(prompts) // count] for number in range(count)]


def read_prompts(path: Path, bad: BadRows | None = None) -> Iterator[str | Messages]:
    """The `prompt` or `messages` of each row of a file: JSONL, JSON or Parquet, also compressed.

    Rows that cannot be used are counted in `bad`, where that is given.

    Raises:
        UserError: the file cannot be read, or, without `bad`, a row is no prompt; the message names it.
    """
    key = "generate.prompts"
    for place, values, _ in read_rows(str(path), ("prompt", "messages"), key=key):
        reason = _unfit(values)
        if bad is None and reason:
            raise UserError(f"{key}: {place}: {reason}")
        if bad is not None:
            bad.read(place)
        if reason and bad is not None:
            bad.skip(place, reason, key=key)
            continue
        yield values["prompt"] if _is_prompt(values) else _messages(values)
    if bad is not None:
        bad.require_few([str(path)], key=key)


def _is_prompt(values: dict[str, Any]) -> bool:
    prompt = values.get("prompt")
    return isinstance(prompt, str) and bool(prompt.strip()) and not unfit_text(prompt)


def _messages(values: dict[str, Any]) -> Messages:
    return [{"role": message["role"], "content": message["content"]} for message in values["messages"]]


def _unfit(values: dict[str, Any]) -> str:
    """Why a row is no prompt; '' where it is a prompt."""
    messages: Any = values.get("messages")
    if _is_prompt(values):
        return ""
    if unfit_messages(messages):
        expected = 'expected {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}'
        return f"{str(values)[:80] if values else 'neither field is there'}; {expected}"
    if messages[-1]["role"] == "assistant":
        return "its last message is the assistant's already; remove it"
    return ""


def filled(templates: Sequence[str], values: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Every template with every combination of the values that it names.

    Raises:
        UserError: a name has no values, or no template names the values.
    """
    used: set[str] = set()
    for template in templates:
        try:
            parsed = [field for field in Formatter().parse(template) if field[1] is not None]
            if any(form or conversion for _, _, form, conversion in parsed):
                raise ValueError("only {name} is filled in, without ':' and '!'")
            fields = {str(name) for _, name, _, _ in parsed}
        except ValueError as error:
            raise UserError(f"generate.templates: {template!r}: {error}; write {{{{ and }}}} for braces") from error
        names = sorted(fields)
        unknown = [name for name in names if not values.get(name)]
        if unknown:
            raise UserError(
                f"generate.templates: {template!r} names {{{unknown[0]}}}, which has no values; give "
                f"generate.values: {{{unknown[0] or 'name'}: [...]}}, or write {{{{ and }}}} for braces"
            )
        used |= set(names)
        for chosen in product(*(values[name] for name in names)):
            texts = dict(zip(names, chosen, strict=True))
            yield "".join(
                before + (texts[name] if name is not None else "") for before, name, _, _ in Formatter().parse(template)
            )
    if values.keys() - used:
        raise UserError(f"generate.values: no template names {{{min(values.keys() - used)}}}")


def beginnings(files: Sequence[str], text_field: str, num_words: int, bad: BadRows | None = None) -> list[str]:
    """The first words of each document, with their white space; the teacher writes what follows.

    Rows that cannot be used are counted in `bad`.
    """
    data = TextData("files", {"train": tuple(files)}, text_field=text_field, whole_documents=True)
    texts = read_documents(data, "train", bad=bad)
    matches = (re.match(rf"\s*(?:\S+\s+){{{num_words - 1}}}\S+", text) for text in texts)
    return [match.group() for match in matches if match]


def stdlib_functions() -> list[str]:
    """The first line of each top-level function of the standard library's training part; the teacher writes the body.

    The line break is left out, as tokenizers may join it to what follows.
    """
    texts = read_documents(TextData("stdlib", {}), "train")
    return [match.group() for text in texts for match in re.finditer(r"^def [^\n]*:$", text, re.MULTILINE)]
