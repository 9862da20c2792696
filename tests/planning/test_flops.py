"""FLOPs are those that torch counts, for a token of a block and for a whole example."""

import gzip
import json

import pytest
import torch
from conftest import make_config
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, AutoTokenizer, BertConfig, BertForMaskedLM, LlamaForSequenceClassification

from cascade.models.architecture.model_class import attends_causally, model_from_config
from cascade.models.checkpoint.load import BUILTIN_FOLDER
from cascade.planning.estimates import flops_of, stage_seconds, units_in
from cascade.planning.example_length import tokens_per_example
from cascade.recipe.schema import Recipe

BERT = {
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}


def counted(model, length):
    """FLOPs of one forward pass of a text of so many tokens; torch counts all of causal attention, too."""
    ids = torch.ones(1, length, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids)
    return counter.get_total_flops()


@pytest.fixture
def texts(tmp_path):
    """Texts of 4 to 40 words, and an encoder with a tokenizer."""
    with gzip.open(tmp_path / "t.jsonl.gz", "wt") as file:
        for number in range(60):
            file.write(json.dumps({"text": "value of " * (2 + number % 19), "label": number % 2}) + "\n")
    model = AutoModel.from_config(BertConfig(**BERT))
    model.save_pretrained(tmp_path / "encoder")
    AutoTokenizer.from_pretrained(BUILTIN_FOLDER / "pico-python").save_pretrained(tmp_path / "encoder")
    return tmp_path


def recipe_of(folder, task, **data):
    counts = "examples" if task in ("embedding", "text_classification") else "tokens"
    return Recipe.model_validate({
        "name": "f", "task": task, "parent": str(folder / "encoder"), "distill": {counts: 64},
        "data": {"source": "files", "train": str(folder / "t.jsonl.gz"), **data},
    })  # fmt: skip


def test_an_examples_flops_are_those_of_all_its_tokens(texts):
    recipe = recipe_of(texts, "embedding", max_length=64)
    model = AutoModel.from_pretrained(texts / "encoder", attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(texts / "encoder")
    lines = [json.loads(line) for line in gzip.open(texts / "t.jsonl.gz", "rt")]
    lengths = [len(tokenizer(line["text"]).input_ids) for line in lines]
    assert tokens_per_example(recipe) == pytest.approx(sum(lengths) / len(lengths), rel=0.1)  # of one of the splits
    length = round(tokens_per_example(recipe))
    assert flops_of(recipe, model.config) == pytest.approx(counted(model, length), rel=0.05)
    short = recipe_of(texts, "embedding", max_length=8)
    assert tokens_per_example(short) <= 8 and flops_of(short, model.config) < 0.5 * flops_of(recipe, model.config)


def test_a_classifiers_example_counts_as_an_encoders_does(texts):
    recipe = recipe_of(texts, "text_classification", max_length=64)
    config = make_config("llama", vocab_size=2048)
    model = LlamaForSequenceClassification(config)
    model.config.pad_token_id = 0
    model.config.architectures = ["LlamaForSequenceClassification"]
    model.set_attn_implementation("eager")
    length = round(tokens_per_example(recipe))
    all_of_attention = 4 * length**2 * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    wanted = counted(model, length) - all_of_attention / 2
    assert flops_of(recipe, model.config) == pytest.approx(wanted, rel=0.05)


@pytest.mark.parametrize("length", [32, 128])
def test_a_blocks_flops_are_those_that_torch_counts_of_models_that_look_both_ways(texts, length):
    model = BertForMaskedLM(BertConfig(**BERT))
    model.set_attn_implementation("eager")
    assert not attends_causally(model.config)
    recipe = recipe_of(texts, "masked_language", block_size=length)
    assert length * flops_of(recipe, model.config) == pytest.approx(counted(model, length), rel=0.02)


def test_a_causal_models_token_sees_half_of_its_block(texts):
    config = make_config("llama", vocab_size=256)
    model = model_from_config(config)
    model.set_attn_implementation("eager")
    assert attends_causally(config)
    ours = 64 * flops_of(recipe_of(texts, "language", block_size=64), config)
    all_of_attention = 4 * 64 * 64 * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    assert ours == pytest.approx(counted(model, 64) - all_of_attention / 2, rel=0.01)


def test_calibration_blocks_count_as_the_examples_that_they_hold(texts):
    recipe = recipe_of(texts, "embedding", max_length=64)
    assert units_in(recipe, 10) == pytest.approx(10 * 64 / tokens_per_example(recipe))
    assert units_in(recipe_of(texts, "language", block_size=32), 10) == 320
    seconds = stage_seconds(recipe, 1e9, 1e9, 1000, cut=True)
    assert seconds["statistics"] < seconds["distill"]
