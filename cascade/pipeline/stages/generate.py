"""The stage that generates text with a teacher, and the recipe that reads that text."""

import importlib.util
import json
from functools import partial
from pathlib import Path
from typing import Any

from cascade.evaluation.evaluate import default_device
from cascade.models.checkpoint.load import (
    ModelSource,
    fingerprint,
    load_model,
    load_tokenizer,
)
from cascade.pipeline.runner import StageRunner
from cascade.pipeline.stage_output import Made
from cascade.planning.generation import ANSWERS, check_generation, generation_inputs, key_settings, teacher_source
from cascade.planning.inputs import text_data
from cascade.planning.origins import origins_of
from cascade.recipe.places import public_model, served_model
from cascade.recipe.schema import Recipe
from cascade.runtime.errors import UserError
from cascade.runtime.files import file_sha256
from cascade.runtime.progress import OnStep
from cascade.store.commits import COST_FILE
from cascade.teacher.writing.filters import Keep
from cascade.teacher.writing.generate import (
    collect_prompts,
    save_dataset,
    select_answers,
    write_answers,
)
from cascade.teacher.writing.local import Teacher
from cascade.teacher.writing.prompts import Prompt


def run_generation(runner: StageRunner, recipe: Recipe, parent: ModelSource, filter_path: str = "") -> Made:
    """The stage's output: dataset.jsonl and provenance.json."""
    settings = recipe.generate
    if settings is None:
        raise ValueError("the recipe has no `generate` section")
    prompts = collect_prompts(settings, recipe.data.text_field, text_data(recipe.data).bad_row_counter())
    check_generation(recipe, settings, prompts, parent)
    key_settings, inputs = generation_inputs(recipe, settings, prompts, parent)
    return runner.make(
        "generate",
        "parent",
        settings=key_settings,
        inputs=inputs | {"filter": _filter_digest(filter_path)},
        write=partial(make_generated, runner, recipe, prompts, parent, filter_path),
    )


def make_generated(
    runner: StageRunner,
    recipe: Recipe,
    prompts: list[Prompt],
    parent: ModelSource,
    filter_path: str,
    folder: Path,
    on_step: OnStep,
) -> None:
    """Write dataset.jsonl and provenance.json; the run directory keeps every answer, also for later settings."""
    settings = recipe.generate
    if settings is None:
        raise ValueError("the recipe has no `generate` section")
    teacher = None if settings.endpoint else _teacher(teacher_source(settings, parent))
    judge = _teacher(parent) if settings.filters.max_perplexity else None
    keep = load_filter(filter_path) if filter_path else None
    written = write_answers(
        settings,
        prompts,
        runner.folder / ANSWERS,
        teacher=teacher,
        seed=recipe.seed,
        permissions=runner.permissions,
        on_step=on_step,
    )
    dataset = select_answers(settings, written, judge=judge, keep=keep)
    source = teacher_source(settings, parent)
    provenance: dict[str, Any] = {
        "teacher": f"{served_model(settings.endpoint.model)} at {settings.endpoint.url}"
        if settings.endpoint
        else public_model(source.reference),
        "teacher_sha256": None if settings.endpoint else fingerprint(source),
        "prompts": len(prompts),
        "settings": key_settings(settings, public=True) | {"seed": recipe.seed},
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
    """The function at FILE.py:NAME. This code runs because the user has named it on the command line.

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
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"--filter {path}: there is no function '{name}' in it")
    keep: Keep = function
    return keep


def _filter_digest(path: str) -> str:
    file = path.rpartition(":")[0]
    return f"{path}:{file_sha256(Path(file))}" if file and Path(file).is_file() else path


def _teacher(source: ModelSource) -> Teacher:
    model = load_model(source).to(default_device()).requires_grad_(False)
    return Teacher(model, load_tokenizer(source), fingerprint(source))
