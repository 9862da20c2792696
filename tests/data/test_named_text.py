"""Figures of a model are those of a text that somebody chose, and say which."""

import json

import pytest
from click.testing import CliRunner
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel

from cascade.cli.main import main
from cascade.evaluation.tasks_lm_eval.task_options import TaskOptions
from cascade.pipeline.single_stage import evaluate_model, named_text, told_text
from cascade.runtime.errors import UserError

COMMANDS = {
    "prune": ["--params", "0.7", "--output"],
    "distill": ["--teacher", "{model}", "--tokens", "64", "--output"],
    "evaluate": [],
}


def invoke(command, model, tmp_path, *more):
    options = [one.format(model=model) for one in COMMANDS[command]]
    options += [str(tmp_path / "out")] if "--output" in options else []
    return CliRunner().invoke(main, [command, str(model), *options, *more])


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_without_data_asks_for_it_before_anything_is_read(tiny_parent, tmp_path, command):
    done = invoke(command, tiny_parent, tmp_path)
    assert done.exit_code == 2, done.output
    assert f"--data is missing: give text like that which {tiny_parent} was trained on" in done.stderr
    assert "--data stdlib takes the source code of Python's standard library" in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_model_of_the_package_is_measured_on_its_own_text_and_the_result_says_so():
    shown = CliRunner().invoke(main, ["evaluate", "builtin:pico-python", "--heldout-blocks", "2", "--block-size", "32"])
    assert "text: stdlib (source code of Python's standard library)" in shown.output, shown.output
    assert named_text(None, "builtin:pico-python") == "stdlib"
    for empty in (None, "", " "):
        with pytest.raises(UserError, match="--data is missing"):
            named_text(empty, "runs/pico-python/members/half")


def test_the_text_that_is_named_is_the_one_that_is_measured_and_told(tiny_parent, tmp_path):
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"x{n} = {n} " * 30}) + "\n" for n in range(200)))
    losses = {}
    for data in ("stdlib", str(tmp_path / "text.jsonl")):
        found = evaluate_model(str(tiny_parent), TaskOptions(), None, 2, data, 32)
        assert found["text"] == told_text(data) and found["text"].startswith(data)
        losses[data] = next(one["value"] for one in found["metrics"] if one["metric"] == "loss")
    assert len(set(losses.values())) == 2


@pytest.mark.parametrize("command", ["distill", "evaluate"])
@pytest.mark.parametrize("kind", [BertModel, BertForMaskedLM, BertForSequenceClassification])
def test_models_that_predict_no_next_token_are_not_trained_or_measured_as_if_they_did(tmp_path, kind, command):
    sizes = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    kind(BertConfig(**sizes)).save_pretrained(tmp_path / "model")
    done = invoke(command, tmp_path / "model", tmp_path, "--data", "stdlib")
    assert done.exit_code == 2, done.output
    assert f"{kind.__name__} does not predict the next token" in done.stderr and "`task:`" in done.stderr


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"body": "a"}] * 9, r"--data \((calibration|heldout)\): .*no field 'text'.*Rename the field .* to 'text'"),
        ([{"text": None}] * 9, r"--data .*9 of 9 rows cannot be used.*a command leaves out at most 1.0%"),
        ([{"text": "a"}], r"--data .*: (no documents|\d+ tokens do not fill)"),
    ],
)
def test_messages_of_a_command_name_its_option_and_no_key_of_a_recipe(tiny_parent, tmp_path, rows, message):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=message) as error:
        evaluate_model(str(tiny_parent), TaskOptions(), None, 2, str(tmp_path / "a.jsonl"), 32)
    assert "data.text_field" not in str(error.value) and "data.max_bad_rows" not in str(error.value)
