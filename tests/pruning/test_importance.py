"""Statistics from one pass, against the same formulas written out over recorded activations."""

import dataclasses

import pytest
import torch
from conftest import ARCHITECTURES, make_blocks, make_model

from cascade.pruning.importance.scores import score_importance
from cascade.pruning.importance.statistics import collect_statistics, load_statistics, save_statistics
from cascade.runtime.errors import UserError

ALL = sorted(ARCHITECTURES)


def record(model, ids):
    """Inputs and outputs of every module in one forward pass over all blocks at once."""
    seen, handles = {}, []
    for name, module in model.named_modules():
        handles.append(
            module.register_forward_hook(
                lambda module, args, kwargs, output, name=name: seen.__setitem__(
                    name, (args or tuple(kwargs.values()), output)
                ),
                with_kwargs=True,
            )
        )
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("architecture", ALL)
def test_statistics_equal_the_formulas_over_recorded_activations(architecture):
    model, blocks = make_model(architecture), make_blocks(count=7)
    statistics = collect_statistics(model, blocks, batch_size=3)
    seen = record(model, blocks.input_ids)
    for layer in range(3):
        prefix = f"model.layers.{layer}"
        before, after = seen[prefix][0][0], seen[prefix][1]
        influence = 1 - torch.cosine_similarity(before.double(), after.double(), dim=-1).mean()
        torch.testing.assert_close(statistics.block_influence[layer].double(), influence, rtol=1e-5, atol=1e-7)
        neurons = seen[f"{prefix}.mlp.down_proj"][0][0].double().abs().mean(1).square().sum(0).sqrt()
        torch.testing.assert_close(statistics.neuron_norms[layer].double(), neurons, rtol=1e-5, atol=1e-7)
        heads = seen[f"{prefix}.self_attn.o_proj"][0][0].double().abs().mean(1).square().sum(0).sqrt()
        expected = heads.view(8, 8).norm(dim=1)
        torch.testing.assert_close(statistics.head_norms[layer].double(), expected, rtol=1e-5, atol=1e-7)
    hidden = sum(
        seen[f"model.layers.{layer}.{norm}"][1].double().abs().mean(1).square().sum(0).sqrt()
        for layer in range(3)
        for norm in ("input_layernorm", "post_attention_layernorm")
    )
    torch.testing.assert_close(score_importance(statistics).hidden.double(), hidden, rtol=1e-5, atol=1e-7)
    entered = seen["model.norm"][0][0].double().square().flatten(0, 1)
    energies = (entered / entered.mean(1, keepdim=True)).mean(0)
    torch.testing.assert_close(statistics.norm_energies["model.norm.weight"].double(), energies, rtol=1e-5, atol=1e-7)


def test_statistics_do_not_depend_on_the_batch_size():
    model, blocks = make_model(), make_blocks(count=9)
    one, all_at_once = (
        collect_statistics(model, blocks, batch_size=1),
        collect_statistics(model, blocks, batch_size=9),
    )
    for field in dataclasses.fields(one):
        torch.testing.assert_close(
            getattr(one, field.name), getattr(all_at_once, field.name), rtol=2e-5, atol=1e-6, msg=field.name
        )


def test_collecting_leaves_no_hook_and_no_change_behind():
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    collect_statistics(model, make_blocks())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_layer_that_changes_nothing_has_no_influence():
    model = make_model()
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
        model.model.layers[1].mlp.down_proj.weight.zero_()
    influence = collect_statistics(model, make_blocks()).block_influence
    assert abs(float(influence[1])) < 1e-6 < float(influence[[0, 2]].min())


def test_statistics_read_back_as_they_were_written(tmp_path):
    statistics = collect_statistics(make_model(), make_blocks())
    save_statistics(statistics, tmp_path / "statistics.safetensors")
    loaded = load_statistics(tmp_path / "statistics.safetensors")
    assert loaded.num_tokens == statistics.num_tokens
    assert loaded.norm_energies.keys() == statistics.norm_energies.keys()
    for field in dataclasses.fields(statistics):
        torch.testing.assert_close(getattr(loaded, field.name), getattr(statistics, field.name), rtol=0, atol=0)


def test_activations_that_are_not_finite_name_the_module():
    model = make_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    for covariance_blocks in (0, 4):
        with pytest.raises(UserError, match=r"layers\.1\.mlp\.down_proj"):
            collect_statistics(model, make_blocks(), covariance_blocks=covariance_blocks)
