"""Copies in fewer bits: what is stored, measured and trained is the same rounding."""

import copy
import json

import pytest
import torch
from conftest import distill_with, make_blocks, make_model
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification

from cascade.models.checkpoint.load import ModelSource, load_config, load_model, save_checkpoint
from cascade.models.checkpoint.quantised import group_size, is_rounded, load_rounded, round_while_training
from cascade.pipeline.run import run_recipe
from cascade.planning.checks import check_family
from cascade.recipe.load import load_recipe
from cascade.runtime.errors import UserError

pytest.importorskip("torchao", reason="quantised copies need torchao")

KINDS = {"int8": 0.02, "int4": 0.25}
"""The largest difference of logits from the unrounded model's, relative to their norm."""


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids).logits.float()


def saved(model, folder, dtype=torch.float32):
    save_checkpoint(model, folder, companions=None, dtype=dtype)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_training_rounds_as_the_stored_copy_does(tmp_path, kind):
    model = saved(make_model(), tmp_path / "plain")
    ids = make_blocks(2).input_ids
    stored = load_rounded(tmp_path / "plain", model, kind, torch.float32)
    training = copy.deepcopy(model)
    round_while_training(training, kind)
    trained, expected = logits(training, ids), logits(stored, ids)
    assert (trained - expected).norm() <= 1e-5 * expected.norm()
    distance = (expected - logits(model, ids)).norm() / expected.norm()
    assert 1e-4 < distance < KINDS[kind]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_stored_copy_is_a_stock_checkpoint_and_reads_as_plain_weights_of_the_same_values(tmp_path, kind, dtype):
    model = saved(make_model(), tmp_path / "plain", dtype)
    stored = load_rounded(tmp_path / "plain", model, kind, dtype)
    stored.save_pretrained(tmp_path / "rounded")
    ids = make_blocks(2).input_ids
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "rounded")
    assert torch.equal(logits(reloaded, ids), logits(stored, ids))
    source = ModelSource(tmp_path / "rounded", "rounded")
    plain = load_model(source)
    assert is_rounded(load_config(source)) and not is_rounded(plain.config)
    assert {type(parameter) for parameter in plain.parameters()} == {torch.nn.Parameter}
    assert {parameter.dtype for parameter in plain.parameters()} == {torch.float32}
    read, expected = logits(plain, ids), logits(stored, ids)
    assert (read - expected).norm() <= (1e-5 if dtype == torch.float32 else 0.02) * expected.norm()
    levels = plain.model.layers[0].mlp.down_proj.weight[0, : group_size(model)].detach().unique()
    assert len(levels) <= (16 if kind == "int4" else 256)


def test_a_classifiers_head_stays_as_it_is(tmp_path):
    config = BertConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    torch.manual_seed(0)
    model = saved(BertForSequenceClassification(config).eval(), tmp_path / "plain")
    stored = load_rounded(tmp_path / "plain", model, "int8", torch.float32)
    assert type(stored.classifier.weight) is torch.nn.Parameter
    assert type(stored.bert.encoder.layer[0].output.dense.weight) is not torch.nn.Parameter
    ids = torch.randint(0, 50, (2, 8))
    assert (logits(stored, ids) - logits(model, ids)).norm() < 0.02 * logits(model, ids).norm()


def test_training_with_rounded_weights_makes_the_rounded_copy_better(tmp_path):
    from cascade.distillation.losses.batch import selection_losses

    teacher, blocks = make_model(), make_blocks(64)
    student = copy.deepcopy(teacher)
    round_while_training(student, "int4")
    before = selection_losses(student, teacher, blocks.take(16), 8)["selection_kl"]
    distill_with(student, teacher, blocks, num_tokens=8 * 64 * 16, learning_rate=3e-3)
    assert selection_losses(student, teacher, blocks.take(16), 8)["selection_kl"] < 0.7 * before


def test_copies_are_rows_of_the_family_with_folders_that_load(recipe_folder, tmp_path):
    finish = "finish=[{quantise: int8}, {quantise: int4, tokens: 256, members: small, learning_rate: 1e-3}]"
    shape = "target: {{dims: {{intermediate_size: {}}}}}"
    members = f"members=[{{name: big, {shape.format(48)}}}, {{name: small, {shape.format(32)}}}]"
    changes = [finish, members, "baselines=[]", "prune.repair.method=none", "evaluate.tasks=[]"]
    recipe = load_recipe(recipe_folder / "tiny.yaml", changes)
    folder = run_recipe(recipe, output=tmp_path / "run")
    rows = {row["name"]: row for row in json.loads((folder / "family.json").read_text())["rows"]}
    copies = ["parent-int8", "big-int8", "small-int8", "small-int4qat"]
    assert [name for name, row in rows.items() if row["role"] == "quantised"] == copies
    for name in copies:
        row, owner = rows[name], rows[name.partition("-")[0]]
        assert row["num_parameters"] == owner["num_parameters"] and row["bytes"] != owner["bytes"]
        assert row["speed"]["decode_tokens_per_s"] > 0
        AutoModelForCausalLM.from_pretrained(folder / row["checkpoint"])
        card = (folder / row["checkpoint"] / "README.md").read_text()
        assert f"`{owner['name']}` with weights in {row['status']} (torchao)" in card
        for metric, owner_metric in zip(row["metrics"], owner["metrics"], strict=False):
            if metric["metric"] == owner_metric["metric"] == "loss":
                assert metric["value"] != owner_metric["value"] and abs(metric["value"] - owner_metric["value"]) < 0.05
    assert rows["small-int4qat"]["tokens"] == {"hop": 256, "cumulative": 512 + 512 + 256, "teacher_labelled": 256}
    num_finished = (folder / "events.jsonl").read_text().count('"finished"')
    run_recipe(recipe, output=tmp_path / "run")
    assert (folder / "events.jsonl").read_text().count('"finished"') == num_finished


@pytest.mark.parametrize(
    ("finish", "message"),
    [
        ("[{quantise: int3}]", "finish.0.quantise"),
        ("[{quantise: int8, members: nobody}]", "unknown 'nobody'; the recipe has: parent, big, small"),
        ("[{quantise: int8}, {quantise: int8, members: small}]", "the name small-int8 stands twice"),
        ("[{quantise: int8, learning_rate: 1e-3}]", "give its `tokens`, too"),
        ("[{quantise: int8, examples: 3}]", "task language counts tokens; give `tokens`"),
    ],
)
def test_copies_that_cannot_be_made_are_refused_with_the_recipe(recipe_folder, finish, message):
    with pytest.raises(UserError, match=message):
        load_recipe(recipe_folder / "tiny.yaml", [f"finish={finish}"])


def test_a_parent_that_is_rounded_already_is_refused(recipe_folder, tmp_path, tiny_parent):
    source = ModelSource(tiny_parent, "tiny")
    plain = load_model(source)
    load_rounded(tiny_parent, plain, "int8", torch.float32).save_pretrained(tmp_path / "rounded")
    recipe = load_recipe(recipe_folder / "tiny.yaml")
    with pytest.raises(UserError, match="its weights are rounded already"):
        check_family(recipe, load_config(ModelSource(tmp_path / "rounded", "rounded")), [])


def test_weights_that_no_group_divides_are_refused_before_the_run(recipe_folder):
    recipe = load_recipe(recipe_folder / "tiny.yaml", ["finish=[{quantise: int4}]", "members=[]"])
    config = make_model(intermediate_size=36).config
    with pytest.raises(UserError, match=r"finish: parent: int4: .*down_proj has 36 columns.*use int8"):
        check_family(recipe, config, [])
