"""Repair in closed form: what can be undone is undone, what cannot is made smaller, on every kind of stream."""

import logging
from dataclasses import replace

import pytest
import torch
from conftest import make_blocks, make_model
from hypothesis import given
from hypothesis import strategies as st
from test_architectures import config_of

from cascade.models.architecture.dims import dims_of
from cascade.models.architecture.twin import twin_of
from cascade.pruning.choose import plan_pruning
from cascade.pruning.cut import prune
from cascade.pruning.importance.scores import score_importance
from cascade.pruning.importance.statistics import collect_statistics
from cascade.pruning.repair.refit import Repair, repair
from cascade.pruning.repair.ridge import RIDGES, Moments

KINDS = ["llama", "qwen2", "phi3", "granite", "gpt2", "gpt_neox", "opt", "starcoder2", "cohere2", "gemma2", "olmo2"]


def error(student, model, blocks):
    """Share of the parent's logits' energy (less their mean, which softmax does not see) that is missed."""
    with torch.no_grad():
        one, other = (m(input_ids=blocks.input_ids, use_cache=False).logits.double() for m in (student, model))
    one, other = (x - x.mean(-1, keepdim=True) for x in (one, other))
    return float((one - other).square().sum() / other.square().sum())


def cut(model, blocks, **changes):
    statistics = collect_statistics(model, blocks)
    target = dims_of(model.config).replace(**changes)
    return plan_pruning(score_importance(statistics), model.config, target, statistics=statistics)


@given(
    tokens=st.integers(30, 80),
    inputs=st.integers(1, 9),
    outputs=st.integers(1, 6),
    biased=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_refit_solves_the_penalised_least_squares(tokens, inputs, outputs, biased, seed):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    x, y, start = draw(tokens, inputs), draw(tokens, outputs), draw(outputs, inputs + biased)
    moments = Moments()
    moments.add(x[:20], y[:20], biased)
    moments.add(x[20:], y[20:], biased)
    solved = moments.solve(start, 0.1, biased)
    full = torch.cat([x, torch.ones(tokens, 1, dtype=x.dtype)], 1) if biased else x
    weight = (0.1 * (x.square().sum(0).mean())).sqrt()
    penalty = weight * torch.eye(inputs + biased, dtype=x.dtype)[:inputs]
    a, b = torch.cat([full, penalty]), torch.cat([y, penalty @ start.T])
    torch.testing.assert_close(solved, torch.linalg.lstsq(a, b).solution.T, rtol=1e-8, atol=1e-8)
    missed = (y - full @ solved.T).square().sum() / y.square().sum()
    assert moments.error(solved) == pytest.approx(float(missed), rel=1e-8)


@pytest.mark.parametrize("how", [Repair(), Repair(compensation=0.5), Repair(readers=False), Repair(sequential=False)])
def test_a_model_that_was_not_cut_stays_what_it_is(how):
    model, blocks = make_model(), make_blocks(count=12)
    student = prune(model, cut(model, blocks))
    repair(student, model, cut(model, blocks), blocks, how, batch_size=2)
    assert error(student, model, blocks) < 1e-10


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "gemma2"])
def test_neurons_that_repeat_others_are_given_back_exactly(architecture):
    model, blocks = twin_of(config_of(architecture)), make_blocks(count=32, size=12)
    from cascade.models.architecture.axes import probe_axes

    axes = probe_axes(model.config)
    with torch.no_grad():  # neurons 10 to 19 say what 0 to 9 say
        for name, weight in model.named_parameters():
            if axes.layer_of(name) is not None and axes.module_of(name) in axes.behaviour.readers:
                for position, axis in enumerate(axes.of(name)):
                    if axis.dim == "intermediate_size":
                        weight.transpose(0, position).copy_(
                            weight.transpose(0, position)[:10].repeat(2, *[1] * (weight.ndim - 1))
                        )
    scores = score_importance(collect_statistics(model, blocks))
    scores = replace(scores, neurons=torch.arange(20, 0, -1).float().repeat(3, 1))
    plan = plan_pruning(scores, model.config, dims_of(model.config).replace(intermediate_size=10))
    sliced, repaired = prune(model, plan), prune(model, plan)
    repair(repaired, model, plan, blocks, batch_size=4)
    assert error(sliced, model, blocks) > 1e-2
    assert error(repaired, model, blocks) < 1e-4 * error(sliced, model, blocks)


@pytest.mark.parametrize("architecture", KINDS)
def test_repair_makes_the_error_of_a_cut_smaller_on_text_it_has_not_seen(architecture):
    model = twin_of(config_of(architecture))
    dims = dims_of(model.config)
    calibration, other = make_blocks(count=64, size=12, seed=1), make_blocks(count=16, size=12, seed=2)
    heads = {"num_attention_heads": 2}
    if dims.num_key_value_heads == dims.num_attention_heads:
        heads["num_key_value_heads"] = 2
    changes = {"intermediate_size": 10} if dims.hidden_size == 4 * dims.head_dim else {"intermediate_size": 10} | heads
    plan = cut(model, calibration, **changes)
    sliced, repaired = prune(model, plan), prune(model, plan)
    report = repair(repaired, model, plan, calibration)
    assert error(repaired, model, other) < 0.95 * error(sliced, model, other)
    assert not report.skipped and report.ridges
    assert set(report.ridges.values()) <= set(RIDGES)


def test_what_the_stream_has_lost_is_asked_of_later_layers():
    model, blocks = make_model(num_hidden_layers=4), make_blocks(count=64)
    plan = cut(model, blocks, intermediate_size=14)
    errors = {}
    for compensation in (0.0, 1.0):
        student = prune(model, plan)
        repair(student, model, plan, blocks, Repair(compensation=compensation, readers=False))
        errors[compensation] = error(student, model, blocks)
    assert errors[1.0] < errors[0.0]


def test_a_dropped_layer_is_made_up_for_by_those_that_stay():
    model, blocks = make_model(num_hidden_layers=5), make_blocks(count=64)
    plan = cut(model, blocks, num_hidden_layers=4)
    dropped, repaired = prune(model, plan), prune(model, plan)
    repair(repaired, model, plan, blocks)
    assert error(repaired, model, blocks) < 0.9 * error(dropped, model, blocks)


def test_a_rotated_cut_is_repaired_in_its_own_channels():
    model, blocks = make_model(), make_blocks(count=64)
    statistics = collect_statistics(model, blocks, covariance_blocks=16)
    scores = score_importance(statistics, hidden="pca")
    plan = plan_pruning(scores, model.config, dims_of(model.config).replace(hidden_size=32), statistics=statistics)
    sliced, repaired = prune(model, plan), prune(model, plan)
    repair(repaired, model, plan, blocks)
    assert error(repaired, model, blocks) < 0.8 * error(sliced, model, blocks)


def test_a_singular_gram_matrix_leaves_the_weight_and_names_the_layer(caplog):
    model, blocks = make_model(), make_blocks()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.zero_()  # no neuron of this layer ever says anything
    plan = cut(model, blocks, intermediate_size=20)
    student = prune(model, plan)
    before = student.model.layers[1].mlp.down_proj.weight.clone()
    with caplog.at_level(logging.WARNING):
        report = repair(student, model, plan, blocks)
    assert report.skipped == ["model.layers.1.mlp.down_proj.weight"]
    assert "layers.1.mlp.down_proj" in caplog.text and "singular" in caplog.text
    assert torch.equal(student.model.layers[1].mlp.down_proj.weight, before)


def test_repair_leaves_the_parent_and_its_hooks_alone():
    model, blocks = make_model(), make_blocks()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = cut(model, blocks, intermediate_size=20, hidden_size=32)
    student = prune(model, plan)
    repair(student, model, plan, blocks)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    for one in (student, model):
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in one.modules())


def test_two_writers_fitted_together_keep_their_biases_sum_where_one_of_them_has_none():
    model, blocks = twin_of(config_of("gpt_neox", attention_bias=False)), make_blocks(count=12)
    assert model.gpt_neox.layers[0].attention.dense.bias is None
    for how in (Repair(), Repair(sequential=False)):
        student = prune(model, cut(model, blocks))
        repair(student, model, cut(model, blocks), blocks, how)
        assert error(student, model, blocks) < 1e-10


@pytest.mark.parametrize("sequential", [True, False])
def test_merged_heads_are_not_undone(sequential):
    model, blocks = make_model(), make_blocks(count=12)
    statistics = collect_statistics(model, blocks)
    target = dims_of(model.config).replace(num_attention_heads=dims_of(model.config).num_key_value_heads)
    plan = plan_pruning(score_importance(statistics), model.config, target, statistics=statistics, merge_heads=True)
    student = prune(model, plan)
    merged = {n: w.clone() for n, w in student.named_parameters() if "q_proj" in n}
    assert plan.merged_heads[0]
    repair(student, model, plan, blocks, Repair(sequential=sequential))
    assert all(torch.equal(student.get_parameter(name), weight) for name, weight in merged.items())


def test_the_batch_size_does_not_change_which_blocks_choose_the_ridge():
    model, blocks = make_model(), make_blocks(count=12)
    plan = cut(model, blocks, intermediate_size=dims_of(model.config).intermediate_size // 2)
    reports = []
    for batch_size in (2, 12):
        reports.append(repair(prune(model, plan), model, plan, blocks, batch_size=batch_size))
    assert reports[0].ridges == reports[1].ridges
    for name, errors in reports[0].errors.items():
        assert errors == pytest.approx(reports[1].errors[name], rel=1e-3)
