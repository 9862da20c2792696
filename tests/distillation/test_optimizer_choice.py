"""Which optimizer `distill.optimizer: auto` comes to, and what Muon's steps cost."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from cascade.distillation.optimizer import build_optimizer, orthogonalisation_flops
from cascade.distillation.range_test import usual_rate
from cascade.planning.estimates import optimizer_of
from cascade.recipe.schema import Recipe
from cascade.runtime import ranks


def config(hidden_size=64, intermediate_size=160, **options):
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300}
    return LlamaConfig(hidden_size=hidden_size, intermediate_size=intermediate_size, head_dim=16, **sizes, **options)


def recipe(**distill):
    return Recipe.model_validate(
        {
            "name": "r",
            "parent": "builtin:pico-python",
            "data": {"source": "stdlib", "block_size": 128},
            "distill": {"tokens": 10_000} | distill,
        }
    )


def test_a_step_of_muon_costs_the_counted_operations():
    model = LlamaForCausalLM(config())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer = build_optimizer("muon", model, 1e-3, 0.0)
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    assert orthogonalisation_flops(model.config) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_a_language_model_is_recovered_with_muon_where_its_rate_is_searched_for():
    assert optimizer_of(recipe(), config(), config()) == "muon"


def test_a_rate_that_is_given_is_taken_with_adamw():
    assert optimizer_of(recipe(learning_rate=3e-3), config(), config()) == "adamw"
    assert optimizer_of(recipe(learning_rate=3e-3, optimizer="muon"), config(), config()) == "muon"


def test_wide_matrices_and_few_tokens_a_step_leave_adamw():
    wide = config(hidden_size=1024, intermediate_size=4096)
    assert optimizer_of(recipe(batch_size=1), wide, wide) == "adamw"
    assert optimizer_of(recipe(batch_size=256), wide, wide) == "muon"


def test_several_processes_take_adamw(monkeypatch):
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    assert optimizer_of(recipe(), config(), config()) == "adamw"


def test_classifiers_take_adamw():
    data = {"source": "files", "train": ["a.jsonl"], "heldout": ["b.jsonl"], "label_field": "label"}
    section = {"name": "r", "parent": "builtin:pico-python", "task": "text_classification", "data": data}
    made = Recipe.model_validate(section | {"distill": {"examples": 100}})
    assert optimizer_of(made, config(), config()) == "adamw"


def test_the_search_for_muons_rate_begins_higher_and_a_longer_training_takes_what_it_finds():
    assert usual_rate(8, "muon") == pytest.approx(4 * usual_rate(8, "adamw"))
    assert usual_rate(5000, "muon") == usual_rate(8, "muon") and usual_rate(5000) > 1.2 * usual_rate(8)
