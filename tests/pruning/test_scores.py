"""Scores by name: each equals its formula, written out; rotations change nothing until they are cut."""

import math

import pytest
import torch
from conftest import make_blocks, make_model

from cascade.models.architecture.dims import dims_of
from cascade.models.architecture.twin import twin_of
from cascade.pruning.choose import plan_pruning
from cascade.pruning.cut import prune
from cascade.pruning.importance.gradients import hessian, taylor
from cascade.pruning.importance.layers import (
    contiguous_angle,
    contiguous_loss,
    removal_logits,
    removal_loss,
    skipped,
)
from cascade.pruning.importance.scores import (
    head_contributions,
    neuron_contributions,
    score_importance,
)
from cascade.pruning.importance.statistics import collect_statistics, load_statistics, save_statistics
from cascade.pruning.importance.table import HEAD_SCORES, HIDDEN_SCORES, LAYER_SCORES, NEURON_SCORES
from cascade.pruning.plan import load_plan, save_plan
from cascade.pruning.size.target import Target
from cascade.runtime.errors import UserError


@pytest.fixture(scope="module")
def model():
    return make_model("llama", num_hidden_layers=5)


@pytest.fixture(scope="module")
def blocks():
    return make_blocks(count=6, size=12)


def loss_of(model, blocks):
    with torch.no_grad():
        logits = model(input_ids=blocks.input_ids, use_cache=False).logits[:, :-1].double()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), blocks.labels[:, 1:].flatten())


def without(model, *layers):
    """The model with some layers really taken out."""
    kept = [layer for layer in range(5) if layer not in layers]
    scores = score_importance(collect_statistics(model, make_blocks()))
    ranked = torch.zeros(5)
    ranked[kept] = 1
    from dataclasses import replace

    target = dims_of(model.config).replace(num_hidden_layers=len(kept))
    return prune(model, plan_pruning(replace(scores, layers=ranked), model.config, target))


def test_removal_by_loss_is_the_loss_of_the_model_without_the_layer(model, blocks):
    found = removal_loss(model, blocks, batch_size=4)
    for layer in range(5):
        assert float(found[layer]) == pytest.approx(float(loss_of(without(model, layer), blocks)), rel=1e-5)


def test_removal_by_logits_removes_the_layer_that_matters_least_and_looks_again(model, blocks):
    ranks = removal_logits(model, blocks)
    with torch.no_grad():
        full = model(input_ids=blocks.input_ids, use_cache=False).logits
        gone = []
        for expected in (0, 1):
            errors = {}
            for layer in set(range(5)) - set(gone):
                cut = without(model, *gone, layer)(input_ids=blocks.input_ids, use_cache=False).logits
                errors[layer] = float((full - cut).square().sum() / full.square().sum())
            gone.append(min(errors, key=errors.get))
            assert int(ranks[gone[-1]]) == expected
    assert sorted(ranks.tolist()) == [0, 1, 2, 3, 4]


def test_contiguous_blocks_are_the_best_of_all_neighbours(model, blocks):
    losses = [float(loss_of(without(model, start, start + 1), blocks)) for start in range(4)]
    best = losses.index(min(losses))
    assert contiguous_loss(model, blocks, 2).tolist() == [float(layer not in (best, best + 1)) for layer in range(5)]
    stream = []
    layers = model.model.layers
    handles = [layer.register_forward_pre_hook(lambda m, a: stream.append(a[0][:, -1].double())) for layer in layers]
    handles.append(layers[-1].register_forward_hook(lambda m, a, output: stream.append(output[:, -1].double())))
    with torch.no_grad():
        model(input_ids=blocks.input_ids, use_cache=False)
    for handle in handles:
        handle.remove()
    statistics = collect_statistics(model, blocks, batch_size=4)
    for layer, count in ((0, 1), (1, 3), (2, 3)):
        cosines = torch.cosine_similarity(stream[layer], stream[layer + count], dim=-1)
        angle = float(torch.arccos(cosines).mean() / math.pi)
        assert float(statistics.angular_distances[layer, count]) == pytest.approx(angle, rel=1e-5)
    angles = statistics.angular_distances[:3, 3]
    first = int(angles.argmin())
    assert contiguous_angle(statistics, 3).tolist() == [float(not first <= layer < first + 3) for layer in range(5)]


def test_skipped_layers_come_back(model, blocks):
    before = loss_of(model, blocks)
    with skipped(model, [1, 3]):
        inside = loss_of(model, blocks)
    assert inside != before
    assert loss_of(model, blocks) == before


def test_norm_ratios_are_means_of_lengths_after_over_before(model, blocks):
    seen = {}
    handle = model.model.layers[2].register_forward_hook(lambda m, args, output: seen.update(a=args[0], b=output))
    with torch.no_grad():
        model(input_ids=blocks.input_ids, use_cache=False)
    handle.remove()
    ratio = (seen["b"].double().norm(dim=-1) / seen["a"].double().norm(dim=-1)).mean()
    assert float(collect_statistics(model, blocks).norm_ratios[2]) == pytest.approx(float(ratio), rel=1e-5)


def test_head_contributions_are_lengths_of_what_each_head_writes(model, blocks):
    statistics = collect_statistics(model, blocks, head_contributions=True)
    seen = {}
    projection = model.model.layers[1].self_attn.o_proj
    handle = projection.register_forward_pre_hook(lambda m, args: seen.update(a=args[0]))
    with torch.no_grad():
        model(input_ids=blocks.input_ids, use_cache=False)
    handle.remove()
    for head in range(8):
        columns = slice(8 * head, 8 * head + 8)
        written = seen["a"][..., columns].double() @ projection.weight[:, columns].T.double()
        expected = float(written.detach().norm(dim=-1).mean())
        assert float(head_contributions(statistics)[1, head]) == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ValueError, match="head_contributions=True"):
        head_contributions(collect_statistics(model, blocks))


def test_neuron_contributions_weigh_activations_by_what_they_write(model, blocks):
    statistics = collect_statistics(model, blocks)
    lengths = torch.stack([layer.mlp.down_proj.weight.norm(dim=0) for layer in model.model.layers])
    torch.testing.assert_close(neuron_contributions(statistics), statistics.neuron_norms * lengths)


@pytest.mark.parametrize("architecture", ["llama", "phi3", "gpt2"])
def test_gradient_scores_are_torch_prunings_criteria_on_the_whole_group(architecture, blocks):
    import transformers

    if architecture == "llama":
        model = make_model("llama")
    else:
        config = {"phi3": transformers.Phi3Config, "gpt2": transformers.GPT2Config}[architecture]()
        model = twin_of(config)
    names = {
        "llama": ["model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"],
        "phi3": ["model.layers.1.mlp.gate_up_proj", "model.layers.1.mlp.down_proj"],
        "gpt2": ["transformer.h.1.mlp.c_fc", "transformer.h.1.mlp.c_proj"],
    }[architecture]
    found = {"taylor": taylor(model, blocks, batch_size=3), "hessian": hessian(model, blocks, batch_size=3)}
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    weights = [model.get_parameter(f"{name}.weight") for name in names]
    gradients = []
    for ids, labels in ((part.input_ids, part.labels) for part in blocks.split(3)):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        gradients.append(torch.autograd.grad(loss, weights))
    neurons = dims_of(model.config).intermediate_size
    for kind in ("taylor", "hessian"):
        expected = torch.zeros(neurons)
        for index, weight in enumerate(weights):
            mean = torch.stack([g[index] ** (2 if kind == "hessian" else 1) for g in gradients]).mean(0)
            value = (weight * mean).abs() if kind == "taylor" else weight**2 * mean
            across = 0 if architecture == "gpt2" else 1
            per_row = value.sum(across if index < len(weights) - 1 else 1 - across)
            expected += per_row.view(-1, neurons).sum(0).detach()
        torch.testing.assert_close(found[kind][1], expected, rtol=1e-4, atol=1e-10)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "phi3", "granite"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_square_rotation_changes_nothing(architecture, tied, blocks):
    import transformers

    kinds = {"phi3": transformers.Phi3Config, "granite": transformers.GraniteConfig}
    if architecture in kinds:
        model = twin_of(kinds[architecture](tie_word_embeddings=tied))
    else:
        model = make_model(architecture, tied=tied)
    statistics = collect_statistics(model, blocks, covariance_blocks=4, batch_size=2)
    scores = score_importance(statistics, hidden="pca")
    plan = plan_pruning(scores, model.config, dims_of(model.config), statistics=statistics)
    turned = prune(model, plan)
    assert not turned.config.tie_word_embeddings
    with torch.no_grad():
        before, after = (one(input_ids=blocks.input_ids, use_cache=False).logits for one in (model, turned))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))
    identity = torch.eye(len(plan.rotation), dtype=torch.float64)
    torch.testing.assert_close(plan.rotation.T @ plan.rotation, identity)


@pytest.mark.parametrize("architecture", ["llama", "gemma"])
def test_a_stream_in_a_plane_is_cut_to_it_without_loss(architecture, blocks):
    import transformers

    # Gemma multiplies its embeddings, and ties them: the rotated model's own head takes no part in that.
    model = make_model("llama", seed=3) if architecture == "llama" else twin_of(transformers.GemmaConfig())
    plane = torch.linalg.qr(torch.randn(48, 24, generator=torch.Generator().manual_seed(0)))[0]
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ plane @ plane.T)
        for layer in model.model.layers:
            for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
                writer.weight.copy_(plane @ plane.T @ writer.weight)
    statistics = collect_statistics(model, blocks, covariance_blocks=6)
    scores = score_importance(statistics, hidden="pca")
    target = dims_of(model.config).replace(hidden_size=24)
    pruned = prune(model, plan_pruning(scores, model.config, target, statistics=statistics))
    with torch.no_grad():
        before, after = (one(input_ids=blocks.input_ids, use_cache=False).logits for one in (model, pruned))
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3 * float(before.abs().max()))


@pytest.mark.parametrize(
    ("config", "norm"),
    [("Gemma2Config", "post_attention_layernorm"), ("GPT2Config", "ln_1|ln_f"), ("Olmo2Config", "post_attention")],
)
def test_a_rotation_that_is_not_legal_is_refused_with_the_norms_name(config, norm, blocks):
    import transformers

    model = twin_of(getattr(transformers, config)())
    scores = score_importance(collect_statistics(model, blocks, covariance_blocks=2), hidden="pca")
    with pytest.raises(UserError, match=f"cannot be rotated.*({norm})"):
        plan_pruning(scores, model.config, dims_of(model.config))


def test_a_rotation_unties_and_the_extra_parameters_count(blocks):
    model = make_model("llama", tied=True, hidden_size=96, intermediate_size=256)
    statistics = collect_statistics(model, blocks, covariance_blocks=2)
    total = sum(parameter.numel() for parameter in model.parameters())
    plan = plan_pruning(score_importance(statistics, hidden="pca"), model.config, Target(params=0.6))
    pruned = prune(model, plan)
    count = sum(parameter.numel() for parameter in pruned.parameters())
    assert pruned.get_input_embeddings().weight is not pruned.get_output_embeddings().weight
    assert count <= 0.6 * (total + 64 * 96)


def test_a_rotated_plan_reads_back_as_it_was_written(tmp_path, blocks):
    model = make_model()
    statistics = collect_statistics(model, blocks, covariance_blocks=2, head_contributions=True)
    save_statistics(statistics, tmp_path / "s.safetensors")
    loaded = load_statistics(tmp_path / "s.safetensors")
    assert torch.equal(loaded.rotation, statistics.rotation)
    assert loaded.rotated_energies.keys() == statistics.rotated_energies.keys()
    scores = score_importance(loaded, hidden="pca", heads="contribution", neurons="contribution")
    plan = plan_pruning(scores, model.config, dims_of(model.config).replace(hidden_size=24), statistics=loaded)
    save_plan(plan, tmp_path / "plan.json")
    again = load_plan(tmp_path / "plan.json")
    assert again == plan and torch.equal(again.rotation, plan.rotation)


def test_every_named_score_gives_a_number_for_every_unit(model, blocks):
    statistics = collect_statistics(model, blocks, covariance_blocks=2, head_contributions=True)
    evidence = {"model": model, "blocks": blocks, "num_removed": 2}
    for kind, names in (
        ("layers", LAYER_SCORES),
        ("heads", HEAD_SCORES),
        ("neurons", NEURON_SCORES),
        ("hidden", HIDDEN_SCORES),
    ):
        shapes = {"layers": (5,), "heads": (5, 8), "neurons": (5, 40), "hidden": (48,)}
        for name in names:
            scores = getattr(score_importance(statistics, **{kind: name}, **evidence), kind)
            assert scores.shape == shapes[kind] and scores.dtype == torch.float32 and torch.isfinite(scores).all()
    with pytest.raises(ValueError, match="unknown score 'magic' of heads; known: activation_norm, contribution"):
        score_importance(statistics, heads="magic")
    with pytest.raises(ValueError, match="'taylor' of neurons needs model and blocks"):
        score_importance(statistics, neurons="taylor")
