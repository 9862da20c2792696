"""The recipe's text beside what the members will meet."""

import json
import math

import pytest
import torch
from conftest import make_blocks, make_model, write_texts

from cascade.evaluation.drift import lengths, uncertainty, unlikeness
from cascade.pipeline.run import run_recipe
from cascade.recipe.load import load_recipe
from cascade.report.production import wrong_diet
from cascade.report.records import Metric, Row
from cascade.runtime.errors import UserError


def test_equal_texts_are_not_unlike_and_disjoint_ones_are_as_unlike_as_can_be():
    ids = torch.randint(0, 50, (500,), generator=torch.Generator().manual_seed(0))
    assert unlikeness(ids, ids, 100) == {"unigram_jsd": pytest.approx(0, abs=1e-12), "new_trigrams": 0.0}
    assert unlikeness(ids, ids + 50, 100) == {"unigram_jsd": pytest.approx(math.log(2)), "new_trigrams": 1.0}


def test_uncertainty_is_the_loss_and_the_entropy_of_a_models_own_probabilities():
    model, blocks = make_model(), make_blocks()
    figures = uncertainty(model, blocks, batch_size=3)
    log_p = model(input_ids=blocks.input_ids).logits[:, :-1].double().log_softmax(-1)
    assert figures["loss"] == pytest.approx(-log_p.gather(-1, blocks.labels[:, 1:, None]).mean().item(), rel=1e-5)
    assert figures["entropy"] == pytest.approx(-(log_p.exp() * log_p).sum(-1).mean().item(), rel=1e-5)


def test_lengths_count_letters_of_texts_and_of_whole_conversations():
    conversation = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cde"}]
    assert lengths(["a" * 10, conversation, "b"]) == {"median": 5.0, "p90": pytest.approx(9.0)}


def drift(*, jsd=0.1, loss=3.0):
    return {"text": {"heldout": {"unigram_jsd": 0.1}, "production": {"unigram_jsd": jsd}},
            "teacher": {"heldout": {"loss": 3.0}, "production": {"loss": loss}}}  # fmt: skip


def row(heldout, production):
    values = {"heldout": heldout, "production": production}
    metrics = tuple(Metric(task=task, metric="kl_to_teacher", value=value) for task, value in values.items())
    return Row(name="small", role="member", status="done", dims={}, num_parameters=1, num_parameters_non_embedding=1,
               metrics=metrics)  # fmt: skip


def test_the_wrong_diet_is_said_for_what_it_is():
    assert wrong_diet({}, []) == [] == wrong_diet(drift(), [row(0.2, 0.29)])
    (warning,) = wrong_diet(drift(), [row(0.2, 0.4)])
    assert warning.startswith("small is 2.0 times as far from its teacher on production text (KL 0.400)")
    (warning,) = wrong_diet(drift(jsd=0.3), [row(0.2, 0.2)])
    assert warning.startswith("Production text is 3.0 times as unlike the training text")
    (warning,) = wrong_diet(drift(loss=5.0), [row(0.2, 0.2)])
    assert warning.startswith("The teacher itself does worse on production text (loss 5.000)")


def test_a_run_tells_production_text_that_is_like_its_own_from_other_text(recipe_folder, tmp_path):
    write_texts(tmp_path / "like.jsonl.gz", 20, seed=9)
    (tmp_path / "other.jsonl").write_text("".join(
        json.dumps({"text": f"{number} + {number * 7} = {number * 8}; " * 40}) + "\n" for number in range(200, 240)
    ))  # fmt: skip
    changes = ["members=[]", "evaluate.tasks=[]", "baselines=[]"]
    drifts = {}
    for name in ("like.jsonl.gz", "other.jsonl"):
        recipe = load_recipe(recipe_folder / "tiny.yaml", [*changes, f"data.production={tmp_path / name}"])
        folder = run_recipe(recipe, output=tmp_path / "run")  # another sample is no other recipe
        drifts[name] = json.loads((folder / "drift.json").read_text())
        (parent,) = json.loads((folder / "family.json").read_text())["rows"]
        assert [metric["metric"] for metric in parent["metrics"] if metric["task"] == "production"] == ["loss"]
        assert "## Production" in (folder / "report.md").read_text()
    assert not any("unlike" in warning for warning in wrong_diet(drifts["like.jsonl.gz"], []))
    assert any("unlike" in warning for warning in wrong_diet(drifts["other.jsonl"], []))
    assert len(list((tmp_path / "run" / "stages").glob("parent.data-*"))) == 1  # nothing trained on depends on it

    run_recipe(load_recipe(recipe_folder / "tiny.yaml", changes), output=tmp_path / "run")
    assert not (tmp_path / "run" / "drift.json").exists()  # what is no longer asked for is not told
    assert "Production" not in (tmp_path / "run" / "report.md").read_text()


def test_production_text_is_looked_for_beside_the_recipe(recipe_folder):
    recipe = load_recipe(recipe_folder / "tiny.yaml", ["data.production=heldout.jsonl.gz"])
    assert recipe.data.production == [str(recipe_folder / "heldout.jsonl.gz")]


def test_production_text_that_is_not_there_is_named(recipe_folder, tmp_path):
    recipe = load_recipe(recipe_folder / "tiny.yaml", ["members=[]", f"data.production={tmp_path / 'none.jsonl'}"])
    with pytest.raises(UserError, match=r"data.production: .*none.jsonl: no such file"):
        run_recipe(recipe, output=tmp_path / "run")
