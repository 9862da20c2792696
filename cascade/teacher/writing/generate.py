"""A dataset that a teacher writes: prompts -> answers -> filters -> conversations, each with where it comes from.

Sequence-level distillation (Kim and Rush, https://arxiv.org/abs/1606.07947): the student then learns from the text.
"""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cascade.data.bad_rows import BadRows
from cascade.data.framing import written_around
from cascade.data.sources import opening
from cascade.data.splits import SPLIT_SHARE, SPLITS, split_of_text
from cascade.recipe.generate import Generate
from cascade.runtime.errors import RunError, UserError
from cascade.runtime.paths import distinct_files
from cascade.runtime.permissions import NO_PERMISSIONS, Permissions
from cascade.teacher.writing.address import check_endpoint
from cascade.teacher.writing.answers import Answer, AnswerLog, Request, requests_of
from cascade.teacher.writing.endings import is_complete
from cascade.teacher.writing.endpoint import ask
from cascade.teacher.writing.filters import Filter, Keep, perplexity
from cascade.teacher.writing.local import Teacher, write
from cascade.teacher.writing.logprobs import top_logprobs
from cascade.teacher.writing.prompts import Prompt, beginnings, filled, prompts_of, read_prompts, stdlib_functions
from cascade.teacher.writing.spending import BudgetSpent, Spending
from cascade.teacher.writing.thoughts import without_thoughts
from cascade.teacher.writing.watch import LESS_THOUGHT, Watch

OnStep = Callable[[int, int], None]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answers:
    """What a teacher has written."""

    answers: list[tuple[Request, Answer]]
    refused: list[Answer]
    """Answers that an endpoint would not give; each says why."""
    chat: bool
    """Whether the messages belong into a chat template; else their texts follow one another."""
    money: float
    """What the endpoint has cost over all starts, in the currency of the prices."""


@dataclass(frozen=True)
class Dataset:
    """The conversations that passed every filter."""

    rows: list[dict[str, Any]]
    """Each with messages (the last is the teacher's), prompt_id and answer (its number)."""
    chat: bool
    """Whether the messages belong into a chat template; else their texts follow one another."""
    dropped: dict[str, int]
    """Reason -> answers dropped for it."""
    num_answers: int
    """Answers before filtering."""
    spent: dict[str, float]
    """prompt_tokens, answer_tokens and money (0 for a model here)."""


def collect_prompts(settings: Generate, text_field: str = "text", bad: BadRows | None = None) -> list[Prompt]:
    """All prompts that the settings name; rows that cannot be used are counted in `bad`, where that is given.

    Raises:
        UserError: a file or template cannot be used, or there is no prompt; without `bad`, also a row.
    """
    files = distinct_files(settings.prompts, "generate.prompts")
    texts: list[Any] = [prompt for file in files for prompt in read_prompts(Path(file), bad)]
    texts += filled(settings.templates, settings.values)
    if settings.text:
        texts += beginnings(settings.text, text_field, settings.text_words, bad)
    if settings.stdlib:
        texts += stdlib_functions()
    return prompts_of(texts, system=settings.system, count=settings.num_prompts)


def require_every_split(prompts: Sequence[Prompt]) -> None:
    """Refuse prompts that are too few to give training, calibration, selection and held-out text each one.

    Raises:
        UserError: a split would have no prompt.
    """
    shares = {name: SPLIT_SHARE for name in SPLITS if name != "train"}
    openings = [opening([*prompt.messages, {"role": "assistant"}]) for prompt in prompts]
    present = {split_of_text(text, shares=shares) for text in openings}
    missing = [name for name in SPLITS if name not in present]
    if missing:
        raise UserError(
            f"generate: {len(prompts)} prompts are too few: none of them falls to the {missing[0]} split, as 3 in 100 "
            "do; give some hundred"
        )


def planned(
    settings: Generate, num_prompts: int, missing: int, permissions: Permissions = NO_PERMISSIONS
) -> dict[str, Any]:
    """The teacher, the number of answers, and what the `missing` ones cost at most; nothing is sent.

    Raises:
        UserError: the endpoint's address, or the key that the missing answers need, cannot be used.
    """
    endpoint = settings.endpoint
    most = missing * settings.max_new_tokens
    if endpoint is not None:
        check_endpoint(endpoint, permissions, needs_key=missing > 0)
    return {
        "prompts": num_prompts,
        "answers": num_prompts * settings.answers,
        "missing": missing,
        "max_new_tokens": settings.max_new_tokens,
        "teacher": settings.teacher if endpoint is None else f"{endpoint.model} at {endpoint.url}",
        "money": 0.0 if endpoint is None else most * endpoint.budget.price_per_million_answer / 1e6,
    }


def is_chat(settings: Generate, tokenizer: Any | None) -> bool:
    """Whether prompts go through a chat template; without a tokenizer here, the server's.

    Raises:
        UserError: the settings ask for a chat, and there is no chat template.
    """
    if settings.endpoint is not None:
        chat = settings.endpoint.api == "chat"
        if settings.chat is not None and settings.chat != chat:
            raise UserError(
                f"generate.chat: {settings.chat} contradicts generate.endpoint.api: {settings.endpoint.api}"
            )
        return chat
    template = tokenizer is not None and bool(tokenizer.chat_template)
    if settings.chat and not template:
        raise UserError("generate.chat: the teacher's tokenizer has no chat template; leave `chat` and `system` out")
    if settings.system and not template:
        raise UserError(
            "generate.system: the teacher's tokenizer has no chat template, so there are no system messages"
        )
    return template if settings.chat is None else settings.chat


def answer_requests(
    settings: Generate, prompts: Sequence[Prompt], *, seed: int, tokenizer: Any | None = None, digest: str = ""
) -> list[Request]:
    """A request for every answer; `tokenizer` and `digest` are those of a teacher here.

    Raises:
        UserError: see `is_chat`.
    """
    endpoint, chat = settings.endpoint, is_chat(settings, tokenizer)
    sampling: dict[str, Any] = {"temperature": settings.temperature, "top_p": settings.top_p}
    source: dict[str, Any] = {"seed": seed, "chat": chat, "max_new_tokens": settings.max_new_tokens} | sampling
    if endpoint is not None:
        source |= endpoint.model_dump(include={"url", "model", "api", "extra_body"})
        source |= {"top_logprobs": endpoint.top_logprobs} if endpoint.top_logprobs else {}
    elif tokenizer is not None:
        source |= {"teacher": digest, "top_k": settings.top_k, "batch_size": settings.batch_size}
        prefix, _ = written_around(tokenizer)
        source |= {"prefix": prefix} if prefix and not chat else {}
    return requests_of(prompts, settings.answers, source)


def write_answers(
    settings: Generate,
    prompts: Sequence[Prompt],
    folder: Path,
    *,
    teacher: Teacher | None = None,
    seed: int = 0,
    permissions: Permissions = NO_PERMISSIONS,
    on_step: OnStep | None = None,
) -> Answers:
    """The teacher's answers to all prompts; a prompt that `folder` has an answer to already is not asked again.

    `teacher` writes where the settings have no endpoint.

    Raises:
        RunError: the endpoint fails or the budget is spent (what was answered is kept).
        UserError: see `is_chat`, `ask` and `write`.
    """
    endpoint = settings.endpoint
    if (teacher is None) == (endpoint is None):
        raise ValueError("text comes either from a teacher here or from an endpoint")
    tokenizer, digest = (teacher.tokenizer, teacher.digest) if teacher else (None, "")
    chat = is_chat(settings, tokenizer)
    sampling: dict[str, Any] = {"temperature": settings.temperature, "top_p": settings.top_p}
    requests = answer_requests(settings, prompts, seed=seed, tokenizer=tokenizer, digest=digest)
    log = AnswerLog(folder / "answers.jsonl")
    log.on_added = Watch(
        settings, [log.answers[request.key] for request in requests if request.key in log.answers]
    ).look

    def report(done: int) -> None:
        if on_step is not None:
            on_step(done, len(requests))

    money, refused = 0.0, list[Answer]()
    if endpoint is not None:
        spending = Spending(folder / "spending.json", endpoint)
        sampling |= {"max_tokens": settings.max_new_tokens}
        try:
            refused = ask(
                endpoint, requests, log, spending, sampling=sampling, permissions=permissions, on_answer=report
            )
        except BudgetSpent as error:
            answered = sum(request.key in log.answers for request in requests)
            if endpoint.budget.when_spent == "stop" or not answered:
                raise BudgetSpent(f"{error}; {answered:,} of {len(requests):,} answers are there and kept") from error
        money = spending.money
    elif teacher is not None:
        sampling |= {"top_k": settings.top_k, "max_new_tokens": settings.max_new_tokens}
        write(
            teacher,
            requests,
            log,
            chat=chat,
            sampling=sampling,
            batch_size=settings.batch_size,
            on_answer=report,
        )
    answers = [(request, log.answers[request.key]) for request in requests if request.key in log.answers]
    return Answers(answers, refused, chat, money)


def select_answers(
    settings: Generate, written: Answers, *, judge: Teacher | None = None, keep: Keep | None = None
) -> Dataset:
    """The conversations with answers that pass every filter.

    `judge` is the model of filters.max_perplexity; `keep` is a filter of the caller's own.

    Raises:
        RunError: no answer is left.
    """
    perplexity_of = None
    if judge is not None:
        chat = bool(judge.tokenizer.chat_template) and written.chat
        perplexity_of = lambda prompt, text: perplexity(judge.model, judge.tokenizer, prompt, text, chat=chat)  # noqa: E731
    judged = Filter(settings.filters, perplexity_of=perplexity_of, keep=keep)
    rows: list[dict[str, Any]] = []
    refused, answers = written.refused, written.answers
    dropped: dict[str, int] = {"refused": len(refused)} if refused else {}
    cut: dict[str, int] = {}
    for request, answer in answers:
        if settings.filters.thoughts == "strip":
            answer = without_thoughts(answer)
        reason = judged.reason_against(request, answer)
        if reason:
            dropped[reason] = dropped.get(reason, 0) + 1
            continue
        # The same keys in every message: readers that learn a file's columns from its start need them.
        before: list[dict[str, Any]] = [message | {"truncated": False} for message in request.prompt.messages]
        last: dict[str, Any] = {"role": "assistant", "content": answer.text}
        last["truncated"] = not is_complete(answer.finish_reason)
        if last["truncated"] and answer.finish_reason != "length":
            cut[answer.finish_reason] = cut.get(answer.finish_reason, 0) + 1
        if settings.endpoint is not None and settings.endpoint.top_logprobs:
            before = [message | {"top_logprobs": ""} for message in before]
            last["top_logprobs"] = json.dumps(top_logprobs(answer.logprobs))
        row = {"messages": [*before, last], "prompt_id": request.prompt.id, "answer": request.number}
        rows.append(row)
    if rows:
        _warn(dropped.get("only thoughts", 0), cut, len(answers))
    if not rows:
        reasons = ", ".join(f"{reason}: {count:,}" for reason, count in dropped.items())
        refusal = f" The endpoint: {refused[0].text}" if refused else ""
        raise RunError(
            f"generate: none of {len(answers):,} answers is left ({reasons}); look at generate.filters.{refusal}"
        )
    spent = {
        "prompt_tokens": sum(answer.prompt_tokens for _, answer in answers),
        "answer_tokens": sum(answer.answer_tokens for _, answer in answers),
        "money": written.money,
    }
    return Dataset(rows, written.chat, dropped, len(answers), spent)


def _warn(only_thoughts: int, cut: dict[str, int], answers: int) -> None:
    """Log what makes a dataset worse without being an error; `cut` counts early ends by finish_reason."""
    if only_thoughts:
        logger.warning(
            "generate: %s of %s answers are the model's reasoning alone; raise generate.max_new_tokens, or %s",
            f"{only_thoughts:,}", f"{answers:,}", LESS_THOUGHT,
        )  # fmt: skip
    if cut:
        logger.warning(
            "generate: answers that ended neither by themselves nor at max_new_tokens are learned from, but for their "
            "end (finish_reason %s); generate.filters.truncated: drop leaves them out",
            ", ".join(f"{name}: {count:,}" for name, count in cut.items()),
        )


def save_dataset(dataset: Dataset, folder: Path, provenance: dict[str, Any]) -> None:
    """Write dataset.jsonl, and provenance.json with the teacher, its settings, what was dropped and what it cost."""
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in dataset.rows)
    (folder / "dataset.jsonl").write_text("".join(lines), encoding="utf-8")
    record = provenance | {
        "chat": dataset.chat,
        "answers": dataset.num_answers,
        "rows": len(dataset.rows),
        "dropped": dataset.dropped,
        "spent": dataset.spent,
    }
    (folder / "provenance.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
