"""Encoders whose sentence-transformers files ask for another embedding than the mean are refused; the others' go along."""

import json
import shutil

import pytest
from conftest import ROOT, SHARED, needs_shared
from test_embeddings import minilm  # noqa: F401

from cascade.models.checkpoint.sentence_files import copy_sentence_files, require_mean_pooling, unlearned_settings
from cascade.planning.preview import preview
from cascade.planning.preview_text import preview_text
from cascade.recipe.load import load_recipe
from cascade.runtime.errors import UserError


def modules(*kinds):
    return [{"idx": n, "name": str(n), "path": f"{n}_{kind}" if n else "", "type": f"sentence_transformers.models.{kind}"}
            for n, kind in enumerate(kinds)]  # fmt: skip


def folder_with(folder, *, kinds=("Transformer", "Pooling", "Normalize"), pooling=None, **files):
    (folder / "1_Pooling").mkdir(parents=True)
    pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True} if pooling is None else pooling
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    if kinds:
        (folder / "modules.json").write_text(json.dumps(modules(*kinds)))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("kinds", "pooling"),
    [
        (("Transformer", "Pooling"), None),
        (("Transformer", "Pooling", "Normalize"), {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}),
        (("Transformer", "Pooling"), {"embedding_dimension": 32, "pooling_mode": "mean"}),
        ((), None),
    ],
)
def test_the_mean_is_learned_as_the_files_ask_for_it(tmp_path, kinds, pooling):
    require_mean_pooling(folder_with(tmp_path / "a", kinds=kinds, pooling=pooling), "parent: a")
    require_mean_pooling(tmp_path, "parent: without such files")


@pytest.mark.parametrize(
    ("kinds", "pooling", "message"),
    [
        (("Transformer", "Pooling"), {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "pools by cls "),
        (("Transformer", "Pooling"), {"pooling_mode": "lasttoken"}, "pools by lasttoken "),
        (("Transformer", "Pooling"), {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, "pools by cls, mean "),
        (("Transformer", "Pooling"), {}, "pools by nothing "),
        ((), {"pooling_mode_max_tokens": True}, "pools by max "),
        (("Transformer", "Pooling", "Dense"), None, "makes its embeddings by Transformer, Pooling, Dense; this task learns the mean"),
        (("WordEmbeddings", "Pooling"), None, "makes its embeddings by WordEmbeddings, Pooling"),
    ],
)  # fmt: skip
def test_another_embedding_than_the_mean_is_refused_by_its_name(tmp_path, kinds, pooling, message):
    with pytest.raises(UserError, match=f"parent: a: .*{message}"):
        require_mean_pooling(folder_with(tmp_path / "a", kinds=kinds, pooling=pooling), "parent: a")


@pytest.mark.parametrize("content", ["{", "[1]", '{"a": 1}'])
def test_files_that_are_no_such_files_are_named(tmp_path, content):
    (tmp_path / "modules.json").write_text(content)
    with pytest.raises(UserError, match="modules.json"):
        require_mean_pooling(tmp_path, "parent: a")


def test_a_default_prompt_is_told_and_prompts_to_choose_from_are_not(tmp_path):
    prompts = {"prompts": {"query": "query: ", "none": ""}, "default_prompt_name": "query"}
    folder = folder_with(
        tmp_path / "a", config_sentence_transformers=prompts, sentence_bert_config={"do_lower_case": True}
    )
    told = unlearned_settings(folder, "parent")
    assert "'query: ' before every text" in told[0] and "do_lower_case" in told[1] and len(told) == 2
    other = folder_with(tmp_path / "b", config_sentence_transformers=prompts | {"default_prompt_name": None})
    assert unlearned_settings(other, "parent") == unlearned_settings(tmp_path, "parent") == []


def test_the_files_of_a_parent_go_with_its_members(tmp_path):
    folder = folder_with(tmp_path / "a", sentence_bert_config={"max_seq_length": 32}, secret={"a": 1})
    copy_sentence_files(folder, tmp_path / "member")
    names = {path.relative_to(tmp_path / "member").as_posix() for path in (tmp_path / "member").rglob("*.json")}
    assert names == {"modules.json", "1_Pooling/config.json", "sentence_bert_config.json"}
    copy_sentence_files(tmp_path, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@needs_shared
def test_the_plan_refuses_the_real_encoder_where_its_files_pool_by_cls_and_tells_its_prompt(minilm, tmp_path):  # noqa: F811
    parent = tmp_path / "parent"
    shutil.copytree(minilm, parent)
    reviews = SHARED / "classification" / "sst2"
    recipe = load_recipe(ROOT / "recipes" / "embeddings.yaml", [
        f"parent={parent}", f"data.train={reviews / 'validation.jsonl.gz'}", f"data.heldout={reviews / 'test.jsonl.gz'}",
        "data.max_length=32", "members=[{name: layers-3, target: {dims: {num_hidden_layers: 3}}, init: layers}]",
    ])  # fmt: skip
    prompts = {"prompts": {"query": "query: "}, "default_prompt_name": "query"}
    (parent / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    assert "puts 'query: ' before every text" in preview_text(preview(recipe, tmp_path / "run"))
    pooling = {"word_embedding_dimension": 384, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (parent / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    with pytest.raises(UserError, match="pools by cls .*this task learns the mean of the last hidden states"):
        preview(recipe, tmp_path / "run")
