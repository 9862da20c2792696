"""Heads whose outputs are no logits of exclusive classes are not distilled as if they were."""

import json

import pytest
from test_classification import encoder, reviews  # noqa: F401
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

from cascade.models.architecture.model_class import as_classifier, require_masked, require_single_label
from cascade.planning.preview import preview
from cascade.recipe.load import load_recipe
from cascade.runtime.errors import UserError

SIZES = {"vocab_size": 17, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 32}  # fmt: skip


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_a_parent_or_student_of_many_labels_or_of_a_number_is_refused_by_the_plan(
    reviews, encoder, tmp_path, problem  # noqa: F811
):  # fmt: skip
    labels = {"id2label": {0: "negative", 1: "positive"}, "label2id": {"negative": 0, "positive": 1}}
    config = BertConfig(**SIZES, **labels)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "parent")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "parent" / name).write_bytes((encoder / name).read_bytes())
    path = tmp_path / "parent" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"problem_type": problem}))
    recipe = load_recipe(reviews, [f"parent={tmp_path / 'parent'}", "members=[]", "finish=[]"])
    message = f"parent: .*: problem_type: {problem}; task text_classification is for one class per text"
    with pytest.raises(UserError, match=message):
        preview(recipe, tmp_path / "run")
    student = f"members=[{{name: other, student: {tmp_path / 'parent'}}}]"
    with pytest.raises(UserError, match=f"members: other: problem_type: {problem}"):
        preview(load_recipe(reviews, [student, "finish=[]"]), tmp_path / "run")


def test_a_head_of_one_number_is_refused_and_two_classes_are_not():
    with pytest.raises(UserError, match=r"parent: num_labels: 1, which is a number to transformers \(regression\)"):
        require_single_label(BertConfig(**SIZES, num_labels=1), "text_classification", "parent")
    for problem in (None, "single_label_classification"):
        require_single_label(BertConfig(**SIZES, problem_type=problem), "text_classification", "parent")


def test_a_new_head_forgets_what_the_earlier_head_was_for():
    config = BertConfig(**SIZES, problem_type="multi_label_classification")
    assert (
        as_classifier(config, "text_classification", ["a", "b"], "parent").problem_type == "single_label_classification"
    )
    assert as_classifier(BertConfig(**SIZES), "text_classification", ["a", "b"], "parent").problem_type is None


def test_a_masked_model_that_reads_one_side_alone_is_refused():
    config = BertForMaskedLM(BertConfig(**SIZES)).config
    config.architectures = ["BertForMaskedLM"]
    require_masked(config, "parent")
    config.is_decoder = True
    with pytest.raises(UserError, match="is_decoder: true: it guesses a hidden token by what stands before it alone"):
        require_masked(config, "parent")
