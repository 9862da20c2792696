"""Which answers are good enough to learn from; each answer that is dropped is counted under a reason."""

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from cascade.models.architecture.positions import usable_context
from cascade.recipe.generate import Filters
from cascade.teacher.writing.answers import HOLDS_KEY, Answer, Request
from cascade.teacher.writing.endings import CALLS_TOOL, REFUSALS, is_complete, truncation
from cascade.teacher.writing.local import prompt_ids
from cascade.teacher.writing.prompts import Messages, Prompt
from cascade.teacher.writing.thoughts import has_thoughts

Keep = Callable[[Messages, str], bool]
"""A caller's own filter: (messages, answer) -> whether the answer is kept."""

_RUN_WORDS, _SHINGLE_WORDS, _NEAR = 4, 5, 0.75


def repetition(text: str) -> float:
    """Share of a text's four-word runs that occurred earlier in it, from 0 to 1; 0 for a text of fewer words."""
    words = text.split()
    runs = [tuple(words[start : start + _RUN_WORDS]) for start in range(len(words) - _RUN_WORDS + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


@torch.no_grad()
def perplexity(model: Any, tokenizer: Any, prompt: Prompt, answer: str, *, chat: bool) -> float:
    """Exp of the mean loss, in nats, of an answer's tokens after its prompt, as far as the context reaches."""
    before = prompt_ids(prompt, tokenizer, chat=chat)
    ids_of_answer = tokenizer(answer, add_special_tokens=False, verbose=False)["input_ids"]
    context = usable_context(model.config) or len(before) + len(ids_of_answer)
    ids = torch.tensor([before + ids_of_answer])[:, :context].to(next(model.parameters()).device)
    start = max(1, len(before))
    if ids.shape[1] <= start:
        return 1.0
    logits = model(input_ids=ids, use_cache=False).logits[0, start - 1 : -1].float()
    return math.exp(float(nn.functional.cross_entropy(logits, ids[0, start:])))


class Filter:
    """Judges answers one after another; an answer is a duplicate of one that was kept before it."""

    def __init__(
        self,
        settings: Filters,
        *,
        perplexity_of: Callable[[Prompt, str], float] | None = None,
        keep: Keep | None = None,
    ) -> None:
        self.settings, self.perplexity_of, self.keep = settings, perplexity_of, keep
        self.exact: set[tuple[str, str]] = set()
        self.runs: dict[int, list[int]] = {}
        self.sizes: list[int] = []

    def reason_against(self, request: Request, answer: Answer) -> str:
        """Why an answer is dropped; '' where it is kept. Cheap checks come first."""
        settings, text, ending = self.settings, answer.text, answer.finish_reason
        words = text.split()
        if ending in REFUSALS:
            return "refused"
        if ending == HOLDS_KEY:
            return "holds the key"
        if ending == CALLS_TOOL:
            return "calls a tool"
        if settings.thoughts == "drop" and has_thoughts(answer):
            return "thoughts"
        if not words:
            return "only thoughts" if answer.reasoned else "empty"
        if len(words) < settings.min_words:
            return "too short"
        if settings.max_words is not None and len(words) > settings.max_words:
            return "too long"
        if settings.truncated == "drop" and not is_complete(ending):
            return truncation(ending)
        if repetition(text) > settings.max_repetition:
            return "repetitive"
        plain = " ".join(words).lower()
        identity = (request.prompt.id, plain)
        if settings.duplicates != "keep" and identity in self.exact:
            return "duplicate"
        shingles = _shingles(plain.split()) if settings.duplicates == "near" else []
        if shingles and self._near(shingles):
            return "near duplicate"
        limit = settings.max_perplexity
        if limit is not None and self.perplexity_of is not None and self.perplexity_of(request.prompt, text) > limit:
            return "perplexity"
        if self.keep is not None and not self.keep(request.prompt.messages, text):
            return "own filter"
        self.exact.add(identity)
        for shingle in set(shingles):
            self.runs.setdefault(shingle, []).append(len(self.sizes))
        self.sizes.append(len(set(shingles)))
        return ""

    def _near(self, shingles: Sequence[int]) -> bool:
        """Whether an answer that was kept has three quarters of these five-word runs."""
        shared: dict[int, int] = {}
        for shingle in set(shingles):
            for number in self.runs.get(shingle, ()):
                shared[number] = shared.get(number, 0) + 1
        return max(shared.values(), default=0) >= _NEAR * len(set(shingles))


def _shingles(words: Sequence[str]) -> list[int]:
    last = max(1, len(words) - _SHINGLE_WORDS + 1)
    runs = (" ".join(words[start : start + _SHINGLE_WORDS]) for start in range(last))
    return [int.from_bytes(hashlib.blake2b(run.encode(), digest_size=8).digest(), "big") for run in runs]
