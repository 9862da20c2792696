"""A teacher that writes on this machine: batches of prompts, padded at the front, each sampled with its own seed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from cascade.data.framing import written_around
from cascade.models.architecture.positions import usable_context
from cascade.models.architecture.vocabulary import require_ids
from cascade.runtime.errors import UserError
from cascade.teacher.writing.answers import Answer, AnswerLog, Request
from cascade.teacher.writing.prompts import Prompt


@dataclass(frozen=True)
class Teacher:
    """A model that answers on this machine."""

    model: nn.Module
    tokenizer: Any
    digest: str
    """Digest of the weights and the tokenizer, on which answers depend."""


_AS_WRITTEN = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
"""Cleaning up takes the spaces before punctuation out of the answer."""


def prompt_ids(prompt: Prompt, tokenizer: Any, *, chat: bool) -> list[int]:
    """The ids of a prompt as the teacher reads it: after the tokens that begin a text, up to where the answer begins.

    Raises:
        UserError: the chat template refuses it.
    """
    if not chat:
        prefix, _ = written_around(tokenizer)
        ids = [*prefix, *tokenizer(prompt.text, add_special_tokens=False, verbose=False)["input_ids"]]
        start = tokenizer.bos_token_id
        return ids or ([start] if start is not None else [])
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(prompt.messages, tokenize=False, add_generation_prompt=True)
    except (TemplateError, ValueError) as error:
        raise UserError(
            f"generate: the teacher's chat template refuses {str(prompt.messages)[:200]}: {error}"
        ) from error
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def fitting_ids(
    prompts: Mapping[str, Prompt], tokenizer: Any, config: Any, *, chat: bool, max_new_tokens: int
) -> dict[str, list[int]]:
    """Each prompt's ids, by the prompts' names.

    Raises:
        UserError: a prompt leaves no room for an answer in the teacher's context, or has an id beyond its vocabulary.
    """
    ids = {name: prompt_ids(prompt, tokenizer, chat=chat) for name, prompt in prompts.items()}
    context, rows = usable_context(config), config.get_text_config().vocab_size
    for name, prompt in prompts.items():
        place = f"generate: {str(prompt.messages)[:100]}"
        require_ids(torch.tensor(ids[name], dtype=torch.int64), rows, tokenizer, place)
        if context and len(ids[name]) + max_new_tokens > context:
            raise UserError(
                f"generate: {str(prompt.messages)[:100]}: {len(ids[name])} tokens and {max_new_tokens} new ones do not "
                f"fit into the teacher's context of {context}; give a shorter prompt or max_new_tokens"
            )
    return ids


@torch.no_grad()
def write(
    teacher: Teacher,
    requests: Sequence[Request],
    log: AnswerLog,
    *,
    chat: bool,
    sampling: dict[str, Any],
    batch_size: int,
    on_answer: Callable[[int], None] | None = None,
) -> None:
    """Append to the log an answer to every request that it has none to.

    Batches are made of all requests, so that an answer does not depend on which answers were there before.

    Raises:
        UserError: a prompt leaves no room for an answer in the teacher's context.
    """
    model: Any = teacher.model
    tokenizer = teacher.tokenizer
    prompts = {request.prompt.id: request.prompt for request in requests}
    ids = fitting_ids(prompts, tokenizer, model.config, chat=chat, max_new_tokens=sampling["max_new_tokens"])
    ordered = sorted(requests, key=lambda request: len(ids[request.prompt.id]))  # similar lengths need little padding
    config = _config(model, tokenizer, sampling)
    for start in range(0, len(ordered), batch_size):
        batch = ordered[start : start + batch_size]
        if all(request.key in log.answers for request in batch):
            continue
        written = _batch(model, tokenizer, batch, [ids[request.prompt.id] for request in batch], config)
        log.add([answer for answer in written if answer.key not in log.answers])
        if on_answer is not None:
            on_answer(min(start + batch_size, len(ordered)))


def _config(model: Any, tokenizer: Any, sampling: dict[str, Any]) -> GenerationConfig:
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = tokenizer.eos_token_id if ends is None else ends
    ends = [] if ends is None else list(ends) if isinstance(ends, list | tuple) else [ends]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0] if ends else 0
    temperature = sampling["temperature"]
    drawn = {"temperature": temperature, "top_p": sampling["top_p"], "top_k": sampling["top_k"]} if temperature else {}
    return GenerationConfig(
        do_sample=temperature > 0,
        max_new_tokens=sampling["max_new_tokens"],
        pad_token_id=pad,
        eos_token_id=ends or None,
        **drawn,
    )


def _batch(
    model: Any, tokenizer: Any, batch: Sequence[Request], prompts: Sequence[list[int]], config: GenerationConfig
) -> list[Answer]:
    device = next(model.parameters()).device
    longest = max(1, *map(len, prompts))
    ids = torch.full((len(batch), longest), int(config.pad_token_id or 0))
    mask = torch.zeros(len(batch), longest, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt, dtype=torch.int64)
        mask[row, longest - len(prompt) :] = 1
    before, model.generation_config = model.generation_config, config  # else its own fills in what is not given
    try:
        with torch.random.fork_rng():
            torch.manual_seed(batch[0].seed)
            written = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device))[:, longest:].cpu()
    finally:
        model.generation_config = before
    ends = torch.tensor(config.eos_token_id or [], dtype=torch.int64)
    answers = []
    for request, prompt, row in zip(batch, prompts, written, strict=True):
        stops = torch.isin(row, ends).nonzero()
        stopped = len(stops) > 0
        answer_ids = row[: int(stops[0])] if stopped else row
        beginning = tokenizer.decode(prompt, **_AS_WRITTEN)
        text = tokenizer.decode([*prompt, *answer_ids.tolist()], **_AS_WRITTEN).removeprefix(beginning)
        reason = "stop" if stopped else "length"
        answers.append(Answer(request.key, text, reason, len(prompt), len(answer_ids) + stopped))
    return answers
