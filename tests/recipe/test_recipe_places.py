"""Every path in a recipe counts from the recipe's folder, wherever the command runs."""

from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel, PlainSerializer

from cascade.recipe.load import load_recipe
from cascade.recipe.places import PUBLIC, is_local, public_model, without_folders
from cascade.recipe.schema import Recipe
from cascade.recipe.section import OneOf
from cascade.runtime.errors import RecipeError

FILES = """\
name: r
parent: ./model
data: {source: files, train: [a.jsonl, sub/b.jsonl], calibration: c.jsonl, selection: d.jsonl, heldout: e.jsonl,
       production: f.jsonl, unlabelled: [rest, g.jsonl], train_examples: 5}
members: [{name: s, student: ../other}]
distill: {examples: 512, cache: {folder: kept}}
evaluate: {task_folders: tasks, tasks: [one]}
task: text_classification
"""

TEXT = """\
name: r
parent: org/model@0000000000000000000000000000000000000000
generate: {prompts: p.jsonl, text: [t.txt], templates: ["a/b {x}"], values: {x: [./c]}, teacher: ./writer}
data: {source: generated}
members: []
"""


def places_in(value):
    if isinstance(value, dict):
        return [one for part in value.values() for one in places_in(part)]
    if isinstance(value, list):
        return [one for part in value for one in places_in(part)]
    return [value] if isinstance(value, str) else []


def test_every_path_counts_from_the_recipes_folder_and_no_name_does(tmp_path, monkeypatch):
    folder = tmp_path / "recipes"
    (folder / "model").mkdir(parents=True)
    (folder / "r.yaml").write_text(FILES.replace("task: text_classification\n", "").replace(
        ", unlabelled: [rest, g.jsonl], train_examples: 5", "").replace("examples: 512", "tokens: 512"))  # fmt: skip
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("recipes/r.yaml")
    assert recipe.data.train == [str(folder / "a.jsonl"), str(folder / "sub" / "b.jsonl")]
    for split in ("calibration", "selection", "heldout", "production"):
        assert Path(getattr(recipe.data, split)[0]).parent == folder
    assert recipe.distill.cache.folder == str(folder / "kept")
    assert recipe.parent.model == str(folder / "model") and recipe.members[0].student == str(tmp_path / "other")
    assert recipe.evaluate.task_folders == [str(folder / "tasks")] and recipe.evaluate.tasks == ["one"]
    (folder / "t.yaml").write_text(TEXT)
    generate = load_recipe("recipes/t.yaml").generate
    assert generate.prompts == [str(folder / "p.jsonl")] and generate.text == [str(folder / "t.txt")]
    assert generate.teacher == str(folder / "writer")
    assert generate.templates == ["a/b {x}"] and generate.values == {"x": ["./c"]}  # texts


def test_examples_that_only_the_teacher_labels_may_be_the_rest_or_files(tmp_path):
    (tmp_path / "r.yaml").write_text(FILES.replace("f.jsonl", "[]").replace(", tasks: [one]", ""))
    (tmp_path / "rest").mkdir()
    assert load_recipe(tmp_path / "r.yaml").data.unlabelled == ["rest", str(tmp_path / "g.jsonl")]


def test_a_hub_datasets_split_is_no_path(tmp_path):
    text = "name: r\nparent: org/model@{c}\ndata: {{source: hub, dataset: a/b, revision: {c}, train: train}}\nmembers: []\n"
    (tmp_path / "r.yaml").write_text(text.format(c="a" * 40))
    (tmp_path / "train").mkdir()
    assert load_recipe(tmp_path / "r.yaml").data.train == ["train"]


def test_a_path_that_no_system_takes_is_told_with_its_place(tmp_path):
    (tmp_path / "r.yaml").write_text(FILES.replace("kept", '"a\\0b"').replace("task: text_classification\n", ""))
    with pytest.raises(RecipeError, match=r"r.yaml:6:\d+: distill.cache.folder: .*no path has a NUL in it"):
        load_recipe(tmp_path / "r.yaml")


NAMES = {
    "Recipe.name", "Recipe.acknowledged", "Parent.revision", "Member.name", "Member.seed", "Evaluate.tasks",
    "Data.text_field", "Data.label_field", "Data.image_field", "Data.messages_field", "Data.dataset", "Data.revision",
    "Data.dataset_config", "Generate.templates", "Generate.values", "Generate.system", "Endpoint.url",
    "Endpoint.key_env", "Finish.members", "TargetCache.exact_tokens",
}  # fmt: skip
"""Keys whose value is a text but no path; a new key has to be put here, or be given one of the types of paths."""


def sections(model, seen):
    seen.add(model)
    for field in model.model_fields.values():
        waiting = [field.annotation]
        while waiting:
            part = waiting.pop()
            waiting += get_args(part)
            if isinstance(part, type) and issubclass(part, BaseModel) and part not in seen:
                sections(part, seen)
    return seen


def plain_texts(annotation, metadata=()):
    """Whether a type holds texts that no type of paths goes with, and that are not names of a table."""
    if any(isinstance(part, PlainSerializer | OneOf) for part in metadata):
        return False
    if hasattr(annotation, "__metadata__"):
        return plain_texts(get_args(annotation)[0], annotation.__metadata__)
    return annotation is str or any(plain_texts(part) for part in get_args(annotation))


def test_every_key_that_holds_a_text_is_a_path_or_known_to_be_none():
    found = {
        f"{section.__name__}.{name}"
        for section in sections(Recipe, set())
        for name, field in section.model_fields.items()
        if plain_texts(field.annotation, field.metadata)
        and not str(field.annotation).startswith("dict[str, object]")
        and "dict[typing.Literal" not in str(field.annotation)
        and field.annotation != dict[str, float]
    }
    assert found == NAMES


def test_names_without_folders():
    assert [public_model(reference) for reference in ("builtin:x", "a/b", "a/b@c", "/x/y", "~/m", "../z", "d/e.gguf")] == [
        "builtin:x", "a/b", "a/b@c", "y", "m", "z", "e.gguf"]  # fmt: skip
    assert is_local("name") and not is_local("")
    here = str(Path(__file__).resolve())
    record = {"files": [here, "/no/such/place"], "text": "/", "number": 1}
    assert without_folders(record) == {"files": ["test_recipe_places.py", "/no/such/place"], "text": "/", "number": 1}
    assert PUBLIC == {"public": True}
