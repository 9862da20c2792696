"""Which of the legal shapes of a size comes first."""

import itertools

import numpy as np
import pytest
from transformers import BertConfig, LlamaConfig

from cascade.models.architecture.axes import probe_axes
from cascade.models.architecture.dims import config_with_dims, dims_of
from cascade.pruning.size.shape import candidate_shapes, solve_shape
from cascade.pruning.size.target import Target

PARENT = LlamaConfig(
    vocab_size=512, hidden_size=64, intermediate_size=172, num_hidden_layers=5, num_attention_heads=8,
    num_key_value_heads=4, tie_word_embeddings=True, architectures=["LlamaForCausalLM"],
)  # fmt: skip


@pytest.mark.parametrize("share", [0.35, 0.6])
def test_the_stream_is_cut_less_than_the_neurons(share):
    dims, parent = solve_shape(PARENT, Target(params=share)), dims_of(PARENT)
    assert dims.hidden_size / parent.hidden_size > dims.intermediate_size / parent.intermediate_size
    assert dims.num_attention_heads * dims.head_dim <= 2 * dims.hidden_size


def test_a_chain_of_cuts_ends_in_the_shape_of_a_single_cut():
    seed = config_with_dims(PARENT, solve_shape(PARENT, Target(params=0.6)))
    alone = solve_shape(PARENT, Target(params=0.35))
    assert all(alone.as_dict()[name] <= size for name, size in dims_of(seed).as_dict().items())
    assert solve_shape(seed, Target(params=0.35), parent=PARENT) == alone


def test_a_seed_that_is_larger_than_the_parent_along_an_axis_has_its_shapes_in_order():
    deep = config_with_dims(PARENT, dims_of(PARENT).replace(hidden_size=32, intermediate_size=88))
    deep.num_hidden_layers = 8
    with np.errstate(all="raise"):
        shapes = list(itertools.islice(candidate_shapes(deep, Target(params=0.25), parent=PARENT), 200))
    assert shapes[0].hidden_size >= max(shape.hidden_size for shape in shapes[:20]) / 2
    assert 1 < shapes[0].num_hidden_layers <= 8


def test_key_value_heads_follow_where_few_query_heads_are_left():
    shapes = itertools.islice(candidate_shapes(PARENT, Target(params=0.1)), 400)
    few = [shape for shape in shapes if shape.num_key_value_heads < 4]
    assert few and all(shape.num_attention_heads <= 4 for shape in few)
    assert all(shape.num_attention_heads % shape.num_key_value_heads == 0 for shape in few)
    assert all(shape.num_attention_heads <= 2 * shape.num_key_value_heads for shape in few)


def test_an_encoder_whose_heads_fill_the_stream_is_not_narrowed_to_a_sliver():
    config = BertConfig(
        vocab_size=30_000, hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12,
        architectures=["BertForMaskedLM"],
    )  # fmt: skip
    dims = solve_shape(config, Target(params_non_embedding=0.5))
    assert probe_axes(config).heads_fill_hidden and dims.hidden_size >= 0.6 * 384
    assert 2 <= dims.intermediate_size / dims.hidden_size <= 6


def test_heads_and_groups_of_every_row_fit_together_and_none_is_left_out():
    from cascade.pruning.size.shape import _grid, _possible_heads

    seed, values = dims_of(PARENT), {"num_attention_heads": [8, 4, 2, 1], "num_key_value_heads": [4, 2, 1]}
    pairs = _possible_heads(values, seed, groups_alone=False)
    assert set(pairs) == {(8, 4), (4, 4), (4, 2), (2, 2), (2, 1), (1, 1)}
    assert set(_possible_heads(values, seed, groups_alone=True)) == set(pairs)
    columns = _grid({"num_hidden_layers": [5, 4]} | values, pairs)
    rows = set(zip(*(columns[name].tolist() for name in ("num_hidden_layers", *values)), strict=True))
    assert rows == {(layers, *pair) for layers in (5, 4) for pair in pairs}
