"""What a later stage would refuse is refused by the plan, and what it would stumble over is told."""

import shutil

import pytest
from click.testing import CliRunner
from conftest import ROOT, make_blocks, make_model

from cascade.distillation.losses.divergences import DIVERGENCES
from cascade.planning.preview import preview
from cascade.planning.preview_text import preview_text
from cascade.recipe.load import load_recipe
from cascade.runtime.errors import UserError

WIDE = (
    "config: {model_type: llama, hidden_size: 24, intermediate_size: 32, num_hidden_layers: 1,"
    " num_attention_heads: 2, num_key_value_heads: 2, head_dim: 12}"
)
ONE_LAYER = "members=[{name: one, init: layers, target: {dims: {num_hidden_layers: 1}}}]"
NEEDS_HUB = """\
task: elsewhere
dataset_path: nobody/nothing-of-this-name
dataset_kwargs: {revision: abcdef0123456789abcdef0123456789abcdef01}
output_type: multiple_choice
test_split: test
doc_to_text: "{{text}}"
doc_to_target: 0
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc}]
"""


@pytest.fixture
def plan(recipe_folder, tmp_path):
    def found(*overrides):
        return preview(load_recipe(recipe_folder / "tiny.yaml", list(overrides)), tmp_path / "run")

    return found


def test_a_plan_that_can_be_done_has_nothing_to_caution_of(plan):
    assert plan("distill.batch_size=1")["cautions"] == []


def test_few_optimizer_steps_are_told_of_with_the_batch_that_makes_more(plan):
    told = plan()["cautions"]
    assert told and all("optimizer steps; more and smaller ones" in text for text in told)
    assert "distill.batch_size: 2 makes twice as many" in told[0] and "at a rate of its own" in told[0]


@pytest.mark.parametrize("name", ["heldout/los", "heldout/loss/none", "heldout", "python_minimal_pairs/accuracy"])
def test_a_threshold_on_what_is_not_measured_is_refused_with_what_is(plan, name):
    with pytest.raises(UserError, match=f"evaluate.at_least: '{name}' is not measured here; known.*heldout/loss, "
                                        ".*python_minimal_pairs/acc"):  # fmt: skip
        plan(f"evaluate.at_least={{{name}: 0.5}}")


def test_thresholds_on_all_that_is_measured_are_accepted(plan):
    names = ["loss", "bits_per_byte", "calibration_error", "kl_to_teacher", "top1_agreement"]
    plan(f"evaluate.at_least={{{', '.join(f'heldout/{name}: 1' for name in names)}, python_minimal_pairs/acc: 1}}")


def test_the_thresholds_known_are_the_metrics_that_held_out_text_gives():
    from cascade.evaluation.heldout import BLOCK_METRICS, block_metrics

    measured, _ = block_metrics(make_model(seed=1), make_model(seed=2), make_blocks(2))
    assert {metric.metric for metric in measured} == set(BLOCK_METRICS)


def test_a_task_whose_dataset_is_not_on_the_machine_is_refused_where_the_hub_is_not_asked(plan, tmp_path, monkeypatch):
    import datasets

    (tmp_path / "elsewhere.yaml").write_text(NEEDS_HUB)
    asked = f"evaluate={{tasks: [elsewhere], task_folders: [{tmp_path}], heldout_blocks: 8}}"
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match="evaluate.tasks: elsewhere: its dataset nobody/nothing-of-this-name.*not on this"
    ):
        plan(asked)


def test_metrics_of_lm_evals_own_tasks_groups_and_tags_are_known_by_their_filters(monkeypatch):
    from types import SimpleNamespace

    from cascade.evaluation.tasks_lm_eval import harness

    def entry(cfg, *tags):
        return SimpleNamespace(cfg=cfg, tags=set(tags))

    index = {
        "math": entry({"task": "math", "filter_list": [{"name": "strict"}, {"name": "loose"}],
                       "metric_list": [{"metric": "exact_match"}]}),
        "easy": entry({"task": "easy", "output_type": "multiple_choice"}, "both"),
        "hard": entry({"task": "hard", "metric_list": [{"metric": "acc"}]}, "both"),
        "both": entry(None),
        "group": entry({"group": "group", "task": ["hard"], "aggregate_metric_list": [{"metric": "acc"}]}),
        "own": entry({"task": "own", "class": "somewhere.Task"}),
    }  # fmt: skip
    monkeypatch.setattr(harness, "builtin_tasks", lambda: SimpleNamespace(task_index=index))
    assert harness.measured_names(["math"]) == {"math/exact_match/strict", "math/exact_match/loose"}
    assert harness.measured_names(["both"]) == {"easy/acc", "easy/acc_norm", "hard/acc"}
    assert harness.measured_names(["group"]) == {"group/acc", "hard/acc"}
    assert harness.measured_names(["own"]) is None


def test_a_held_out_split_that_fills_no_block_or_lacks_its_field_is_refused(plan, recipe_folder):
    (recipe_folder / "little.jsonl").write_text('{"text": "too short"}\n')
    (recipe_folder / "other.jsonl").write_text('{"content": "another field"}\n')
    with pytest.raises(UserError, match="heldout: .* tokens do not fill one block of 32"):
        plan(f"data.heldout={recipe_folder / 'little.jsonl'}")
    with pytest.raises(UserError, match="no field 'text'"):
        plan(f"data.heldout={recipe_folder / 'other.jsonl'}")
    with pytest.raises(UserError, match="data.production: .* tokens do not fill one block"):
        plan(f"data.production=[{recipe_folder / 'little.jsonl'}]")


def test_a_student_whose_inside_cannot_be_compared_is_refused_where_a_loss_asks_for_it(plan):
    members = f"members=[{{name: wide, {WIDE}}}]"
    plan(members, "baselines=[]")
    with pytest.raises(UserError, match="members: wide: distill.features: a student of 1 layers x 24 channels"):
        plan(members, "baselines=[]", "distill.features.hidden=cosine")


def test_logits_that_are_not_understood_are_refused(plan, monkeypatch):
    from cascade.models.architecture import head

    monkeypatch.setattr(head, "TOLERANCE", -1.0)
    with pytest.raises(UserError, match="its logits are not its head's"):
        plan()


def test_a_masked_parent_without_a_mask_token_is_refused(tiny_parent, recipe_folder, tmp_path):
    from transformers import BertConfig, BertForMaskedLM

    from cascade.models.checkpoint.load import copy_companions

    config = BertConfig(
        vocab_size=2048, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    )
    BertForMaskedLM(config).save_pretrained(tmp_path / "masked")
    copy_companions(tiny_parent, tmp_path / "masked")
    changes = [f"parent={tmp_path / 'masked'}", "task=masked_language", "evaluate.tasks=[]", ONE_LAYER]
    with pytest.raises(UserError, match="tokenizer has no mask token"):
        preview(load_recipe(recipe_folder / "tiny.yaml", changes), tmp_path / "run")


def test_text_to_pretrain_on_is_no_longer_than_the_parents_positions(recipe_folder, tmp_path):
    size = "{model_type: gpt2, n_embd: 16, n_layer: 2, n_head: 2, n_positions: 40}"
    pretrain = f"{{config: {size}, tokenizer: {{vocab_size: 300}}, tokens: 512, block_size: 64, learning_rate: 1e-3}}"
    with pytest.raises(UserError, match="parent.pretrain.block_size: 64 is longer than the parent's context of 40"):
        preview(
            load_recipe(recipe_folder / "tiny.yaml", [f"parent={{pretrain: {pretrain}}}", ONE_LAYER]), tmp_path / "run"
        )


def test_images_of_another_size_than_the_parents_are_refused(tmp_path):
    recipe = load_recipe(ROOT / "recipes" / "digits.yaml", ["parent.fit.config.image_size=16"])
    with pytest.raises(UserError, match="data: images of 1 channels, 8 x 8; the parent takes 1 channels, 16 x 16"):
        preview(recipe, tmp_path / "run")


def test_exact_tokens_are_among_the_ids_that_all_models_have():
    from cascade.planning.cache_choice import require_exact

    require_exact((3, 511), 512)
    with pytest.raises(UserError, match="exact_tokens: token id 512 is not among the 512 ids"):
        require_exact((3, 512), 512)


def test_memory_and_disk_beyond_the_machines_are_told_with_the_member_and_what_helps(plan, monkeypatch):
    from cascade.planning import cautions

    disk = shutil.disk_usage("/")
    monkeypatch.setattr(cautions, "memory_bytes", lambda: 500_000_000)
    monkeypatch.setattr(cautions.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(cautions.shutil, "disk_usage", lambda path: disk._replace(free=1000))
    found = plan("distill.cache=hidden", "distill.features.hidden=none")
    text = preview_text(found)
    for start in ("big: its training takes about", "small: its training takes about"):
        assert any(
            line.startswith(start) and "times what this machine has (0.5 GB)" in line for line in text.split("\n")
        )
    assert "GB of disk and 0.00 GB are free: `cascade run` will refuse to start" in text
    assert "of the teacher's targets are to be kept and 0.00 GB are free: labelling will stop" in text


def test_the_losses_of_cascade_distill_are_a_choice():
    from cascade.cli.main import main

    result = CliRunner().invoke(
        main, ["distill", "x", "--teacher", "y", "--tokens", "1", "--output", "o", "--loss", "kl"]
    )
    names = ", ".join(f"'{name}'" for name in DIVERGENCES)
    assert result.exit_code == 2 and f"'kl' is not one of {names}" in " ".join(result.output.split())


def test_a_task_is_refused_before_anything_is_measured(tiny_parent, monkeypatch):
    from types import SimpleNamespace

    from cascade.cli.main import main
    from cascade.evaluation.tasks_lm_eval import harness
    from cascade.pipeline import single_stage

    monkeypatch.setattr(single_stage, "evaluate", lambda *_, **__: pytest.fail("it was measured"))
    monkeypatch.setattr(harness, "builtin_tasks", lambda: SimpleNamespace(all_tasks=[]))
    found = CliRunner().invoke(main, ["evaluate", str(tiny_parent), "--data", "stdlib", "--task", "nothing_such"])
    assert found.exit_code == 2 and "nothing_such" in found.output


BESIDE = "members=[{name: large, target: {params: 0.9}}, {name: beside, target: {params: 0.8}, seed: parent%s}, {name: small, target: {params: 0.7}}]"


def test_a_chain_that_goes_on_from_a_variant_beside_it_is_told_of(plan):
    planned = plan("distill.batch_size=1", BESIDE % "")
    assert {row["name"]: row["seed"] for row in planned["members"]} == {
        "large": "parent",
        "beside": "parent",
        "small": "beside",
    }
    (told,) = [text for text in planned["cautions"] if "chain" in text]
    assert told.startswith("small: it is cut from beside") and "chain: false" in told


def test_a_member_out_of_the_chain_is_nobodys_seed_by_position(plan):
    planned = plan("distill.batch_size=1", BESIDE % ", chain: false")
    assert {row["name"]: row["seed"] for row in planned["members"]}["small"] == "large"
    assert not any("chain" in text for text in planned["cautions"])


def test_what_is_not_cut_cannot_be_taken_out_of_the_chain(plan):
    with pytest.raises(UserError, match="never in the chain; remove `chain`"):
        plan(f"members=[{{name: own, {WIDE}, chain: false}}]")
