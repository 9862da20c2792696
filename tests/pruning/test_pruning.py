"""The cut: pruned equals silenced, nothing else changes, illegal targets are refused."""

import math

import pytest
import torch
import transformers
from conftest import ARCHITECTURES, make_blocks, make_config, make_model
from hypothesis import given
from hypothesis import strategies as st

from cascade.models.architecture.axes import probe_axes
from cascade.models.architecture.dims import config_with_dims, dims_of
from cascade.models.architecture.sized import Sized
from cascade.pruning.choose import plan_pruning
from cascade.pruning.cut import prune
from cascade.pruning.importance.scores import score_importance
from cascade.pruning.importance.statistics import collect_statistics
from cascade.pruning.plan import load_plan, save_plan
from cascade.pruning.proof import prove_cuts, random_scores, silence, silenced_difference
from cascade.pruning.size.shape import TOLERANCES, legal_values, solve_shape
from cascade.pruning.size.target import Target
from cascade.runtime.errors import UserError

ALL = sorted(ARCHITECTURES)


@given(architecture=st.sampled_from(ALL), tied=st.booleans(), seed=st.integers(0, 999))
def test_a_plan_that_keeps_everything_gives_bitwise_equal_weights(architecture, tied, seed):
    model = make_model(architecture, tied=tied, seed=seed)
    pruned = prune(model, plan_pruning(random_scores(model, seed=seed), model.config, dims_of(model.config)))
    before, after = model.state_dict(), pruned.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@given(
    architecture=st.sampled_from(ALL),
    tied=st.booleans(),
    layers=st.integers(1, 3),
    groups=st.sampled_from([1, 2, 4, 8]),
    kept_share=st.sampled_from([0.25, 0.5, 1.0]),
    neurons=st.integers(1, 40),
    seed=st.integers(0, 999),
)
def test_pruned_layers_heads_and_neurons_equal_silenced_ones(
    architecture, tied, layers, groups, kept_share, neurons, seed
):
    model = make_model(architecture, tied=tied, num_key_value_heads=groups, seed=seed)
    whole_heads = groups == 8
    per_group = max(1, round(kept_share * 8 / groups))
    heads = max(1, round(8 * kept_share)) if whole_heads else groups * per_group
    target = dims_of(model.config).replace(
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=neurons,
        num_key_value_heads=heads if whole_heads else groups,
    )
    plan = plan_pruning(random_scores(model, seed=seed), model.config, target)
    assert silenced_difference(model, plan, seed=seed) < 1e-6


@given(
    architecture=st.sampled_from(["llama", "mistral", "qwen2"]),
    tied=st.booleans(),
    hidden=st.sampled_from([8, 16, 24, 40]),
    seed=st.integers(0, 999),
)
def test_a_hidden_cut_is_exact_when_the_removed_channels_carry_nothing(architecture, tied, hidden, seed):
    model = make_model(architecture, tied=tied, seed=seed)
    plan = plan_pruning(
        random_scores(model, seed=seed), model.config, dims_of(model.config).replace(hidden_size=hidden)
    )
    assert silenced_difference(model, plan, seed=seed) < 5e-6


def test_a_hidden_cut_is_exact_to_the_shared_epsilon_where_head_norms_use_it_too():
    # Qwen3's q and k norms read the same epsilon, so it cannot follow the hidden size: off by about epsilon / energy.
    model = make_model("qwen3")
    plan = plan_pruning(random_scores(model), model.config, dims_of(model.config).replace(hidden_size=24))
    assert plan.target_config["rms_norm_eps"] == model.config.rms_norm_eps
    assert silenced_difference(model, plan) < 1e-4


@pytest.mark.parametrize("architecture", ALL)
def test_measured_norm_correction_equals_the_exact_one_when_removed_channels_carry_nothing(architecture):
    model = make_model(architecture)
    target = dims_of(model.config).replace(hidden_size=24)
    scores = random_scores(model)
    exact = plan_pruning(scores, model.config, target)
    silenced = silence(model, exact)
    measured = plan_pruning(scores, model.config, target, statistics=collect_statistics(silenced, make_blocks()))
    assert measured.norm_scales.keys() == exact.norm_scales.keys()
    for name, scale in exact.norm_scales.items():
        assert scale == pytest.approx(math.sqrt(48 / 24))
        assert measured.norm_scales[name] == pytest.approx(scale, rel=1e-5)


def test_pruning_leaves_its_argument_untouched():
    model = make_model("qwen3", tied=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prune(model, plan_pruning(random_scores(model), model.config, dims_of(model.config).replace(hidden_size=24)))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_tied_embeddings_stay_one_parameter():
    model = make_model("llama", tied=True)
    pruned = prune(
        model, plan_pruning(random_scores(model), model.config, dims_of(model.config).replace(hidden_size=24))
    )
    assert pruned.get_input_embeddings().weight is pruned.get_output_embeddings().weight


def test_query_heads_are_cut_equally_in_every_key_value_group():
    model = make_model("llama", num_key_value_heads=2)
    plan = plan_pruning(random_scores(model), model.config, dims_of(model.config).replace(num_attention_heads=4))
    for heads in plan.heads:
        assert [sum(head // 4 == group for head in heads) for group in (0, 1)] == [2, 2]


def test_the_best_scored_units_are_kept():
    model = make_model("llama")
    scores = random_scores(model)
    plan = plan_pruning(scores, model.config, dims_of(model.config).replace(intermediate_size=10, num_hidden_layers=2))
    assert plan.layers == sorted(scores.layers.argsort(descending=True)[:2].tolist())
    for layer, neurons in zip(plan.layers, plan.neurons, strict=True):
        assert neurons == sorted(scores.neurons[layer].argsort(descending=True)[:10].tolist())


def test_layer_types_follow_the_kept_layers():
    types = ["full_attention", "sliding_attention", "full_attention"]
    config = make_config("qwen3", layer_types=types, sliding_window=8)
    dims = dims_of(config).replace(num_hidden_layers=2)
    assert config_with_dims(config, dims, kept_layers=[1, 2]).layer_types == types[1:]


def test_a_plan_reads_back_as_it_was_written(tmp_path):
    model = make_model("qwen3")
    scores = score_importance(collect_statistics(model, make_blocks()))
    plan = plan_pruning(scores, model.config, dims_of(model.config).replace(hidden_size=24, num_attention_heads=4))
    save_plan(plan, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan


def test_a_plan_without_its_rotation_and_what_is_no_plan_are_refused(tmp_path):
    model = make_model()
    statistics = collect_statistics(model, make_blocks(), covariance_blocks=4)
    target = dims_of(model.config).replace(hidden_size=dims_of(model.config).hidden_size // 2)
    rotated = plan_pruning(score_importance(statistics, hidden="pca"), model.config, target, statistics=statistics)
    plain = plan_pruning(score_importance(statistics), model.config, target, statistics=statistics)
    path = tmp_path / "plan.json"
    save_plan(rotated, path)
    assert torch.equal(load_plan(path).rotation, rotated.rotation)
    (tmp_path / "alone.json").write_bytes(path.read_bytes())
    with pytest.raises(UserError, match=r"alone\.rotation\.safetensors beside it, is missing"):
        load_plan(tmp_path / "alone.json")
    save_plan(plain, path)  # leaves no rotation of the plan before it
    assert load_plan(path).rotation is None and not list(tmp_path.glob("plan.*safetensors"))
    for text in ("{}", "nonsense", '{"format": 1}', "[]"):
        path.write_text(text)
        with pytest.raises(UserError, match=r"plan\.json"):
            load_plan(path)


def test_key_value_groups_are_cut_where_a_bound_counts_the_cache():
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=8, num_attention_heads=16,
        num_key_value_heads=8,
    )  # fmt: skip
    bound = Target(memory_bytes=0.4, context=32768, batch_size=8)
    found = solve_shape(config, bound)
    assert found.num_key_value_heads < 8 and found.num_attention_heads % found.num_key_value_heads == 0
    assert found.num_hidden_layers > 4  # not by depth alone
    assert solve_shape(config, Target(params=0.4)).num_key_value_heads == 8


def test_the_proof_refuses_a_cut_that_changes_what_stays():
    from transformers import GPT2Config

    # Attention divided by the layer's number: a layer that moves up is another layer.
    config = GPT2Config(scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(UserError, match="gpt2.*num_hidden_layers"):
        prove_cuts(config)
    assert max(prove_cuts(config, along=["hidden_size", "intermediate_size"]).values()) < 1e-5


@given(share=st.floats(0.1, 1.0), groups=st.sampled_from([2, 8]))
def test_a_solved_shape_is_legal_and_within_the_tolerance(share, groups):
    config = make_config(
        "llama", hidden_size=96, intermediate_size=256, num_hidden_layers=6, num_key_value_heads=groups
    )
    total = Sized(config).num_parameters
    dims = solve_shape(config, Target(params=share))
    size = probe_axes(config).num_parameters(dims)
    assert (1 - TOLERANCES[1]) * round(share * total) <= size <= round(share * total)
    config_with_dims(config, dims)
    assert dims.num_attention_heads % dims.num_key_value_heads == 0


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_where_there_is_room_a_solved_shape_is_within_the_first_tolerance(share):
    config = make_config("llama", hidden_size=96, intermediate_size=256, num_hidden_layers=6)
    total = Sized(config).num_parameters
    dims = solve_shape(config, Target(params=share))
    assert probe_axes(config).num_parameters(dims) >= (1 - TOLERANCES[0]) * share * total


def test_explicit_dims_bind_and_the_rest_is_solved_for():
    config = make_config("llama", hidden_size=96, intermediate_size=256, num_hidden_layers=6)
    dims = solve_shape(config, Target(params=0.5, dims={"num_hidden_layers": 6}))
    assert dims.num_hidden_layers == 6


def test_illegal_targets_are_refused_with_what_is_legal():
    config = make_config("llama")
    total = Sized(config).num_parameters
    cases = {
        "larger than the seed": Target(params=2 * total),
        "legal: 8, 6, 4, 2": Target(dims={"num_attention_heads": 5}),
        "not between 1 and the seed's 40": Target(dims={"intermediate_size": 41}),
        "cannot be cut; known: num_hidden_layers": Target(dims={"head_dim": 4}),
        "the smallest has": Target(params=1e-3),
        "does not accept": Target(dims={"hidden_size": 47}),
    }
    for message, target in cases.items():
        with pytest.raises(UserError, match=message):
            solve_shape(config, target)


def legal(architecture, **changes):
    config = make_config(architecture, **changes)
    return legal_values(Sized(config))


def test_legal_heads_are_multiples_of_the_groups_or_any_number_of_whole_heads():
    assert legal("llama", num_key_value_heads=4)["num_attention_heads"] == [8, 4]
    assert legal("llama", num_key_value_heads=8)["num_attention_heads"] == list(range(8, 0, -1))


@pytest.mark.parametrize("hidden", [48, 64])
def test_output_biases_are_cut_and_silenced_like_the_weights_that_they_belong_to(hidden):
    model = make_model("llama", hidden_size=hidden, attention_bias=True, mlp_bias=True)
    target = dims_of(model.config).replace(hidden_size=24, num_hidden_layers=2, intermediate_size=20)
    plan = plan_pruning(random_scores(model), model.config, target)
    assert silenced_difference(model, plan) < 5e-6
    assert collect_statistics(model, make_blocks()).hidden_norms.shape == (6, hidden)


def test_a_plan_can_be_asked_for_by_a_fraction():
    model = make_model("llama", hidden_size=96, intermediate_size=256)
    plan = plan_pruning(random_scores(model), model.config, 0.6)
    axes = probe_axes(model.config)
    assert 0.58 < axes.num_parameters(plan.target_dims) / axes.num_parameters(plan.source_dims) <= 0.6


def test_whole_heads_are_proven_where_every_head_has_keys_and_values_of_its_own():
    assert max(prove_cuts(make_config("llama", num_key_value_heads=8)).values()) < 1e-5


@pytest.mark.parametrize("groups", [2, 8])
def test_merged_heads_are_twice_the_kept_less_the_removed(groups):
    model = make_model("llama", num_key_value_heads=groups)
    scores = random_scores(model)
    heads = dims_of(model.config).replace(num_attention_heads=6, num_key_value_heads=2 if groups == 2 else 6)
    plain, merged = (plan_pruning(scores, model.config, heads, merge_heads=merge) for merge in (False, True))
    assert plain.heads == merged.heads and not plain.merged_heads
    q, k = (getattr(model.model.layers[0].self_attn, name).weight.view(-1, 8, 48) for name in ("q_proj", "k_proj"))
    after = prune(model, merged).model.layers[0].self_attn
    pairs = {one: other for one, other in merged.merged_heads[0]}
    assert len(pairs) == 2  # as many as were removed, by the same group's heads
    for place, head in enumerate(merged.heads[0]):
        expected = 2 * q[head] - q[pairs[head]] if head in pairs else q[head]
        assert torch.equal(after.q_proj.weight.view(-1, 8, 48)[place], expected)
        if groups == 2:
            assert head not in pairs or head // 4 == pairs[head] // 4
        else:
            expected = 2 * k[head] - k[pairs[head]] if head in pairs else k[head]
            assert torch.equal(after.k_proj.weight.view(-1, 8, 48)[place], expected)
    weakest = min(merged.heads[0], key=lambda head: (head >= 4 and groups == 2, float(scores.heads[0, head])))
    assert weakest in pairs
