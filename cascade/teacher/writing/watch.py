"""Watches answers as they come, and stops where nothing can be learned from them, before more are paid for."""

from collections.abc import Iterable
from threading import Lock

from cascade.recipe.generate import Generate
from cascade.runtime.errors import RunError
from cascade.teacher.writing.answers import HOLDS_KEY, Answer
from cascade.teacher.writing.endings import CALLS_TOOL, REFUSALS
from cascade.teacher.writing.thoughts import has_thoughts, require_no_thoughts, without_thoughts

_MOST_AT_FIRST, _MOST_IN_A_ROW = 5, 20
"""Useless answers in a row that stop the run, before the first useful answer and after it, where prompts may be why."""

LESS_THOUGHT = (
    "let it think less: generate.endpoint.extra_body: {reasoning_effort: low}, or where the server renders a template "
    "of its own (vLLM, SGLang, llama.cpp) {chat_template_kwargs: {enable_thinking: false}}"
)


class UselessAnswers(RunError):
    """Nothing can be learned from the teacher's answers; they are kept."""


class Watch:
    """Counts useless answers since this start; several threads may hand in theirs."""

    def __init__(self, settings: Generate, before: Iterable[Answer]) -> None:
        """Start with the answers of earlier starts, `before`.

        Raises:
            UserError: they hold thoughts, and the recipe does not say what becomes of them.
        """
        self.settings, self.lock, self.useless = settings, Lock(), 0
        earlier = list(before)
        require_no_thoughts(earlier, settings.filters)
        self.most = _MOST_IN_A_ROW if any(self._teaches(answer) for answer in earlier) else _MOST_AT_FIRST

    def look(self, answer: Answer) -> None:
        """Take note of an answer.

        Raises:
            UserError: the answer holds thoughts, and the recipe does not say what becomes of them.
            UselessAnswers: nothing can be learned from it, nor from the answers before it.
        """
        require_no_thoughts([answer], self.settings.filters)
        if self.settings.endpoint is None:
            return
        with self.lock:
            if self._teaches(answer):
                self.useless, self.most = 0, _MOST_IN_A_ROW
                return
            self.useless += 1
            if self.useless >= self.most:
                raise UselessAnswers(f"generate: {self.useless} answers in a row {self._cause(answer)}")

    def _teaches(self, answer: Answer) -> bool:
        thoughts = self.settings.filters.thoughts
        if answer.finish_reason in {CALLS_TOOL, HOLDS_KEY, *REFUSALS}:
            return False
        if thoughts == "drop" and has_thoughts(answer):
            return False
        return bool((without_thoughts(answer) if thoughts == "strip" else answer).text.strip())

    def _cause(self, answer: Answer) -> str:
        """What is wrong with the last answer of the row, and what would mend it."""
        most, reason = self.settings.max_new_tokens, answer.finish_reason
        if has_thoughts(answer) and self.settings.filters.thoughts == "drop":
            return f"begin with thoughts, and generate.filters.thoughts is drop; give strip, or {LESS_THOUGHT}"
        thinking = answer.reasoned or has_thoughts(answer)
        if reason == "length":
            why = "they are the model's reasoning and no answer" if thinking else "they are empty"
            return (
                f"ended at generate.max_new_tokens: {most} (finish_reason: length), and {why}; raise it by what the "
                f"reasoning takes (some thousands of tokens), or {LESS_THOUGHT}"
            )
        if reason == CALLS_TOOL:
            return "call a tool; look at generate.endpoint.extra_body and the server's own settings"
        if reason == HOLDS_KEY or reason in REFUSALS:
            what = "repeat the endpoint's key" if reason == HOLDS_KEY else "are refusals"
            return f"{what}; look at generate.prompts and generate.system"
        if thinking:
            return f"are the model's reasoning and no answer (finish_reason: {reason}); {LESS_THOUGHT}"
        return (
            f"are empty (finish_reason: {reason}); look at generate.endpoint.api and model, and ask the server one of "
            "the prompts by hand"
        )
