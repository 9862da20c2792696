"""Every recipe that needs nothing but the package runs, at a small size; the others are at least plans."""

import json

import pytest
from conftest import ROOT, needs_shared

from cascade.evaluation.heldout import HELDOUT
from cascade.pipeline.run import run_recipe
from cascade.recipe.load import load_recipe

RECIPES = ROOT / "recipes"
BRIEF = [
    "distill.tokens=1024",
    "distill.learning_rate=1e-3",
    "evaluate.heldout_blocks=4",
    "baselines=[]",
    "distill.selection_blocks=2",
]
SMALL = {
    "from_scratch": [*BRIEF, "calibration.num_blocks=8", "prune.repair.method=none"],
    "from_text": [
        *BRIEF, "generate.num_prompts=200", "generate.answers=1", "generate.max_new_tokens=16",
        "data.block_size=16", "prune.repair.method=none",
        "members=[{name: half, target: {dims: {num_hidden_layers: 3}}, init: layers}]",
    ],
    "quantise": [*BRIEF, "finish.2.tokens=1024", "finish.2.learning_rate=1e-3", "finish.2.members=half",
                 "finish.0.members=half", "evaluate.tasks=[]", "prune.repair.method=none",
                 "members=[{name: half, target: {dims: {num_hidden_layers: 3}}, init: layers}]"],
    "distilbert": [*BRIEF, "parent.pretrain.tokens=2048", "parent.pretrain.config.num_hidden_layers=4",
                   "members=[{name: half, target: {dims: {num_hidden_layers: 2}}, init: layers}]",
                   "data.max_tokens=20_000"],
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.nightly) if name in ("distilbert", "quantise") else name for name in SMALL],
)
def test_a_recipe_runs_as_it_is_written_but_smaller(name, tmp_path):
    recipe = load_recipe(RECIPES / f"{name}.yaml", SMALL[name])
    folder = run_recipe(recipe, output=tmp_path / "run")
    rows = json.loads((folder / "family.json").read_text())["rows"]
    names = {row["name"] for row in rows if row["role"] != "quantised"}
    assert names == {"parent", *(member.name for member in recipe.members)}
    assert all(row["status"] == "done" for row in rows if row["role"] != "quantised")
    for member in recipe.members:
        assert (folder / "members" / member.name / "model.safetensors").is_file()


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_valid(path):
    assert load_recipe(path).name


@needs_shared
def test_the_real_reviews_of_a_recipe_are_read():
    from cascade.data.examples import read_examples
    from cascade.planning.inputs import classes_of, labelled_data

    recipe = load_recipe(RECIPES / "sst2.yaml")
    assert classes_of(recipe) == ("0", "1")
    counts = [len(read_examples(labelled_data(recipe.data, recipe.task), split)) for split in ("selection", HELDOUT)]
    assert counts == [872, 1821]
