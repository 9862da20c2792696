"""Held-out text is packed once a run, whoever is measured on it, and opens for evaluation alone."""

import ast
import json
import shutil

import pytest
import torch
from conftest import ROOT, make_blocks, write_texts

from cascade.data.bad_rows import BadRows
from cascade.data.blocks import TokenBlocks, load_blocks
from cascade.data.examples import Examples, load_training
from cascade.evaluation.heldout import HELDOUT_FILE, open_heldout, save_heldout
from cascade.pipeline.run import run_recipe
from cascade.recipe.load import load_recipe

THREE = ["members=[{name: a, target: {params: 0.8}}, {name: b, target: {params: 0.7}}, {name: c, target: {params: 0.6}}]",
         "distill.tokens=256", "evaluate.tasks=[]", "baselines=[cut, repaired]", "distill.cache=none"]  # fmt: skip


@pytest.fixture
def calls(monkeypatch):
    """Counts of reading the held-out split, of tokenising it, and of measuring models on it."""
    from cascade.data import packing, prepare
    from cascade.evaluation import evaluate
    from cascade.pipeline.stages import baseline

    counts = {"read": 0, "tokenised": 0, "measured": 0}

    def counted(module, name, key, *, only=lambda *arguments: True):
        function = getattr(module, name)

        def call(*arguments, **options):
            counts[key] += bool(only(*arguments))
            return function(*arguments, **options)

        monkeypatch.setattr(module, name, call)

    heldout: set[str] = set()
    read_placed = prepare.read_placed

    def reading(data, split, **options):
        placed = read_placed(data, split, **options)
        if split == "heldout":
            counts["read"] += 1
            heldout.update(document for _, document in placed)
        return placed

    monkeypatch.setattr(prepare, "read_placed", reading)
    counted(packing, "batched", "tokenised", only=lambda texts, size: texts and set(texts) <= heldout)
    counted(evaluate, "heldout_report", "measured")
    counted(baseline, "heldout_report", "measured")
    return counts


def stages_of(run, kind):
    return sorted(path for path in (run / "stages").glob("*") if path.name.rpartition("-")[0].endswith(f".{kind}"))


def test_a_family_of_three_reads_and_tokenises_its_held_out_text_once_for_all_ten_evaluations(
    recipe_folder, tmp_path, calls
):
    run = run_recipe(load_recipe(recipe_folder / "tiny.yaml", THREE), output=tmp_path / "run")
    assert calls["measured"] == 10  # the parent, three members, and of each the cut and the repaired model
    # Once more before the run, which refuses text that does not fill a block. It was 11 of both.
    assert calls["read"] == calls["tokenised"] == 2
    (folder,) = stages_of(run, "heldout")
    assert folder.name.startswith("parent.heldout-") and not stages_of(run, "production")


def test_a_run_from_before_there_was_such_a_stage_makes_it_where_an_evaluation_needs_it(
    tiny_recipe, tiny_family, tmp_path
):
    run = shutil.copytree(tiny_family, tmp_path / "run")
    before = {path.name for path in (run / "stages").iterdir()}
    (heldout,) = stages_of(run, "heldout")
    shutil.rmtree(heldout)
    run_recipe(tiny_recipe, output=run)
    assert {path.name for path in (run / "stages").iterdir()} == before - {heldout.name}  # nothing needs it
    (evaluation,) = stages_of(run, "evaluate")[:1]
    measured = (evaluation / "eval.json").read_bytes()
    shutil.rmtree(evaluation)
    run_recipe(tiny_recipe, output=run)
    assert {path.name for path in (run / "stages").iterdir()} == before
    assert (evaluation / "eval.json").read_bytes() == measured


def test_text_of_another_size_or_another_tokenizer_is_packed_anew(recipe_folder, tiny_parent, tmp_path):
    from cascade.models.checkpoint.load import ModelSource
    from cascade.pipeline.stages.heldout import tokenizer_digest

    changes = ["members=[]", "evaluate.tasks=[]", "baselines=[]"]
    for count in (4, 8):
        changed = [*changes, f"evaluate.heldout_blocks={count}"]
        run = run_recipe(load_recipe(recipe_folder / "tiny.yaml", changed), output=tmp_path / "run")
    assert sorted(len(open_heldout(folder)) for folder in stages_of(run, "heldout")) == [4, 8]
    other = shutil.copytree(tiny_parent, tmp_path / "other")
    assert tokenizer_digest(ModelSource(other, "other")) == tokenizer_digest(ModelSource(tiny_parent, "tiny"))
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + "\n")
    assert tokenizer_digest(ModelSource(other, "other")) != tokenizer_digest(ModelSource(tiny_parent, "tiny"))


def test_rows_left_out_of_held_out_text_are_told_as_before(recipe_folder, tmp_path):
    folder = shutil.copytree(recipe_folder, tmp_path / "recipe")
    (folder / "heldout.jsonl.gz").unlink()
    write_texts(tmp_path / "texts.jsonl.gz", 12, seed=9)
    import gzip

    texts = gzip.open(tmp_path / "texts.jsonl.gz", "rt").read()
    (folder / "heldout.jsonl").write_text(texts + '{"text": 7}\n')
    changes = ["members=[]", "evaluate.tasks=[]", "baselines=[]", "data.heldout=heldout.jsonl", "data.max_bad_rows=0.5"]
    run = run_recipe(load_recipe(folder / "tiny.yaml", changes), output=tmp_path / "run")
    skipped = json.loads((run / "skipped.json").read_text())["held-out text"]
    assert (skipped["rows"], skipped["skipped"]) == (13, 1)
    assert skipped["named"][0]["place"].endswith("heldout.jsonl:13")
    bad = BadRows()
    bad.restore(json.loads((stages_of(run, "heldout")[0] / "rows.json").read_text()))
    assert bad.record() == json.loads((stages_of(run, "evaluate")[0] / "skipped.json").read_text())


@pytest.mark.parametrize("text", [
    make_blocks(3, 8),
    Examples({"input_ids": torch.ones(2, 3), "attention_mask": torch.ones(2, 3)}, torch.zeros(2)),
])  # fmt: skip
def test_a_file_of_held_out_text_opens_for_evaluation_alone(text, tmp_path):
    save_heldout(text, tmp_path)
    for read in (load_training, load_blocks):
        if read is load_training or isinstance(text, TokenBlocks):
            with pytest.raises(ValueError, match="holds the heldout split, and is opened for training"):
                read(tmp_path / HELDOUT_FILE)
    assert len(open_heldout(tmp_path)) == len(text)


def test_only_the_stage_that_packs_held_out_text_hands_it_to_evaluation():
    for path in (ROOT / "cascade").rglob("*.py"):
        place = path.relative_to(ROOT / "cascade").as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            name = getattr(node, "id", getattr(node, "attr", "")) if isinstance(node, ast.Name | ast.Attribute) else ""
            if name in ("open_heldout", "HELDOUT_FILE"):
                assert place.startswith("evaluation/") or place == "pipeline/stages/heldout.py", place
            if isinstance(node, ast.keyword) and node.arg == "split" and getattr(node.value, "value", "") == "heldout":
                assert place == "evaluation/heldout.py", place
