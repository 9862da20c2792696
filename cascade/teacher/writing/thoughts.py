"""Thoughts that a reasoning model begins its answers with: where they end, and whether students learn them."""

import re
from collections.abc import Iterable
from dataclasses import replace

from cascade.recipe.generate import Filters
from cascade.runtime.errors import UserError
from cascade.teacher.writing.answers import Answer

_MARKED = re.compile(
    # The opening mark may belong to the prompt (DeepSeek R1, Qwen3 Thinking): then only the closing one is written.
    r"(?s)\s*(?:<(?P<tag>(?:seed:)?think(?:ing)?|thoughts?|reasoning)>.*?(?:</(?P=tag)>|\Z)"
    r"|\[THINK\].*?(?:\[/THINK\]|\Z)"
    r"|(?:(?!<(?:seed:)?think(?:ing)?>|\[THINK\]).)*?(?:</(?:seed:)?think(?:ing)?>|\[/THINK\])"
    r"|(?:<\|channel\|>)?analysis(?=\S).*?(?:<\|start\|>)?assistant(?:<\|channel\|>)?final(?:<\|message\|>)?"
    r"|<\|channel\|>analysis.*\Z)\s*"
)

_MAX_LETTERS = 60
"""Letters of a text that a message shows."""


def split_thoughts(text: str) -> tuple[str, str]:
    """(the thoughts that a text begins with, the answer after them); thoughts that never end take all of the text."""
    end = 0
    while end < len(text):
        match = _MARKED.match(text, end)
        if match is None or match.end() == end:
            break
        end = match.end()
    return text[:end], text[end:]


def has_thoughts(answer: Answer) -> bool:
    """Whether the answer's text begins with thoughts."""
    return bool(split_thoughts(answer.text)[0])


def without_thoughts(answer: Answer) -> Answer:
    """The answer without its thoughts; an answer that is only thoughts becomes empty."""
    thoughts, rest = split_thoughts(answer.text)
    return replace(answer, text=rest, reasoned=True) if thoughts else answer


def require_no_thoughts(answers: Iterable[Answer], filters: Filters) -> None:
    """Refuse answers with thoughts where the recipe does not say whether students learn them.

    Raises:
        UserError: an answer begins with thoughts, and `generate.filters.thoughts` is 'stop'.
    """
    if filters.thoughts != "stop":
        return
    text = next((answer.text for answer in answers if has_thoughts(answer)), None)
    if text is not None:
        begins = " ".join(text.split())[:_MAX_LETTERS]
        raise UserError(
            f"generate: the teacher writes its thoughts into its answers ({begins!r} …); say with "
            "generate.filters.thoughts whether the students learn them: keep (all of it), strip (the answer alone) or "
            "drop (no such answer); the answers that are there are kept and not asked for again. Where the server can "
            "turn the thoughts off, generate.endpoint.extra_body: {chat_template_kwargs: {enable_thinking: false}} or "
            "{reasoning_effort: none} saves their cost"
        )
