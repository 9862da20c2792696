"""On-policy batches: the student writes them and the teacher scores them, so it learns from its own mistakes.

GKD (https://arxiv.org/abs/2306.13649), with a replay buffer as in DistiLLM (https://arxiv.org/abs/2402.03898). Whether
a step is on-policy, and which batch it takes from the buffer, are functions of the seed and the step alone.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from cascade.data.blocks import IGNORE_INDEX, TokenBlocks
from cascade.data.examples import Examples
from cascade.distillation.options import Objective, OnPolicy
from cascade.models.architecture.positions import usable_context
from cascade.runtime import ranks
from cascade.runtime.errors import UserError


class Rollouts:
    """The batches that a student writes, and the buffer that holds them.

    Raises:
        UserError: there are several processes; their texts would end at different lengths, and all would wait.
    """

    def __init__(
        self,
        settings: OnPolicy,
        seed: int,
        buffer: dict[str, Tensor],
        ends: Sequence[int] | None = None,
        vocab_size: int | None = None,
    ) -> None:
        if ranks.world_size() > 1:
            raise UserError("on_policy: a student that is shared out to several processes cannot write; use one")
        self.settings, self.seed, self.buffer, self.ends = settings, seed, buffer, ends or ()
        self.vocab_size = vocab_size

    def due(self, step: int) -> bool:
        """Whether the student writes the step's batch."""
        return is_due(self.seed, step, self.settings.fraction)

    def batch(self, student: nn.Module, prompts: TokenBlocks, step: int) -> TokenBlocks:
        """A batch from the buffer, or one that the student writes after the prompts, which goes into the buffer."""
        steps = sorted(int(name.partition(".")[0]) for name in self.buffer if name.endswith(".input_ids"))
        size = self.settings.buffer_size
        if size and len(steps) >= size and self._draw("replay", step) < self.settings.replay_fraction:
            chosen = steps[int(self._draw("which", step) * len(steps))]
            ids, labels = self.buffer[f"{chosen}.input_ids"], self.buffer[f"{chosen}.labels"]
            return TokenBlocks(ids, labels, prompts.bytes_per_token)
        written = generate(student, prompts, self.settings, self.ends, vocab_size=self.vocab_size)
        if size:
            self.buffer |= {f"{step}.input_ids": written.input_ids, f"{step}.labels": written.labels}
            for old in [*steps, step][:-size]:
                del self.buffer[f"{old}.input_ids"], self.buffer[f"{old}.labels"]
        return written

    def objective(self, usual: Objective) -> Objective:
        """The objective on text that the student has written: the teacher alone, without cross-entropy."""
        return replace(usual, divergence=self.settings.divergence, cross_entropy_weight=0.0)

    def _draw(self, what: str, step: int) -> float:
        return _number(self.seed, what, step)


def is_due(seed: int, step: int, fraction: float) -> bool:
    """Whether the student writes a step's batch."""
    return _number(seed, "due", step) < fraction


def _number(seed: int, what: str, step: int) -> float:
    digest = hashlib.sha256(f"{seed}:{what}:{step}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def on_policy_batch(
    rollouts: Rollouts | None, student: nn.Module, text: TokenBlocks | Examples, objective: Objective, step: int
) -> tuple[TokenBlocks | Examples, Objective, bool]:
    """(batch, objective, whether the student has written the batch): the text unchanged in all other steps."""
    if rollouts is None or not rollouts.due(step) or isinstance(text, Examples):
        return text, objective, False
    return rollouts.batch(student, text, step), rollouts.objective(objective), True


def common_ids(student: Any, teacher: Any, objective: Objective) -> int:
    """Ids, from 0 on, that a student may write where a teacher reads it and both are compared."""
    heads = [model.get_output_embeddings() for model in (student, teacher)]
    embeddings = [model.get_input_embeddings() for model in (student, teacher)]
    return objective.common_rows(*(len(module.weight) for module in (*heads, *embeddings)))


def end_tokens(teacher: Any) -> list[int]:
    """Ids that end a text of the teacher, and so of its student, whose own settings a cut may have lost."""
    ends = getattr(teacher, "generation_config", None) and teacher.generation_config.eos_token_id
    ends = teacher.config.eos_token_id if ends is None and teacher is not None else ends
    return [] if ends is None else list(ends) if isinstance(ends, list | tuple) else [int(ends)]


@torch.no_grad()
def generate(
    student: Any,
    prompts: TokenBlocks,
    settings: OnPolicy,
    ends: Sequence[int] = (),
    *,
    vocab_size: int | None = None,
) -> TokenBlocks:
    """Prompts with the student's continuations, padded at the end; only the continuations' tokens count.

    Sampled from the student's own distribution (at the temperature), up to a token of `ends`; from `vocab_size` on, ids
    are not written, and the probabilities of the others add up to 1. A prompt that leaves no room for a continuation
    loses its start.
    """
    device = next(student.parameters()).device
    rows = len(student.get_output_embeddings().weight)
    unwritten = list(range(rows if vocab_size is None else vocab_size, rows))
    ends = [end for end in ends if end not in unwritten]
    context = usable_context(student.config)
    room = None if context is None else context - settings.max_new_tokens
    starts = [_prompt(prompts.rows(torch.tensor([row])), settings.prompt_tokens, room) for row in range(len(prompts))]
    pad = ends[0] if ends else 0
    longest = max(map(len, starts))
    padded = torch.full((len(starts), longest), pad)
    mask = torch.zeros(len(starts), longest, dtype=torch.int64)
    for row, start in enumerate(starts):
        padded[row, longest - len(start) :] = start
        mask[row, longest - len(start) :] = 1
    training = student.training
    student.eval()
    how = GenerationConfig(
        do_sample=True,
        temperature=settings.temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=settings.max_new_tokens,
        pad_token_id=pad,
        eos_token_id=list(ends) or None,
        suppress_tokens=unwritten or None,
    )
    previous, student.generation_config = student.generation_config, how  # or the model's would fill in defaults
    try:
        written = student.generate(input_ids=padded.to(device), attention_mask=mask.to(device))[:, longest:].cpu()
    finally:
        student.generation_config = previous
    student.train(training)
    ids = torch.full((len(starts), longest + written.shape[1]), pad)
    labels = torch.full_like(ids, IGNORE_INDEX)
    for row, start in enumerate(starts):
        text = written[row]
        stops = torch.isin(text, torch.tensor(ends)).nonzero() if ends else torch.empty(0)
        text = text[: int(stops[0]) + 1] if len(stops) else text
        end = len(start) + len(text)
        ids[row, :end] = torch.cat([start, text])
        labels[row, len(start) : end] = text
    return TokenBlocks(ids, labels, prompts.bytes_per_token)


def _prompt(block: TokenBlocks, length: int, room: int | None) -> Tensor:
    """A block's own prompt, up to its first label that counts, from its document's start; else its first tokens."""
    ids, labels = block.input_ids[0], block.labels[0]
    counted = (labels != IGNORE_INDEX).nonzero()[:, 0]
    first = int(counted[0]) if len(counted) else 0
    start = 0
    if first > 1 and block.position_ids is not None:
        start = int((block.position_ids[0, :first] == 0).nonzero()[-1, 0])
    prompt = ids[start:first] if first > 1 else ids[: min(length, len(ids))]
    return prompt if room is None else prompt[max(0, len(prompt) - room) :]
