"""Decode latency as a target: the fit is right where it must be, and a run keeps what it measured."""

import itertools

import numpy as np
import pytest
import torch
import transformers
from test_architectures import config_of

import cascade.pruning.size.latency as latency_of
from cascade.models.architecture.axes import probe_axes
from cascade.models.architecture.dims import dims_of
from cascade.models.architecture.sized import Sized
from cascade.models.checkpoint.load import load_config, resolve_model
from cascade.pruning.size.latency import DecodeLatency, corrected, fit_decode_latency, measure_decode_ms
from cascade.pruning.size.shape import solve_shape
from cascade.pruning.size.target import Target
from cascade.runtime.errors import UserError


def llama(**changes):
    options = {
        "vocab_size": 512,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    }
    return transformers.LlamaConfig(**options | changes)


def costing(rates, drift=1.0):
    """A stand-in for the clock: exactly linear in layers and weights, and `drift` slower below eight layers."""

    def measure(config, dims, *, context, batch_size, steps=15):
        axes = probe_axes(config)
        cached = axes.cache_bytes_per_token(dims, 1) * context * batch_size / 1e6
        features = (1.0, dims.num_hidden_layers, axes.flops_per_token(dims, 0) / 2e6, cached)
        slower = drift if dims.num_hidden_layers < 8 else 1.0
        return slower * sum(rate * feature for rate, feature in zip(rates, features, strict=True))

    return measure


def test_a_cost_that_is_linear_is_found_again_exactly(monkeypatch):
    rates = (0.3, 0.2, 0.05, 0.4)
    monkeypatch.setattr(latency_of, "measure_decode_ms", costing(rates))
    found = fit_decode_latency(llama(), context=128, batch_size=2)
    assert np.allclose(found.coefficients, rates, rtol=1e-6)
    assert len(found.points) >= 5


@pytest.mark.parametrize("architecture", ["gpt2", "phi3", "gpt_neox", "qwen3"])
def test_no_coefficient_is_negative_and_every_architecture_gives_enough_points(architecture, monkeypatch):
    noise = itertools.cycle([1.0, 1.3, 0.8])

    def noisy(*args, **options):
        return next(noise) * costing((0.3, 0.2, 0.0, 0.0))(*args, **options)

    monkeypatch.setattr(latency_of, "measure_decode_ms", noisy)
    found = fit_decode_latency(config_of(architecture), context=4, batch_size=1)
    assert min(found.coefficients) >= 0 and max(found.coefficients) > 0
    assert len(found.points) >= 4


def test_every_shape_that_is_timed_has_whole_groups_of_query_heads():
    parent = load_config(resolve_model("builtin:pico-python"))  # 12 heads in 4 groups: half as many are no whole groups
    timed = [dims for dims, _ in fit_decode_latency(parent, context=4, batch_size=1).points]
    assert not [dims for dims in timed if dims["num_attention_heads"] % dims["num_key_value_heads"]]
    heads_alone = {dims["num_attention_heads"] for dims in timed if dims["num_key_value_heads"] == 4}
    assert heads_alone == {12, 4}


def test_a_fit_that_is_off_at_the_solution_is_corrected_there(monkeypatch):
    config, target = llama(), Target(decode_ms=0.5, context=64)
    clock = costing((0.3, 0.2, 0.05, 0.4), drift=1.4)
    monkeypatch.setattr(latency_of, "measure_decode_ms", costing((0.3, 0.2, 0.05, 0.4)))
    naive = fit_decode_latency(config, context=64, batch_size=1)
    monkeypatch.setattr(latency_of, "measure_decode_ms", clock)
    better = corrected(naive, config, target, parent=config)
    errors = []
    for latency in (naive, better):
        dims = solve_shape(config, target.with_latency(latency), parent=config)
        predicted = latency.milliseconds(probe_axes(config), dims)
        errors.append(abs(predicted / clock(config, dims, context=64, batch_size=1) - 1))
    assert errors[1] < 0.11 < 0.25 < errors[0]
    assert dims.num_hidden_layers < 8  # where the clock is slow
    measured = clock(config, dims, context=64, batch_size=1)
    assert measured <= 0.5 * clock(config, dims_of(config), context=64, batch_size=1) * 1.05


def test_the_solved_shape_meets_a_latency_and_another_bound_together(monkeypatch):
    monkeypatch.setattr(latency_of, "measure_decode_ms", costing((0.3, 0.2, 0.05, 0.4)))
    config = llama()
    latency = fit_decode_latency(config, context=64, batch_size=1)
    whole = Sized(config)
    for share, params in ((0.5, 0.9), (0.9, 0.5)):
        dims = solve_shape(config, Target(decode_ms=share, params=params, context=64, latency=latency))
        assert latency.milliseconds(whole.axes, dims) <= share * latency.milliseconds(whole.axes, whole.dims)
        assert whole.axes.num_parameters(dims) <= params * whole.num_parameters


def test_a_deeper_model_is_measured_slower():
    config = llama()
    times = [
        measure_decode_ms(config, dims_of(config).replace(num_hidden_layers=depth), context=16, batch_size=1)
        for depth in (1, 8)
    ]
    assert 0 < times[0] < times[1]


def test_what_cannot_be_timed_is_refused():
    config = llama(max_position_embeddings=64)
    with pytest.raises(UserError, match=r"target\.context: 64 is too long.*64 positions"):
        measure_decode_ms(config, dims_of(config), context=64, batch_size=1)
    encoder = config_of("BertForMaskedLM")
    with pytest.raises(UserError, match=r"target\.decode_ms.*does not decode"):
        measure_decode_ms(encoder, dims_of(encoder), context=4, batch_size=1)


def test_a_fit_comes_back_from_its_file_as_it_was():
    import json

    latency = DecodeLatency(64, 2, (0.1, 0.2, 0.0, 0.3), (({"hidden_size": 8}, 1.5),), "cpu", torch.get_num_threads())
    assert DecodeLatency.from_dict(json.loads(json.dumps(latency.as_dict()))) == latency
