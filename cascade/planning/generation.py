"""What a teacher will be asked for, and what of it is answered already: known before it is asked."""

import hashlib
import json
from pathlib import Path
from typing import Any

from cascade.data.endpoint_logprobs import ListedReader
from cascade.data.framing import written_around
from cascade.models.checkpoint.load import (
    ModelSource,
    check_weights,
    fingerprint,
    load_config,
    load_tokenizer,
    resolve_model,
)
from cascade.recipe.generate import HOW_ASKED, Generate
from cascade.recipe.places import PUBLIC
from cascade.recipe.schema import Recipe
from cascade.runtime.errors import UserError
from cascade.runtime.files import read_json
from cascade.store.commits import MANIFEST, is_committed
from cascade.teacher.writing.answers import AnswerLog
from cascade.teacher.writing.generate import (
    answer_requests,
    is_chat,
    require_every_split,
)
from cascade.teacher.writing.local import fitting_ids
from cascade.teacher.writing.prompts import Prompt

ANSWERS = "answers"
"""The folder of a run that keeps every answer as it came, whatever is asked for later."""


def missing_answers(
    recipe: Recipe, settings: Generate, prompts: list[Prompt], parent: ModelSource, run_folder: Path
) -> int:
    """How many answers a run in this folder would still ask for: none where its dataset is made already."""
    path = run_folder / ANSWERS / "answers.jsonl"
    if not path.is_file():
        return len(prompts) * settings.answers
    key_settings, inputs = generation_inputs(recipe, settings, prompts, parent)
    expected = json.loads(json.dumps({"settings": key_settings, "inputs": inputs}))
    for folder in run_folder.glob("stages/parent.generate-*"):
        if is_committed(folder):
            manifest = read_json(folder / MANIFEST)
            digests = {name: digest for name, digest in manifest.get("inputs", {}).items() if name != "filter"}
            if {"settings": manifest.get("settings"), "inputs": digests} == expected:
                return 0
    source = teacher_source(settings, parent)
    local = {} if settings.endpoint else {"tokenizer": load_tokenizer(source), "digest": fingerprint(source)}
    answered = AnswerLog(path).answers
    return sum(request.key not in answered for request in answer_requests(settings, prompts, seed=recipe.seed, **local))


def generation_inputs(
    recipe: Recipe, settings: Generate, prompts: list[Prompt], parent: ModelSource
) -> tuple[dict[str, Any], dict[str, str]]:
    """(settings, inputs) of the stage's key, without those of a user's own filter."""
    inputs = {
        "prompts": hashlib.sha256(json.dumps([prompt.messages for prompt in prompts]).encode()).hexdigest(),
        "teacher": "" if settings.endpoint else fingerprint(teacher_source(settings, parent)),
        "parent": fingerprint(parent) if settings.filters.max_perplexity else "",
    }
    return key_settings(settings) | {"seed": recipe.seed} | _prefix_settings(settings, parent), inputs


def check_generation(recipe: Recipe, settings: Generate, prompts: list[Prompt], parent: ModelSource) -> None:
    """Refuse prompts and settings that would make the written text useless.

    Raises:
        UserError: too few prompts for the splits, one that leaves no room for an answer, or a chat that the parent has
            no template for.
    """
    require_every_split(prompts)
    teacher = tokenizer = load_tokenizer(parent)
    if settings.teacher != "parent":
        teacher = load_tokenizer(resolve_model(settings.teacher))
    chat = is_chat(settings, teacher)
    if recipe.distill is not None and recipe.distill.teacher == "logprobs":
        ListedReader(tokenizer)  # that what its tokens stand for can be told
    if settings.endpoint is None:
        source = teacher_source(settings, parent)
        config = load_config(source)
        check_weights(source, config)
        named = {prompt.id: prompt for prompt in prompts}
        fitting_ids(named, teacher, config, chat=chat, max_new_tokens=settings.max_new_tokens)
    if chat and recipe.data.template == "model" and not tokenizer.chat_template:
        raise UserError(
            "generate: the teacher's answers are a chat, and the parent's tokenizer has no chat template for it; with "
            "data.template: none prompt and answer follow one another"
        )


def key_settings(settings: Generate, *, public: bool = False) -> dict[str, Any]:
    """The settings that change the dataset, without how an endpoint is reached and budgets that only stop."""
    context = PUBLIC if public else None
    record = settings.model_dump(exclude={"endpoint", "prompts", "text", "batch_size"}, context=context)
    if settings.filters.thoughts == "stop":  # what is made then is what was made before there was a choice
        record["filters"].pop("thoughts")
    endpoint = settings.endpoint
    if endpoint is None:
        return record | {"batch_size": settings.batch_size}
    request = endpoint.model_dump(exclude=set(HOW_ASKED), context=context)
    # A budget that only stops changes nothing; one that cuts the answers short does.
    limits = endpoint.budget.model_dump(include={"requests", "tokens", "money"})
    cut = {} if endpoint.budget.when_spent == "stop" else {"budget": limits}
    if endpoint.top_logprobs is None:
        request.pop("top_logprobs")
    return record | {"endpoint": request | cut}


def _prefix_settings(settings: Generate, parent: ModelSource) -> dict[str, Any]:
    """What a local teacher reads before each prompt, for the key; nothing where that is nothing, or a template's."""
    if settings.endpoint is not None:
        return {}
    tokenizer = load_tokenizer(teacher_source(settings, parent))
    prefix, _ = written_around(tokenizer)
    return {"prefix": prefix} if prefix and not is_chat(settings, tokenizer) else {}


def teacher_source(settings: Generate, parent: ModelSource) -> ModelSource:
    """The model that writes the text here: the parent, or another one by reference."""
    return parent if settings.teacher == "parent" else resolve_model(settings.teacher)
