"""Cards, cascade.json and the report say where a model's weights come from and who taught it, and name no folders."""

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file

from cascade.pipeline.ancestry import provenance_of, provenance_of_copy
from cascade.pipeline.rows import RoundedCopy
from cascade.planning.ownership import resolved_recipe
from cascade.recipe.load import load_recipe
from cascade.recipe.schema import Recipe
from cascade.report.card import _front
from cascade.report.provenance import (
    Provenance,
    base_model_relation,
    lesson,
    load_provenances,
    provenance_table,
    sentence,
    tags,
)
from cascade.report.records import Tokens, load_family

PARENT, WRITER, STUDENT = "org/parent", "org/writer", "org/student"
LICENCES = {PARENT: "apache-2.0", WRITER: "llama3", STUDENT: "gemma"}
COMMIT = "0" * 40


@pytest.fixture(autouse=True)
def hub(tmp_path, monkeypatch):
    """A hub that has the three models."""

    def fetched(repository, revision):
        folder = tmp_path / "hub" / repository.replace("/", "--")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "README.md").write_text(f"---\nlicense: {LICENCES[repository]}\n---\n")
        (folder / "config.json").write_text("{}")
        save_file({"weight": torch.zeros(1)}, folder / "model.safetensors")
        return folder

    monkeypatch.setattr("cascade.models.checkpoint.load.fetch", fetched)


ENDPOINT = {"url": "https://h.example/v1", "model": "big-one", "top_logprobs": 5}
GENERATED = {"data": {"source": "generated"}}
TARGET = {"target": {"params": 0.5}}

STARTS = {
    "cut from the parent": [{"name": "m", **TARGET, "seed": "parent"}],
    "cut from a member": [
        {"name": "big", "target": {"params": 0.8}, "seed": "parent"},
        {"name": "m", **TARGET, "seed": "big"},
    ],
    "layers": [{"name": "m", "target": {"dims": {"num_hidden_layers": 1}}, "init": "layers", "seed": "parent"}],
    "random config": [{"name": "m", "config": {"model_type": "qwen3"}}],
    "random target": [{"name": "m", **TARGET, "init": "random"}],
    "checkpoint": [{"name": "m", "student": f"{STUDENT}@{COMMIT}"}],
    "cut from a random one": [{"name": "r", "config": {"model_type": "qwen3"}}, {"name": "m", **TARGET, "seed": "r"}],
    "cut from a checkpoint": [{"name": "s", "student": f"{STUDENT}@{COMMIT}"}, {"name": "m", **TARGET, "seed": "s"}],
}


def made(start="cut from the parent", *, distill=None, parent=None, copy_of=None, num_trained=512, **sections):
    """The provenance of member m (or of a copy) under a recipe of these sections."""
    counts = (
        "examples" if sections.get("task") in ("text_classification", "image_classification", "embedding") else "tokens"
    )
    recipe = Recipe.model_validate({
        "name": "f", "parent": parent or {"model": PARENT, "revision": COMMIT},
        "data": {"source": "files", "train": "t.jsonl"}, "members": STARTS[start],
        "distill": {counts: 512} | (distill or {}), **sections,
    })  # fmt: skip
    members = [
        SimpleNamespace(
            name=one.name,
            member=one,
            seed=one.seed if one.start in ("prune", "layers") else "",
            sized=SimpleNamespace(config=SimpleNamespace(model_type=one.config.get("model_type", "llama"))),
        )
        for one in recipe.members
    ]
    reference = f"{PARENT}@{COMMIT}" if parent is None else parent if isinstance(parent, str) else "f"
    tokens = Tokens(hop=num_trained, cumulative=1024)
    if copy_of is None:
        return provenance_of(recipe, members, members[-1], reference, tokens)
    copy = RoundedCopy(name=f"{copy_of}-int8", kind="int8", rounded=None, evaluation=None, num_tokens=num_trained)
    return provenance_of_copy(recipe, members, copy_of, copy, reference, tokens)


def origins(provenance):
    return {origin["name"].partition("@")[0] for origin in provenance.origins}


@pytest.mark.parametrize(
    ("start", "said", "base", "licence", "tagged"),
    [
        ("cut from the parent", "cut from `parent`, and recovered", PARENT, "apache-2.0", ["pruned", "distilled"]),
        ("cut from a member", "cut from `big`, and recovered", PARENT, "apache-2.0", ["pruned", "distilled"]),
        ("layers", "made of whole layers of `parent`, and recovered", PARENT, "apache-2.0", ["pruned", "distilled"]),
        ("random config", "begun with random weights (`qwen3`), and trained", "", "", ["distilled"]),
        ("random target", "begun with random weights (`llama`), and trained", "", "", ["distilled"]),
        ("checkpoint", f"begun as the existing model `{STUDENT}@{COMMIT}`, not cut", STUDENT, "gemma", ["distilled"]),
        ("cut from a random one", "cut from `r`", "", "", ["pruned", "distilled"]),
        ("cut from a checkpoint", "cut from `s`", STUDENT, "gemma", ["pruned", "distilled"]),
    ],
)
def test_every_start_names_the_model_its_weights_come_from_and_no_other(start, said, base, licence, tagged):
    provenance = made(start)
    assert said in sentence(provenance) and "by distillation from `org/parent@" in sentence(provenance)
    front = _front(provenance, "AutoModelForCausalLM")
    assert front.get("base_model", "") == base and front.get("license", "") == licence
    assert front.get("base_model_relation", "") == ("finetune" if base else "")
    assert tags(provenance) == ["cascade", *tagged]
    assert origins(provenance) == {PARENT, *([base] if base else [])}  # the parent has taught it
    assert "existing" not in sentence(provenance) or start == "checkpoint"
    assert "1,024 along its chain" in sentence(provenance) or "cut" not in start


GEN_PARENT = {"generate": {"stdlib": True}, **GENERATED}
GEN_WRITER = {"generate": {"stdlib": True, "teacher": f"{WRITER}@{COMMIT}"}, **GENERATED}
GEN_ENDPOINT = {"generate": {"stdlib": True, "endpoint": ENDPOINT}, **GENERATED}


@pytest.mark.parametrize(
    ("teacher", "sections", "said", "name", "taught"),
    [
        ("parent", {}, f"by distillation from `{PARENT}@{COMMIT}` on 512", f"{PARENT}@{COMMIT}", {PARENT}),
        ("parent", GEN_ENDPOINT, "with text written by `big-one` on 512", f"{PARENT}@{COMMIT}", {PARENT, "big-one at https://h.example/v1"}),
        ("text", GEN_PARENT, f"by cross-entropy with text written by `{PARENT}@", f"{PARENT}@{COMMIT}", {PARENT}),
        ("text", GEN_WRITER, f"by cross-entropy with text written by `{WRITER}@", f"{WRITER}@{COMMIT}", {WRITER}),
        ("text", GEN_ENDPOINT, "by cross-entropy with text written by `big-one`", "big-one", {"big-one at https://h.example/v1"}),
        ("text", {}, "by cross-entropy with the text alone", "", set()),
        ("logprobs", GEN_ENDPOINT, "by the log-probabilities that `big-one` gave for its own text", "big-one", {"big-one at https://h.example/v1"}),
    ],
)  # fmt: skip
def test_every_teacher_is_the_one_that_taught(teacher, sections, said, name, taught):
    provenance = made("random config", distill={"teacher": teacher}, **sections)
    assert said in sentence(provenance) and provenance.teacher == name
    assert origins(provenance) == taught
    assert ("distilled" in tags(provenance)) == bool(name)
    cut = made(distill={"teacher": teacher}, **sections)
    assert origins(cut) == taught | {PARENT} and cut.licence == "apache-2.0"
    if teacher != "parent":
        assert "distillation from" not in sentence(cut)


def test_shares_of_the_loss_and_text_of_its_own_are_said():
    provenance = made(distill={"cross_entropy_weight": 0.25, "on_policy": {"fraction": 0.5}})
    assert "in part on text of its own, and by cross-entropy with the text (25% of the loss)" in sentence(provenance)


@pytest.mark.parametrize(
    ("task", "counts"),
    [
        ("language", "tokens"),
        ("masked_language", "tokens"),
        ("text_classification", "examples"),
        ("image_classification", "examples"),
        ("embedding", "examples"),
    ],
)
def test_every_task_counts_what_it_is_trained_on(task, counts):
    start = "random config" if task == "image_classification" else "cut from the parent"
    assert f"on 512 {counts}" in sentence(made(start, task=task))


FINISH = [{"quantise": "int8"}]


@pytest.mark.parametrize(
    ("copy_of", "num_trained", "relation", "said"),
    [
        ("parent", 0, "quantized", "`parent` with weights in int8 (torchao), as they are"),
        ("parent", 64, "quantized", "`parent` with weights in int8 (torchao), and trained so by distillation from `org/parent@"),
        ("m", 0, "finetune", "`m` with weights in int8 (torchao), as they are"),
        ("m", 64, "finetune", "`m` with weights in int8 (torchao), and trained so by distillation from `org/parent@"),
    ],
)  # fmt: skip
def test_copies_in_fewer_bits_are_quantised_only_where_they_are_the_parent_itself(copy_of, num_trained, relation, said):
    provenance = made(copy_of=copy_of, num_trained=num_trained, finish=FINISH)
    assert said in sentence(provenance) and base_model_relation(provenance) == relation
    assert provenance.base_model == PARENT and provenance.licence == "apache-2.0" and origins(provenance) == {PARENT}
    assert ("pruned" in tags(provenance)) == (copy_of == "m") and "int8" in tags(provenance)


def test_a_copy_has_what_its_member_has_learned_and_comes_from():
    provenance = made("checkpoint", copy_of="m", num_trained=0, finish=FINISH)
    assert (
        provenance.licence == "gemma" and provenance.base_model == STUDENT and origins(provenance) == {STUDENT, PARENT}
    )
    provenance = made("random config", copy_of="m", num_trained=0, finish=FINISH)
    assert not provenance.base_model and not provenance.licence and base_model_relation(provenance) == ""
    provenance = made(copy_of="m", num_trained=0, finish=FINISH, distill={"teacher": "text"}, **GEN_WRITER)
    assert origins(provenance) == {PARENT, WRITER}


def test_a_parent_that_is_no_hub_model_is_no_base_model(tiny_parent):
    for parent in (str(tiny_parent), "builtin:pico-python"):
        provenance = made(parent=parent)
        assert provenance.base_model == "" and provenance.parent == Path(parent).name
    section = {"pretrain": {"config": {}, "tokenizer": {"vocab_size": 300}, "tokens": 5}}
    assert made(parent=section).base_model == "" and made(parent=section).licence == ""


def test_terms_concern_a_student_by_its_own_start_and_not_by_its_siblings(monkeypatch):
    monkeypatch.setitem(LICENCES, PARENT, "llama2")
    assert made("cut from the parent").origins[0]["terms"] == ""
    assert "may not be used to improve other" in made("random config").origins[0]["terms"]


def test_a_published_recipe_has_names_instead_of_paths_and_keeps_its_keys(tiny_parent, tmp_path):
    path = tmp_path / "secret-place" / "r.yaml"
    path.parent.mkdir()
    (path.parent / "model").symlink_to(tiny_parent)
    for name in ("t.jsonl", "p.jsonl", "q.txt"):
        (path.parent / name).write_text("")
    path.write_text(
        "name: r\nparent: ./model\noutput: deep/out\ndata: {source: generated, production: ../secret-place/prod.jsonl}\n"
        "members: [{name: s, student: ./model}]\n"
        "generate: {prompts: p.jsonl, text: q.txt, endpoint: {url: 'http://127.0.0.1:1/v1', model: /srv/secret-place/m}}\n"
        "distill: {tokens: 512, teacher: text, cache: {folder: ./kept}}\nevaluate: {task_folders: ./tasks}\n"
    )
    recipe = load_recipe(path)
    whole, public = resolved_recipe(recipe, []), resolved_recipe(recipe, [], public=True)
    assert "secret-place" in json.dumps(whole) and "secret-place" not in json.dumps(public)
    assert not re.search(r'"[./~]', json.dumps(public))
    assert public["distill"]["cache"]["folder"] == "kept" and public["data"]["production"] == ["prod.jsonl"]
    assert public["generate"]["endpoint"]["model"] == "m" and public["output"] == "out"

    def keys(value):
        return {key: keys(part) for key, part in value.items()} if isinstance(value, dict) else None

    assert keys(whole) == keys(public)


def test_hub_ids_and_built_in_models_stay_as_they_are_in_a_published_recipe():
    recipe = load_recipe(ROOT / "recipes" / "quickstart.yaml", [f"members.0={{name: s, student: {STUDENT}@{COMMIT}}}"])
    public = resolved_recipe(recipe, [], public=True)
    assert (
        public["parent"]["model"] == "builtin:pico-python" and public["members"][0]["student"] == f"{STUDENT}@{COMMIT}"
    )


def test_nothing_that_is_published_names_a_folder_of_this_machine(tiny_family, tiny_parent, recipe_folder):
    for path in (tiny_family / "members").rglob("*"):
        if path.is_file():
            text = path.read_bytes()
            for place in (tiny_family, tiny_parent, recipe_folder):
                assert str(place).encode() not in text, path


def test_card_record_and_report_say_the_same(tiny_family):
    records = load_provenances(tiny_family)
    assert list(records) == ["big", "small"]
    report = (tiny_family / "report.md").read_text()
    for name, record in records.items():
        found = Provenance(**record | {"origins": tuple(record["origins"])})
        lineage = json.loads((tiny_family / "members" / name / "cascade.json").read_text())
        card = (tiny_family / "members" / name / "README.md").read_text()
        assert sentence(found) in card and lesson(found).replace("`", "") in report
        assert lineage["teacher"] == found.teacher and lineage["parent"] == found.parent == "tiny-parent0"
        assert "base_model" not in card.split("---")[1]
    assert "## Where they come from" in report
    assert [line[0] for line in provenance_table(list(records.values()))] == ["", "big", "small"]
    keys = {"name", "parent", "parent_sha256", "teacher", "seed", "auto_class", "tokens", "origins", "stages", "plan"}
    assert keys <= lineage.keys()


def test_a_report_of_members_that_an_older_version_published_goes_without(tiny_family, tmp_path):
    folder = tmp_path / "members" / "old"
    folder.mkdir(parents=True)
    (folder / "cascade.json").write_text('{"stages": {}}')
    assert load_provenances(tmp_path) == {} and len(load_family(tiny_family)["rows"]) > 2
    assert {field.name for field in dataclasses.fields(Provenance)} >= {"derived_from", "taught_by", "counts"}
