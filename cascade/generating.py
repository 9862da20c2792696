"""The stage that writes the text of data.source: generated, and the recipe that reads it."""

import hashlib
import importlib.util
import json
from functools import partial
from pathlib import Path
from typing import Any

from cascade.data.framing import written_around
from cascade.data.listed import ListedReader
from cascade.errors import UserError
from cascade.evaluation.evaluate import default_device
from cascade.inputs import text_data
from cascade.models.checkpoint import (
    ModelSource,
    check_weights,
    fingerprint,
    load_config,
    load_model,
    load_tokenizer,
    resolve_model,
)
from cascade.origins import origins_of
from cascade.progress import OnStep
from cascade.recipe.generate import HOW_ASKED, Generate
from cascade.recipe.places import PUBLIC, served_model, shown_model
from cascade.recipe.schema import Recipe
from cascade.runner import StageRunner
from cascade.stage_output import Made, read_json
from cascade.store import COST_FILE, MANIFEST, file_sha256, is_committed
from cascade.teacher.answers import AnswerLog
from cascade.teacher.filters import Keep
from cascade.teacher.generate import (
    Teacher,
    collect_prompts,
    generate,
    is_chat,
    require_every_split,
    save_dataset,
    wanted_answers,
)
from cascade.teacher.local import fitting_ids
from cascade.teacher.prompts import Prompt

ANSWERS = "answers"
"""The folder of a run that keeps every answer as it came, whatever is asked for later."""


def run_generation(runner: StageRunner, recipe: Recipe, parent: ModelSource, filter_path: str = "") -> Made:
    """The generated text: dataset.jsonl, provenance.json."""
    settings = recipe.generate
    if settings is None:
        raise ValueError("the recipe has no `generate` section")
    prompts = collect_prompts(settings, recipe.data.text_field, text_data(recipe.data).bad_row_counter())
    check_generation(recipe, settings, prompts, parent)
    key_settings, inputs = _stage(recipe, settings, prompts, parent)
    return runner.make(
        "generate",
        "parent",
        settings=key_settings,
        inputs=inputs | {"filter": _filter_digest(filter_path)},
        write=partial(make_generated, recipe, prompts, parent, runner.folder / ANSWERS, filter_path),
    )


def missing_answers(
    recipe: Recipe, settings: Generate, prompts: list[Prompt], parent: ModelSource, run_folder: Path
) -> int:
    """How many answers a run in this folder would still ask for: none where its dataset is made already."""
    path = run_folder / ANSWERS / "answers.jsonl"
    if not path.is_file():
        return len(prompts) * settings.answers
    key_settings, inputs = _stage(recipe, settings, prompts, parent)
    expected = json.loads(json.dumps({"settings": key_settings, "inputs": inputs}))
    for folder in run_folder.glob("stages/parent.generate-*"):
        if is_committed(folder):
            manifest = read_json(folder / MANIFEST)
            digests = {name: value for name, value in manifest.get("inputs", {}).items() if name != "filter"}
            if {"settings": manifest.get("settings"), "inputs": digests} == expected:
                return 0
    source = _source(settings, parent)
    local = {} if settings.endpoint else {"tokenizer": load_tokenizer(source), "digest": fingerprint(source)}
    answered = AnswerLog(path).answers
    return sum(one.key not in answered for one in wanted_answers(settings, prompts, seed=recipe.seed, **local))


def _stage(
    recipe: Recipe, settings: Generate, prompts: list[Prompt], parent: ModelSource
) -> tuple[dict[str, Any], dict[str, str]]:
    """What the stage's key is made of but for a filter of the user's own: (settings, inputs)."""
    inputs = {
        "prompts": hashlib.sha256(json.dumps([one.messages for one in prompts]).encode()).hexdigest(),
        "teacher": "" if settings.endpoint else fingerprint(_source(settings, parent)),
        "parent": fingerprint(parent) if settings.filters.max_perplexity else "",
    }
    return _key_settings(settings) | {"seed": recipe.seed} | _prefix_settings(settings, parent), inputs


def check_generation(recipe: Recipe, settings: Generate, prompts: list[Prompt], parent: ModelSource) -> None:
    """What would make the text useless once it is there.

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
        source = _source(settings, parent)
        config = load_config(source)
        check_weights(source, config)
        named = {prompt.id: prompt for prompt in prompts}
        fitting_ids(named, teacher, config, chat=chat, max_new_tokens=settings.max_new_tokens)
    if chat and recipe.data.template == "model" and not tokenizer.chat_template:
        raise UserError(
            "generate: the teacher's answers are a chat, and the parent's tokenizer has no chat template for it; with "
            "data.template: none prompt and answer follow one another"
        )


def make_generated(
    recipe: Recipe,
    prompts: list[Prompt],
    parent: ModelSource,
    answers: Path,
    filter_path: str,
    folder: Path,
    on_step: OnStep,
) -> None:
    """The dataset and where it comes from; `answers` is the folder that keeps what was answered."""
    settings = recipe.generate
    if settings is None:
        raise ValueError("the recipe has no `generate` section")
    teacher = None if settings.endpoint else _teacher(_source(settings, parent))
    judge = _teacher(parent) if settings.filters.max_perplexity else None
    dataset = generate(
        settings,
        prompts,
        answers,
        teacher=teacher,
        judge=judge,
        seed=recipe.seed,
        keep=load_filter(filter_path) if filter_path else None,
        on_step=on_step,
    )
    source = _source(settings, parent)
    provenance: dict[str, Any] = {
        "teacher": f"{served_model(settings.endpoint.model)} at {settings.endpoint.url}"
        if settings.endpoint
        else shown_model(source.reference),
        "teacher_sha256": None if settings.endpoint else fingerprint(source),
        "prompts": len(prompts),
        "settings": _key_settings(settings, public=True) | {"seed": recipe.seed},
        "filter": Path(filter_path).name if filter_path else None,
        "origins": [origin.record() for origin in origins_of(recipe)],
    }
    save_dataset(dataset, folder, provenance)
    (folder / COST_FILE).write_text(json.dumps({"money": dataset.spent["money"]}), encoding="utf-8")


def reading(recipe: Recipe, generated: Made) -> Recipe:
    """The recipe with the generated conversations as its text."""
    chat = generated.json("provenance.json")["chat"]
    data = recipe.data.model_copy(
        update={
            "source": "files",
            "train": [str(generated.folder / "dataset.jsonl")],
            "messages_field": "messages",
            "template": recipe.data.template if chat else "none",
        }
    )
    return recipe.model_copy(update={"data": data})


def load_filter(path: str) -> Keep:
    """The function of FILE.py:NAME. It is code: it runs because the user named it on the command line.

    Raises:
        UserError: there is no such file or function.
    """
    file, _, name = path.rpartition(":")
    if not file or not Path(file).is_file():
        raise UserError(f"--filter {path}: expected FILE.py:FUNCTION; no such file '{file}'")
    spec = importlib.util.spec_from_file_location("cascade_filter", file)
    if spec is None or spec.loader is None:
        raise UserError(f"--filter {path}: '{file}' is no Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"--filter {path}: it cannot be imported: {error}") from error
    found = getattr(module, name, None)
    if not callable(found):
        raise UserError(f"--filter {path}: there is no function '{name}' in it")
    keep: Keep = found
    return keep


def _key_settings(settings: Generate, *, public: bool = False) -> dict[str, Any]:
    """All that changes the dataset: not how an endpoint is reached, nor a budget that only stops."""
    context = PUBLIC if public else None
    record = settings.model_dump(exclude={"endpoint", "prompts", "text", "batch_size"}, context=context)
    if settings.filters.thoughts == "stop":  # what is made then is what was made before there was a choice
        record["filters"].pop("thoughts")
    endpoint = settings.endpoint
    if endpoint is None:
        return record | {"batch_size": settings.batch_size}
    asked = endpoint.model_dump(exclude=set(HOW_ASKED), context=context)
    # A budget that only stops changes nothing; one that cuts the answers short does.
    limits = endpoint.budget.model_dump(include={"requests", "tokens", "money"})
    cut = {} if endpoint.budget.when_spent == "stop" else {"budget": limits}
    if endpoint.top_logprobs is None:
        asked.pop("top_logprobs")
    return record | {"endpoint": asked | cut}


def _prefix_settings(settings: Generate, parent: ModelSource) -> dict[str, Any]:
    """What a local teacher reads before each prompt, for the key; nothing where that is nothing, or a template's."""
    if settings.endpoint is not None:
        return {}
    tokenizer = load_tokenizer(_source(settings, parent))
    prefix, _ = written_around(tokenizer)
    return {"prefix": prefix} if prefix and not is_chat(settings, tokenizer) else {}


def _filter_digest(path: str) -> str:
    file = path.rpartition(":")[0]
    return f"{path}:{file_sha256(Path(file))}" if file and Path(file).is_file() else path


def _source(settings: Generate, parent: ModelSource) -> ModelSource:
    return parent if settings.teacher == "parent" else resolve_model(settings.teacher)


def _teacher(source: ModelSource) -> Teacher:
    model = load_model(source).to(default_device()).requires_grad_(False)
    return Teacher(model, load_tokenizer(source), fingerprint(source))
