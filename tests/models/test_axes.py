"""Axes found by size-probing: counts, names, and torch-pruning as a second opinion."""

import torch
from conftest import ARCHITECTURES, make_config, make_model
from hypothesis import given
from hypothesis import strategies as st

from cascade.models.architecture.sized import Sized

ALL = sorted(ARCHITECTURES)


@given(
    architecture=st.sampled_from(ALL),
    tied=st.booleans(),
    layers=st.integers(1, 4),
    groups=st.sampled_from([1, 2, 4]),
    per_group=st.sampled_from([1, 2, 3]),
    head_dim=st.sampled_from([4, 8, 12]),
    neurons=st.integers(5, 70),
    multiple=st.integers(1, 4),
)
def test_counted_parameters_equal_the_models_own(
    architecture, tied, layers, groups, per_group, head_dim, neurons, multiple
):
    config = make_config(
        architecture,
        tied=tied,
        num_hidden_layers=layers,
        num_attention_heads=groups * per_group,
        num_key_value_heads=groups,
        head_dim=head_dim,
        intermediate_size=neurons,
        hidden_size=12 * multiple * groups * per_group,
    )
    model = make_model_of(config)
    sized = Sized(config)
    counted = sum(parameter.numel() for parameter in model.parameters())
    vocabulary = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
    assert sized.num_parameters == counted
    assert sized.num_parameters_non_embedding == counted - sum(weight.numel() for weight in vocabulary)


def test_flops_per_token_count_each_matrix_product_twice():
    model = make_model("llama")
    sized = Sized(model.config)
    dims = sized.dims
    ids = torch.zeros(1, 16, dtype=torch.int64)
    from torch.utils.flop_counter import FlopCounterMode

    with (
        FlopCounterMode(display=False) as counter,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        model(input_ids=ids, use_cache=False)
    linear = sum(2 * m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    attention = 2 * 16 * dims.num_attention_heads * dims.head_dim * dims.num_hidden_layers
    assert sized.flops_per_token(16) == linear + attention
    # torch counts the whole square of attention scores; half of it lies above the causal diagonal.
    assert counter.get_total_flops() / 16 == linear + 2 * attention


def make_model_of(config):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config)
