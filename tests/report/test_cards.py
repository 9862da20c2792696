"""A card says what is true of its model, for every kind of start, teacher and task, and nothing that is not."""

import dataclasses
import itertools
import json
import re

import pytest
import yaml

from cascade.report.card import member_card
from cascade.report.provenance import Provenance
from cascade.report.records import Cost, Losses, Metric, Row, StageLosses, Tokens, load_family

PARENT, WRITER, STUDENT = "org/parent@0123", "big-one", "org/student@4567"
DIMS = {"num_hidden_layers": 2, "hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64}  # fmt: skip
ORIGINS = {
    PARENT: {"name": PARENT, "licence": "apache-2.0", "terms": ""},
    STUDENT: {"name": STUDENT, "licence": "gemma", "terms": "its terms go along"},
    WRITER: {"name": WRITER, "licence": "", "terms": "output may not be used to compete"},
}

STARTS = {
    "prune": {"start_from": "parent", "derived_from": "parent", "base_model": "org/parent", "licence": "apache-2.0"},
    "layers": {"start_from": "parent", "derived_from": "parent", "base_model": "org/parent", "licence": "apache-2.0"},
    "random": {"start_from": "qwen3", "derived_from": "random", "base_model": "", "licence": ""},
    "checkpoint": {
        "start_from": STUDENT, "derived_from": "checkpoint", "base_model": "org/student", "licence": "gemma",
    },
}  # fmt: skip
START_SENTENCES = {
    "prune": "cut from `parent`, and recovered",
    "layers": "made of whole layers of `parent`, and recovered",
    "random": "begun with random weights (`qwen3`), and trained",
    "checkpoint": f"begun as the existing model `{STUDENT}`, not cut, and trained",
}
TEACHERS = {
    "parent": {"taught_by": "parent", "teacher": PARENT, "text_by": ""},
    "parent on written text": {"taught_by": "parent", "teacher": PARENT, "text_by": WRITER},
    "text alone": {"taught_by": "text", "teacher": "", "text_by": ""},
    "written text": {"taught_by": "text", "teacher": WRITER, "text_by": WRITER},
    "log-probabilities": {"taught_by": "logprobs", "teacher": WRITER, "text_by": WRITER},
}
TEACHER_SENTENCES = {
    "parent": f"by distillation from `{PARENT}` on",
    "parent on written text": f"by distillation from `{PARENT}` with text written by `{WRITER}` on",
    "text alone": "by cross-entropy with the text alone on",
    "written text": f"by cross-entropy with text written by `{WRITER}` on",
    "log-probabilities": f"by the log-probabilities that `{WRITER}` gave for its own text on",
}
TASKS = {
    "causal": ("AutoModelForCausalLM", "text-generation", "tokens"),
    "masked": ("AutoModelForMaskedLM", "fill-mask", "tokens"),
    "text classification": ("AutoModelForSequenceClassification", "text-classification", "examples"),
    "image classification": ("AutoModelForImageClassification", "image-classification", "examples"),
    "embedding": ("AutoModel", "feature-extraction", "examples"),
}


def origins_of(start, teacher):
    """The models whose terms concern a member: those of its weights, of its teacher and of who wrote its text."""
    names = {PARENT: STARTS[start]["derived_from"] == "parent" or TEACHERS[teacher]["taught_by"] == "parent",
             STUDENT: start == "checkpoint", WRITER: bool(TEACHERS[teacher]["text_by"])}  # fmt: skip
    return tuple(ORIGINS[name] for name, concerned in names.items() if concerned)


def provenance_of(start="prune", teacher="parent", counts="tokens", **changes):
    values = STARTS[start] | TEACHERS[teacher] | {
        "name": "small", "parent": PARENT, "start": start, "text_share": 0.0, "on_policy": False, "counts": counts,
        "num_trained": 51_200, "num_cumulative": 81_920, "quantised": "", "origins": origins_of(start, teacher),
    }  # fmt: skip
    return Provenance(**values | changes)


def rows_of(start="prune", *, metric="loss"):
    """The parent's row and the member's, with figures that stand nowhere else."""
    metrics = [
        Metric(task="heldout", metric=metric, value=value, stderr=0.0123, retention=retention)
        for value, retention in ((1.875, None), (2.0625, 0.909))
    ]
    cut = start in ("prune", "layers")
    stages = StageLosses(
        cut=Losses(loss=7.125, kl_to_teacher=5.25) if cut else None,
        recovered=Losses(loss=2.375, kl_to_teacher=0.625),
    )
    parent = Row(
        name="parent", role="teacher", status="done", dims=DIMS, num_parameters=40_000, num_parameters_non_embedding=1,
        metrics=(metrics[0],),
    )  # fmt: skip
    member = Row(
        name="small", role="member", status="done", seed="parent" if cut else None, dims=DIMS, num_parameters=12_345,
        num_parameters_non_embedding=1, metrics=(metrics[1],), stages=stages,
        tokens=Tokens(hop=51_200, cumulative=81_920), cost=Cost(seconds=77.0, flops=3.5e12),
    )  # fmt: skip
    return parent, member


def card_of(start="prune", teacher="parent", task="causal", *, recipe="name: family\n", **changes):
    auto_class, _, counts = TASKS[task]
    provenance = provenance_of(start, teacher, counts, **changes)
    parent, member = rows_of(start)
    lineage = {"name": "small", "auto_class": auto_class, "provenance": provenance.record()}
    return member_card(member, parent, provenance, lineage, recipe)


def parts_of(card):
    """(the head as values, what is said before the first code block, sections by their heading)."""
    _, head, body = card.split("---\n", 2)
    sections = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", body, re.M | re.S))
    return yaml.safe_load(head), body.split("```")[0], sections


KINDS = list(itertools.product(STARTS, TEACHERS))


@pytest.mark.parametrize(("start", "teacher"), KINDS)
def test_a_card_says_how_its_model_was_begun_and_who_taught_it_and_nothing_of_other_kinds(start, teacher):
    _, summary, _ = parts_of(card_of(start, teacher))
    summary = " ".join(summary.split())
    assert START_SENTENCES[start] in summary and TEACHER_SENTENCES[teacher] in summary
    assert f"(31% of `{PARENT}`'s)" in summary and "12,345 parameters" in summary
    for other, sentence in START_SENTENCES.items():
        assert (sentence in summary) == (other == start)
    for other, sentence in TEACHER_SENTENCES.items():
        assert (sentence in summary) == (other == teacher)
    assert ("along its chain" in summary) == (start in ("prune", "layers"))
    assert summary.count("cut") == (start in ("prune", "checkpoint")) and ("not cut" in summary) == (
        start == "checkpoint"
    )


@pytest.mark.parametrize(("start", "teacher"), KINDS)
def test_a_cards_head_names_base_model_licence_and_tags_of_its_kind_alone(start, teacher):
    head, _, _ = parts_of(card_of(start, teacher))
    assert head.get("base_model", "") == STARTS[start]["base_model"]
    assert head.get("license", "") == STARTS[start]["licence"]
    assert ("base_model_relation" in head) == (start != "random")
    wanted = {"cascade", *(["pruned"] if start in ("prune", "layers") else [])}
    wanted |= {"distilled"} if TEACHERS[teacher]["teacher"] else set()
    assert set(head["tags"]) == wanted and head["library_name"] == "transformers"


@pytest.mark.parametrize(("start", "teacher"), KINDS)
def test_a_card_lists_the_licences_of_all_models_that_concern_it_and_of_no_other(start, teacher):
    _, _, sections = parts_of(card_of(start, teacher))
    concerned = {origin["name"] for origin in origins_of(start, teacher)}
    text = sections.get("Licences", "")
    assert ("Licences" in sections) == bool(concerned)
    for name, origin in ORIGINS.items():
        licence = f"`{origin['licence']}`" if origin["licence"] else "not found: look where the model comes from"
        assert (f"`{name}`: {licence}." in text) == (name in concerned)
        assert not origin["terms"] or (f"Terms: {origin['terms']}." in text) == (name in concerned)


@pytest.mark.parametrize("task", TASKS)
def test_a_card_shows_the_class_and_the_reader_of_its_task(task):
    auto_class, pipeline, counts = TASKS[task]
    head, _, _ = parts_of(card := card_of("checkpoint", task=task))
    code = re.search(r"```python\n(.*?)```", card, re.S)[1]
    compile(code, "card", "exec")
    assert head["pipeline_tag"] == pipeline and f'{auto_class}.from_pretrained(".")' in code
    assert ("AutoTokenizer" in code) == (task != "image classification")
    assert ("config.json is written for" in card) == (task != "image classification")
    assert f"on 51,200 {counts}" in card
    other = "tokens" if counts == "examples" else "examples"
    assert f"51,200 {other}" not in card


@pytest.mark.parametrize("start", STARTS)
def test_a_card_gives_the_figures_of_its_row_and_the_parents(start):
    _, _, sections = parts_of(card_of(start))
    assert re.search(r"\| parent \| 1\.875 ± 0\.012 \|", sections["Quality"])
    assert re.search(r"\| small \| 2\.062 ± 0\.012 \(91%\) \|", sections["Quality"])
    heading = "Cut and recovery" if start in ("prune", "layers") else "Training"
    table = sections[heading]
    assert "2.375" in table and "0.625" in table and "51,200" in table and "81,920" in table and "77.0" in table
    assert ("7.125" in table) == (start in ("prune", "layers"))


@pytest.mark.parametrize("start", ["random", "checkpoint"])
@pytest.mark.parametrize("task", TASKS)
def test_a_model_that_was_not_cut_has_no_heading_of_a_cut(start, task):
    assert not [heading for heading in parts_of(card_of(start, task=task))[2] if "ut" in heading.split()[0]]


def test_what_was_not_measured_is_left_empty_and_no_nothing_is_printed():
    parent, member = rows_of("random")
    bare = dataclasses.replace(member, stages=StageLosses(), cost=Cost(), metrics=(), tokens=Tokens())
    card = member_card(bare, parent, provenance_of("random", "text alone"), {"auto_class": "AutoModel"}, "name: f\n")
    assert "None" not in card and "nan" not in card.lower().replace("finance", "")


@pytest.mark.parametrize("trained", [0, 640])
@pytest.mark.parametrize("owner", ["parent", "small"])
def test_a_copy_in_fewer_bits_says_so_and_claims_a_training_only_if_it_had_one(owner, trained):
    provenance = dataclasses.replace(
        provenance_of(), start="copy", start_from=owner, quantised="int8", num_trained=trained,
        taught_by="parent" if trained else "none", teacher=PARENT if trained else "",
    )  # fmt: skip
    parent, member = rows_of()
    copy = dataclasses.replace(member, name=f"{owner}-int8", role="quantised", status="int8", stages=StageLosses())
    head, summary, sections = parts_of(
        member_card(copy, parent, provenance, {"auto_class": "AutoModelForCausalLM"}, "")
    )
    assert f"`{owner}` with weights in int8 (torchao)" in summary
    assert ("as they are" in summary) == (not trained) and ("distillation" in summary) == bool(trained)
    assert head["base_model_relation"] == ("quantized" if owner == "parent" else "finetune") and "int8" in head["tags"]
    assert ("distilled" in head["tags"]) == bool(trained) and ("pruned" in head["tags"]) == (owner != "parent")
    assert not {"Cut and recovery", "Training"} & set(sections) and "config.json is written for" not in summary


def test_shares_of_cross_entropy_and_text_of_its_own_are_said_only_where_they_are_there():
    summary = parts_of(card_of(text_share=0.25, on_policy=True))[1]
    assert "in part on text of its own" in summary and "25% of the loss" in summary
    summary = parts_of(card_of())[1]
    assert "of its own" not in summary and "of the loss" not in summary


@pytest.mark.parametrize("kind", ["sampled", "hidden", "none"])
def test_kept_targets_change_nothing_of_who_taught_and_stand_in_the_recipe(kind):
    recipe = f"name: family\ndistill:\n  cache: {{kind: {kind}}}\n"
    card = card_of(recipe=recipe)
    assert parts_of(card)[1] == parts_of(card_of())[1]
    assert f"cache: {{kind: {kind}}}" in parts_of(card)[2]["Recipe"]


def test_texts_from_outside_leave_neither_their_quotes_nor_their_block():
    evil = "x`](http://e.example) <script>\n---\n# Not a card"
    origin = {"name": evil, "licence": evil, "terms": ""}
    card = card_of("checkpoint", start_from=evil, base_model=evil, licence=evil, origins=(origin,),
                   recipe="name: f\n````\n# Not a card\n")  # fmt: skip
    head, summary, sections = parts_of(card)
    assert head["base_model"] == evil and head["license"] == evil
    assert "# Not a card\n" not in summary and "x`]" not in summary and "x'](http" in summary
    assert list(sections)[-1] == "Recipe" and card.count("````") == 2


def test_the_cards_of_a_family_say_what_its_rows_say(tiny_family):
    rows = {row["name"]: row for row in load_family(tiny_family)["rows"]}
    parent = rows["parent"]
    for name in ("big", "small"):
        row = rows[name]
        head, summary, sections = parts_of((tiny_family / "members" / name / "README.md").read_text())
        summary = " ".join(summary.split())
        assert (
            f"{row['num_parameters']:,} parameters ({row['num_parameters'] / parent['num_parameters']:.0%} of "
            in summary
        )
        assert f"cut from `{row['seed']}`, and recovered by distillation from `tiny-parent0`" in summary
        assert f"on {row['tokens']['hop']:,} tokens ({row['tokens']['cumulative']:,} along its chain)" in summary
        assert head["tags"] == ["cascade", "pruned", "distilled"] and "license" not in head and "base_model" not in head
        for metric in row["metrics"]:
            assert f"{metric['value']:.4g}" in sections["Quality"]
        for stage in row["stages"].values():
            assert f"{stage['kl_to_teacher']:.3f}" in sections["Cut and recovery"]
        lineage = json.loads(sections["Lineage"].strip().removeprefix("```json\n").removesuffix("```"))
        assert lineage == json.loads((tiny_family / "members" / name / "cascade.json").read_text())
