"""What a student may start from: a cut, whole layers, nothing, another checkpoint."""

import json

import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file

from cascade.models.architecture.dims import dims_of
from cascade.pipeline.run import run_recipe
from cascade.planning.preview_text import hops_too_large
from cascade.planning.starts import even_layers, plan_layers, student_config
from cascade.pruning.cut import prune
from cascade.recipe.load import load_recipe
from cascade.runtime.errors import UserError

FOUR_STARTS = """\
name: starts
parent: {parent}
data: {{source: files, train: train.jsonl.gz, heldout: heldout.jsonl.gz, block_size: 32}}
members:
  - name: layers
    target: {{dims: {{num_hidden_layers: 1}}}}
    init: layers
  - name: random
    target: {{dims: {{num_hidden_layers: 1}}}}
    init: random
  - name: shape
    config: {{model_type: qwen3, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 1,
             num_attention_heads: 2, num_key_value_heads: 1, head_dim: 8, tie_word_embeddings: true}}
distill: {{tokens: 256, learning_rate: 3e-3, batch_size: 4, microbatch_size: 4, selection_blocks: 4}}
evaluate: {{heldout_blocks: 4}}
baselines: [cut]
"""


def test_evenly_spread_layers_are_those_of_distilbert():
    assert even_layers(12, 6) == [0, 2, 4, 7, 9, 11]
    assert even_layers(6, 1) == [0] and even_layers(5, 5) == [0, 1, 2, 3, 4]
    for num_layers in range(2, 40):
        for num_kept in range(2, num_layers + 1):
            layers = even_layers(num_layers, num_kept)
            assert len(set(layers)) == num_kept and (layers[0], layers[-1]) == (0, num_layers - 1)


def test_a_student_of_whole_layers_has_its_seeds_weights():
    model = make_model(num_hidden_layers=5)
    dims = dims_of(model.config)
    student = prune(model, plan_layers(model.config, dims.replace(num_hidden_layers=3), "half"))
    theirs = model.state_dict()
    for name, value in student.state_dict().items():
        origin = name
        for ours, layer in ((1, 2), (2, 4)):
            origin = origin.replace(f"layers.{ours}.", f"layers.{layer}.") if f"layers.{ours}." in name else origin
        assert torch.equal(value, theirs[origin]), name


def test_whole_layers_are_all_that_init_layers_takes():
    config = make_model().config
    dims = dims_of(config).replace(num_hidden_layers=2, intermediate_size=32)
    with pytest.raises(UserError, match=r"half: init 'layers' copies whole layers, .* changes intermediate_size"):
        plan_layers(config, dims, "half")


def test_a_shape_of_its_own_reads_the_teachers_tokens():
    teacher = make_model(max_position_embeddings=64).config
    config = student_config({"model_type": "qwen3", "hidden_size": 16}, teacher, "own")
    assert (config.vocab_size, config.max_position_embeddings) == (teacher.vocab_size, 64)
    with pytest.raises(UserError, match=r"members: own: config: `model_type` is missing"):
        student_config({"hidden_size": 16}, teacher, "own")


def test_a_family_of_every_start_is_made_and_recovered(recipe_folder, tiny_parent, tmp_path):
    (recipe_folder / "starts.yaml").write_text(FOUR_STARTS.format(parent=tiny_parent))
    folder = run_recipe(load_recipe(recipe_folder / "starts.yaml"), output=tmp_path / "run")
    rows = {row["name"]: row for row in json.loads((folder / "family.json").read_text())["rows"]}
    assert set(rows) == {"parent", "layers", "layers-cut", "random", "shape"}
    assert rows["layers"]["seed"] == "parent" and rows["random"]["seed"] is None
    assert json.loads((folder / "members" / "shape" / "config.json").read_text())["model_type"] == "qwen3"
    assert rows["shape"]["dims"]["vocab_size"] == rows["parent"]["dims"]["vocab_size"]
    again = run_recipe(load_recipe(recipe_folder / "starts.yaml"), output=tmp_path / "again")
    for name in ("random", "shape"):
        first, second = (load_file(run / "members" / name / "model.safetensors") for run in (folder, again))
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_the_plan_speaks_up_where_a_hop_is_large():
    members = [
        {"name": "a", "seed": "parent", "fraction_of_parent": 0.7, "init": "prune"},
        {"name": "b", "seed": "a", "fraction_of_parent": 0.35, "init": "prune"},
        {"name": "c", "seed": None, "fraction_of_parent": 0.05, "init": "random"},
    ]
    first, second = hops_too_large(members)
    assert first.startswith("b cuts 50% of a at once") and "of 49% of the parent" in first
    assert second.startswith("c has 5.0% of its teacher")
