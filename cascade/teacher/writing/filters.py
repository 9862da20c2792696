"""Which answers are good enough to learn from; every one that is not is counted under its reason."""

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
"""A caller's own filter: (messages, answer) -> whether to keep it."""

_RUN_WORDS, _SHINGLE_WORDS, _NEAR = 4, 5, 0.75


def repetition(text: str) -> float:
    """Share of the text's four-word runs that stood in it before; 0 for a text of fewer words."""
    words = text.split()
    runs = [tuple(words[start : start + _RUN_WORDS]) for start in range(len(words) - _RUN_WORDS + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


@torch.no_grad()
def perplexity(model: Any, tokenizer: Any, prompt: Prompt, answer: str, *, chat: bool) -> float:
    """Exp of the mean loss of the answer's tokens after its prompt; of as many as fit into the context."""
    before = prompt_ids(prompt, tokenizer, chat=chat)
    own = tokenizer(answer, add_special_tokens=False, verbose=False)["input_ids"]
    context = usable_context(model.config) or len(before) + len(own)
    ids = torch.tensor([before + own])[:, :context].to(next(model.parameters()).device)
    start = max(1, len(before))
    if ids.shape[1] <= start:
        return 1.0
    logits = model(input_ids=ids, use_cache=False).logits[0, start - 1 : -1].float()
    return math.exp(float(nn.functional.cross_entropy(logits, ids[0, start:])))


class Filter:
    """Judges answers one after another; duplicates are told from what it has kept so far."""

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
        """Why it is not kept; '' where it is. Cheap questions first."""
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
        asked = (request.prompt.id, plain)
        if settings.duplicates != "keep" and asked in self.exact:
            return "duplicate"
        shingles = _shingles(plain.split()) if settings.duplicates == "near" else []
        if shingles and self._near(shingles):
            return "near duplicate"
        limit = settings.max_perplexity
        if limit is not None and self.perplexity_of is not None and self.perplexity_of(request.prompt, text) > limit:
            return "perplexity"
        if self.keep is not None and not self.keep(request.prompt.messages, text):
            return "own filter"
        self.exact.add(asked)
        for shingle in set(shingles):
            self.runs.setdefault(shingle, []).append(len(self.sizes))
        self.sizes.append(len(set(shingles)))
        return ""

    def _near(self, shingles: Sequence[int]) -> bool:
        """Whether one kept answer has three quarters of these runs."""
        shared: dict[int, int] = {}
        for shingle in set(shingles):
            for number in self.runs.get(shingle, ()):
                shared[number] = shared.get(number, 0) + 1
        return max(shared.values(), default=0) >= _NEAR * len(set(shingles))


def _shingles(words: Sequence[str]) -> list[int]:
    last = max(1, len(words) - _SHINGLE_WORDS + 1)
    runs = (" ".join(words[start : start + _SHINGLE_WORDS]) for start in range(last))
    return [int.from_bytes(hashlib.blake2b(run.encode(), digest_size=8).digest(), "big") for run in runs]
