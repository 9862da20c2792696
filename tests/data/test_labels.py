"""Labels: a class is what occurs, has one name however it is written, and is never read as another."""

import json
from dataclasses import dataclass, field

import pytest
from conftest import ROOT, SHARED, needs_shared
from test_classification import encoder, reviews, write_reviews  # noqa: F401
from transformers import BertConfig, BertForSequenceClassification

from cascade.data.examples import LabelledData, class_names, read_examples, text_examples
from cascade.data.labels import is_number, label_of
from cascade.data.sources import TextData
from cascade.pipeline.run import run_recipe
from cascade.planning.classifier import numbered_classes
from cascade.planning.inputs import classes_of
from cascade.planning.preview import preview
from cascade.recipe.load import load_recipe
from cascade.runtime.errors import UserError


def labelled(path, labels, rows=300):
    path.write_text(
        "".join(json.dumps({"text": f"text {n}", "label": labels[n % len(labels)], "x": n}) + "\n" for n in range(rows))
    )
    return LabelledData(TextData("files", {"train": (str(path),)}), False)


@dataclass
class Config:
    """As much of a classifier's config as matters here."""

    id2label: dict
    label2id: dict = field(default_factory=dict)

    @property
    def num_labels(self):
        return len(self.id2label)


def config_of(*names):
    return Config(dict(enumerate(names)), {name: number for number, name in enumerate(names)})


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ([1, 2, 3, 4], ["1", "2", "3", "4"]),
        ([101, 205], ["101", "205"]),
        ([0.0, 1.0, 0, 1], ["0", "1"]),
        (["1", 1, "0", 0.0], ["0", "1"]),
        (["01", "02", "10"], ["01", "02", "10"]),
        ([2, 10, 0], ["0", "2", "10"]),
        ([True, False], ["False", "True"]),
        (["sport", "arts"], ["arts", "sport"]),
        (["0.0", "1.0"], ["0.0", "1.0"]),
        (["²", "٣"], ["²", "٣"]),
    ],
)
def test_the_classes_are_the_labels_that_occur(tmp_path, labels, classes):
    assert class_names(labelled(tmp_path / "a.jsonl", labels)) == classes


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, -1], r"a.jsonl:3: the label -1 marks a row without a label .* data.unlabelled"),
        (["0", "1", "-1"], r"a.jsonl:3: the label -1 marks a row without a label"),
        ([-1.0, 1.0], r"a.jsonl:1: the label -1 marks"),
        ([0, 1, 0.5], r"a.jsonl:3: the label 0.5 is no whole number"),
        ([0, None], r"a.jsonl:2: has no label; files without labels go into data.unlabelled"),
        ([0, float("nan")], r"a.jsonl:2: has no label"),
        ([0, ""], r"a.jsonl:2: has no label"),
        ([0, [1]], r"a.jsonl:2: the label \[1\] is neither a name nor a number"),
        ([1, "01"], r"the labels '1' \(.*a.jsonl:\d+\) and '01' \(.*a.jsonl:\d+\) look like one class"),
        (["1.0", 1], r"the labels '1.0' .* and '1' .* look like one class"),
        (["good", " good"], r"the labels 'good' .* and ' good' .* look like one class"),
    ],
)
def test_a_label_that_may_be_read_otherwise_than_meant_is_named_with_its_row(tmp_path, labels, message):
    with pytest.raises(UserError, match=message):
        class_names(labelled(tmp_path / "a.jsonl", labels))


def test_a_row_that_lacks_the_label_among_others_is_named(tmp_path):
    data = labelled(tmp_path / "a.jsonl", [0, 1])
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write('{"text": "without"}\n')
    with pytest.raises(UserError, match=r"a.jsonl:301: has no label"):
        class_names(data)


def test_a_row_without_a_text_among_many_is_left_out(tmp_path):
    data = labelled(tmp_path / "a.jsonl", [0, 1])
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write('{"text": null, "label": 1}\n')
    bad = data.text.bad_row_counter()
    read_examples(data, "train", bad)
    assert [row["place"] for row in bad.named()] == [f"{tmp_path}/a.jsonl:301"]


def test_a_label_of_another_split_that_training_lacks_is_named_with_its_row(tmp_path, encoder):  # noqa: F811
    from transformers import BertTokenizerFast

    labelled(tmp_path / "a.jsonl", [0, 1])
    labelled(tmp_path / "b.jsonl", [0, 1, 2])
    files = {"train": (str(tmp_path / "a.jsonl"),), "selection": (str(tmp_path / "b.jsonl"),)}
    raw = read_examples(LabelledData(TextData("files", files), False), "selection")
    with pytest.raises(UserError, match=r"b.jsonl:3: the label '2' is none of the 2 classes 0, 1"):
        text_examples(raw, ["0", "1"], BertTokenizerFast.from_pretrained(encoder), 8)


@pytest.mark.parametrize("split", ["selection", "heldout"])
def test_the_plan_and_a_run_before_its_first_stage_find_a_label_that_training_lacks(reviews, tmp_path, split):  # noqa: F811
    write_reviews(tmp_path / "a.jsonl", 60, seed=3)
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write('{"text": "good film", "label": "mixed"}\n')
    recipe = load_recipe(reviews, [f"data.{split}={tmp_path / 'a.jsonl'}"])
    for start in (preview, lambda recipe, folder: run_recipe(recipe, output=folder)):
        with pytest.raises(
            UserError, match=r"a.jsonl:61: the label 'mixed' is none of the 2 classes negative, positive"
        ):
            start(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_parents_classes_are_met_by_their_names_or_by_their_places():
    assert numbered_classes(config_of("negative", "positive"), ["negative", "positive"]) == ["negative", "positive"]
    assert numbered_classes(config_of("positive", "negative"), ["negative", "positive"]) == ["positive", "negative"]
    assert numbered_classes(config_of("LABEL_0", "LABEL_1"), ["0", "1"]) == ["0", "1"]
    assert numbered_classes(config_of("a", "b", "c"), ["0", "2"]) == ["0", "1", "2"]  # 2 is still the third
    assert numbered_classes(config_of("0", "1", "2"), ["0", "2"]) == ["0", "1", "2"]
    assert numbered_classes(config_of("1", "0"), ["0", "1"]) == ["1", "0"]  # by name


@pytest.mark.parametrize(
    ("config", "classes", "message"),
    [
        (config_of("World", "Sports", "Business", "Sci"), ["1", "2", "3", "4"], "the data 4 .*: count from 0"),
        (config_of("a", "b", "c", "d"), ["1", "2", "4"], r"the data 3 \(1, 2, 4\).*4 would be class 5: count from 0"),
        (config_of("a", "b"), ["3", "7"], r"the data 2 \(3, 7\). Write the labels as the parent does"),
        (config_of("LABEL_0"), ["0", "1"], "one output: it is a regression, which this task does not do"),
        (config_of("a", "b", "c"), ["0", "1"], r"parent: 3 classes \(a, b, c\), the data 2"),
        (config_of("LABEL_0", "LABEL_1"), ["negative", "positive"], "its classes are LABEL_0, LABEL_1; the data's"),
        (config_of("1", "2"), ["0", "1"], "Whether a number is a name or a place there cannot be told"),
        (config_of("a", "a"), ["0", "1"], "Two of the parent's have one name"),
        (Config({0: "neg", 1: "pos"}, {"neg": 1, "pos": 0}), ["neg", "pos"], "contradicts itself"),
    ],
)
def test_labels_that_a_parents_classes_do_not_meet_plainly_are_refused(config, classes, message):
    with pytest.raises(UserError, match=message):
        numbered_classes(config, classes)


def test_the_plan_says_which_classes_of_the_parent_numbers_are(reviews, tmp_path):  # noqa: F811
    names = {0: "negative", 1: "positive"}
    config = BertConfig(vocab_size=17, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                        max_position_embeddings=32, id2label=names, label2id={v: k for k, v in names.items()})  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(tmp_path / "parent")
    for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        source = load_recipe(reviews).parent.model
        (tmp_path / "parent" / name).write_bytes((ROOT / source / name).read_bytes())
    for split in ("train", "selection", "heldout"):
        labelled(tmp_path / f"{split}.jsonl", [0, 1])
        rows = (tmp_path / f"{split}.jsonl").read_text().replace('"text ', f'"{split} ')
        (tmp_path / f"{split}.jsonl").write_text(rows)
    changes = ["members=[]", "finish=[]", "baselines=[]", "data.unlabelled=[]", f"parent={tmp_path / 'parent'}"]
    changes += [f"data.{split}={tmp_path / split}.jsonl" for split in ("train", "selection", "heldout")]
    found = preview(load_recipe(reviews, changes), tmp_path / "run")
    assert found["data"]["labels_read"] == "0 is negative, 1 is positive"
    assert found["data"]["classes"] == ["0", "1"]


def test_numbers_are_told_from_names_by_how_they_are_written():
    assert [is_number(name) for name in ("0", "7", "10", "01", "-1", "1.0", "²", "")] == [True] * 3 + [False] * 5
    assert label_of(2**70, "x") == str(2**70) and label_of(3.0, "x") == "3"


@needs_shared
def test_shipped_recipes_have_the_classes_that_they_always_had():
    folder = SHARED / "classification"
    sst2 = load_recipe(ROOT / "recipes" / "sst2.yaml")
    news = sst2.data.model_copy(update={"train": [str(folder / "ag_news_small" / "train.jsonl.gz")], "selection": []})
    assert classes_of(sst2) == ("0", "1")
    assert classes_of(sst2.model_copy(update={"data": news})) == ("0", "1", "2", "3")
    assert classes_of(load_recipe(ROOT / "recipes" / "digits.yaml")) == tuple("0123456789")
