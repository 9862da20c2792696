"""The folder that is published cuts, continues and renders text as was measured, or it is refused."""

import json

import pytest
import torch
from conftest import SHARED, needs_shared
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config

from cascade.evaluation.reload import ReloadError, check_reload, require_same_text, write_reference
from cascade.evaluation.reload_process import tokenizer_facts
from cascade.evaluation.tasks_lm_eval.task_options import TaskOptions
from cascade.evaluation.tokenizer_files import require_same_ids, require_tokenizer_files
from cascade.models.checkpoint.load import BUILTIN_FOLDER, load_tokenizer, resolve_model, save_checkpoint
from cascade.pipeline.run import run_recipe
from cascade.pipeline.single_stage import evaluate_model
from cascade.recipe.load import load_recipe
from cascade.runtime.errors import UserError

PICO = BUILTIN_FOLDER / "pico-python"
SPEED = {"prompt_tokens": 8, "new_tokens": 2}


@pytest.fixture
def published(tmp_path):
    """A small random Llama as a checkpoint with the built-in tokenizer, and the reference of the reload gate."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=128, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    folder = tmp_path / "model"
    rounded = save_checkpoint(LlamaForCausalLM(config), folder, companions=PICO, dtype=torch.bfloat16)
    write_reference(rounded, tmp_path / "reference.safetensors", folder=folder)
    return folder


def reload(folder):
    tokenizer = load_tokenizer(resolve_model(str(PICO)))
    return check_reload(folder, folder.parent / "reference.safetensors", tokenizer=tokenizer, **SPEED)


def change(path, **values):
    record = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in record.items() if value is not None}))


def test_a_folder_as_it_was_saved_passes_the_gate(published):
    assert reload(published)["reload_difference"] < 1e-5


def test_a_folder_whose_merges_are_others_is_refused_with_a_text_that_differs(published):
    path = published / "tokenizer.json"
    record = json.loads(path.read_text())
    record["model"]["merges"] = record["model"]["merges"][:100]
    path.write_text(json.dumps(record))
    with pytest.raises(ReloadError, match=r"ids \(trained / read\): \d+ of \d+, such as"):
        reload(published)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"padding_side": "left"}, "padding side"),
        ({"pad_token": "<|endoftext|>"}, "special tokens"),
        ({"chat_template": "{{ messages[0]['content'] }}"}, "chat template"),
    ],
)
def test_a_setting_of_the_tokenizer_that_changed_is_refused_by_its_name(published, values, named):
    change(published / "tokenizer_config.json", **values)
    with pytest.raises(ReloadError, match=named):
        reload(published)


def test_a_generation_config_that_ends_texts_elsewhere_is_refused(published):
    first = generated(published)[0]
    change(published / "generation_config.json", eos_token_id=first)
    with pytest.raises(ReloadError, match="continues a text otherwise"):
        reload(published)


def generated(folder):
    from safetensors.torch import load_file

    return load_file(folder.parent / "reference.safetensors")["generated"].tolist()


def test_text_that_a_template_refuses_is_compared_by_what_it_says():
    tokenizer = load_tokenizer(resolve_model(str(PICO)))
    facts = []
    for word in ("no", "never"):
        tokenizer.chat_template = "{{ raise_exception('" + word + "') }}"
        facts.append(tokenizer_facts(tokenizer))
    assert "refused: no" in facts[0]["chat template"]
    with pytest.raises(ReloadError, match="chat template"):
        require_same_text(facts[0], facts[1], "here")


@needs_shared
def test_a_student_whose_type_makes_another_tokenizer_of_the_files_is_refused_before_the_run():
    source = resolve_model(str(SHARED / "models" / "stories260K"))
    require_tokenizer_files(LlamaConfig(vocab_size=512), source, "good")
    with pytest.raises(UserError, match=r"members: new: model type 'qwen2': .* ids .*trained / read"):
        require_tokenizer_files(Qwen2Config(vocab_size=512), source, "new")


@needs_shared
def test_a_recipe_with_such_a_student_stops_before_anything_is_made(tmp_path):
    stories = SHARED / "text" / "tinystories" / "valid.jsonl.gz"
    (tmp_path / "r.yaml").write_text(
        f"""\
name: other
parent: {SHARED / "models" / "stories260K"}
data: {{source: files, train: {stories}, block_size: 64}}
members: [{{name: new, config: {{model_type: qwen2, hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2,
  num_key_value_heads: 2, intermediate_size: 48}}}}]
distill: {{tokens: 512, learning_rate: 1e-3}}
"""
    )
    with pytest.raises(UserError, match="model type 'qwen2'"):
        run_recipe(load_recipe(tmp_path / "r.yaml"), output=tmp_path / "run")
    assert not (tmp_path / "run" / "stages").exists()


def test_a_student_with_the_same_tokens_and_other_merges_is_refused(tmp_path):
    for file in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (tmp_path / file).write_bytes((PICO / file).read_bytes())
    record = json.loads((tmp_path / "tokenizer.json").read_text())
    record["model"]["merges"] = record["model"]["merges"][::-1]
    (tmp_path / "tokenizer.json").write_text(json.dumps(record))
    from transformers import AutoTokenizer

    teacher, student = (AutoTokenizer.from_pretrained(folder) for folder in (PICO, tmp_path))
    assert teacher.get_vocab() == student.get_vocab()
    require_same_ids(teacher, teacher, "same")
    with pytest.raises(UserError, match="student: its tokenizer has the teacher's tokens, and cuts text otherwise"):
        require_same_ids(teacher, student, "student")


@needs_shared
def test_cascade_evaluate_measures_a_model_on_text_as_it_was_trained():
    found = evaluate_model(
        str(SHARED / "models" / "stories260K"), TaskOptions(), None, 24,
        str(SHARED / "text" / "tinystories" / "valid.jsonl.gz"), 256,
    )  # fmt: skip
    loss = next(metric["value"] for metric in found["metrics"] if metric["metric"] == "loss")
    assert loss < 1.5  # 1.30 on whole stories from their first token; with end tokens and no first ones 1.6
