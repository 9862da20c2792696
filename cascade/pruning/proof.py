"""Proof of the cut on a tiny twin: the pruned model equals the parent with the removed units silenced.

The twin has the parent's architecture, small sizes and non-trivial weights, so the proof takes a fraction of a
second, needs no real weight and runs before any is touched.

Silenced means: a layer returns its input; a neuron's or a head's output is zero; a hidden channel is never written, and
where norms subtract a mean, the others are written with the mean of the kept channels at zero (or, where such a norm
itself writes the stream, the removed channels are left out of its mean and variance).
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from cascade.models.architecture.axes import ModelAxes, probe_axes
from cascade.models.architecture.dims import dims_of
from cascade.models.architecture.twin import twin_of
from cascade.pruning.choose import plan_pruning
from cascade.pruning.corrections import stream_is_centred_by_norms
from cascade.pruning.cut import kept_rows, prune
from cascade.pruning.importance.layers import skipped
from cascade.pruning.importance.scores import Scores
from cascade.pruning.plan import PruningPlan
from cascade.runtime.errors import UserError

PROOF_TOLERANCE = 1e-4
"""Largest difference of logits, relative to the largest logit, that counts as equal in float32."""


def prove_cuts(config: Any, *, along: Sequence[str] = (), rotated: bool = False, seed: int = 0) -> dict[str, float]:
    """Largest relative difference of logits between pruned and silenced, for a cut along each axis and all at once.

    With `rotated` also that of the twin in a rotated stream of full width, which is the same function.

    Raises:
        UserError: a difference is above PROOF_TOLERANCE, so this architecture cannot be cut along that axis.
    """
    try:
        return _differences(config, along, rotated, seed)
    except (ValueError, IndexError, RuntimeError, TypeError) as error:  # whatever a small model of it raises
        raise UserError(
            f"model type '{config.model_type}' cannot be cut: a tiny twin of it cannot be built, run or cut: {error}"
        ) from error


def _differences(config: Any, along: Sequence[str], rotated: bool, seed: int) -> dict[str, float]:
    twin = twin_of(config, seed=seed)
    before = dims_of(twin.config)
    differences = {}
    cuts = proof_cuts(config)
    chosen_cuts = {name: change for name, change in cuts.items() if not along or set(change) & set(along)}
    together = {dim: size for change in chosen_cuts.values() for dim, size in change.items()}
    for name, change in [*chosen_cuts.items(), ("all axes", together)]:
        scores = random_scores(twin, seed=seed)
        plan = plan_pruning(scores, twin.config, before.replace(**change))
        differences[name] = silenced_difference(twin, plan, seed=seed)
        if not differences[name] <= PROOF_TOLERANCE:
            raise UserError(
                f"model type '{config.model_type}' cannot be cut along {name} yet: on a tiny twin the pruned model's "
                f"logits differ from the silenced parent's by {differences[name]:.1e} (at most {PROOF_TOLERANCE:.0e})"
            )
    if rotated:
        differences["rotation"] = _rotated_difference(twin, seed)
        if not differences["rotation"] <= PROOF_TOLERANCE:
            raise UserError(
                f"model type '{config.model_type}' cannot be rotated yet: a tiny twin's logits change by "
                f"{differences['rotation']:.1e} (at most {PROOF_TOLERANCE:.0e}); set prune.hidden: activation_norm"
            )
    return differences


def _rotated_difference(twin: nn.Module, seed: int) -> float:
    """Max |rotated - original| / max |original| of the twin, all channels kept."""
    size = dims_of(twin.config).hidden_size
    rotation = torch.linalg.qr(torch.randn(size, size, generator=_generator(seed), dtype=torch.float64)).Q
    scores = replace(random_scores(twin, seed=seed), rotation=rotation)
    turned = prune(twin, plan_pruning(scores, twin.config, dims_of(twin.config)))
    ids = torch.randint(3, dims_of(twin.config).vocab_size, (1, 12), generator=_generator(seed))
    with torch.inference_mode():
        expected, actual = _outputs(twin, ids), _outputs(turned, ids)
    return float((actual - expected).abs().max() / expected.abs().max())


def proof_cuts(config: Any) -> dict[str, dict[str, int]]:
    """The cut of the twin along each axis, by the axis's name."""
    dims = dims_of(twin_of(config).config)
    hidden, heads = 2 * dims.hidden_size // 3, dims.num_attention_heads // 2
    cuts = {
        "num_hidden_layers": {"num_hidden_layers": dims.num_hidden_layers - 1},
        "num_attention_heads": {"num_attention_heads": heads},
        "intermediate_size": {"intermediate_size": 13},
        "hidden_size": {"hidden_size": hidden},
    }
    if dims.num_key_value_heads == dims.num_attention_heads:
        cuts["num_attention_heads"]["num_key_value_heads"] = heads
    else:
        cuts["num_key_value_heads"] = {"num_key_value_heads": 1, "num_attention_heads": heads}
    if probe_axes(config).heads_fill_hidden:
        del cuts["hidden_size"]
        cuts["num_attention_heads"]["hidden_size"] = heads * dims.head_dim
    return cuts


def silenced_difference(model: nn.Module, plan: PruningPlan, *, seed: int = 0) -> float:
    """Max |pruned - silenced| / max |silenced| over the outputs (logits) for random ids."""
    silenced = silence(model, plan)
    ids = torch.randint(3, dims_of(model.config).vocab_size, (1, 12), generator=_generator(seed))
    # Cut the silenced model, not the original: where removed channels carry nothing the cut is exact.
    pruned = prune(silenced, plan)
    dropped = set(range(plan.source_dims.num_hidden_layers)) - set(plan.layers)
    with torch.inference_mode(), skipped(silenced, dropped), _norms_over_kept_channels(silenced, plan):
        expected, actual = _outputs(silenced, ids), _outputs(pruned, ids)
    if expected.shape[-1] != actual.shape[-1]:  # a body without a head gives the stream itself
        expected = expected[..., torch.tensor(plan.hidden)]
    return float((actual - expected).abs().max() / expected.abs().max())


def silence(model: nn.Module, plan: PruningPlan) -> nn.Module:
    """A copy of the model, of the same size, whose weights write nothing to the units that the plan removes."""
    axes = probe_axes(model.config)
    silent = copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in silent.named_parameters():
            layer = axes.layer_of(name)
            if layer is None or layer in plan.layers:
                _silence_weight(name, weight, axes, plan)
    return silent.eval()


def random_scores(model: nn.Module, *, seed: int = 0) -> Scores:
    """Scores that make every kept set arbitrary, but drop a layer that others follow."""
    dims, generator = dims_of(model.config), _generator(seed)
    draw: Callable[..., Tensor] = lambda *shape: torch.rand(*shape, generator=generator)  # noqa: E731
    depth = dims.num_hidden_layers
    layers = draw(depth)
    layers[depth // 3] = 0
    return Scores(
        layers=layers,
        heads=draw(depth, dims.num_attention_heads),
        neurons=draw(depth, dims.intermediate_size),
        hidden=draw(dims.hidden_size),
    )


def _silence_weight(name: str, weight: Tensor, axes: ModelAxes, plan: PruningPlan) -> None:
    weight_axes, layer, module = axes.of(name), axes.layer_of(name), axes.module_of(name)
    output = axes.output_axis(name)
    norm = axes.behaviour.norms.get(module)
    rows = [_removed_rows(axis, layer, plan) for axis in weight_axes]
    if norm is not None:
        weight[rows[0]] = -1.0 if norm.zero_centred and name.endswith(".weight") else 0.0
        return
    if module in axes.behaviour.lookups:
        weight[:, rows[1]] = 0
        _centre(weight, 1, weight_axes[1], axes, plan)
        return
    written = 0 if output is None else output
    dim = weight_axes[written].dim
    spans_heads = any(axes.of(norm_name)[0].dim in _HEADS for norm_name in axes.weights if axes.is_norm(norm_name))
    if dim == "hidden_size" or (dim in _HEADS and spans_heads):
        weight.index_fill_(written, rows[written], 0)
    if dim == "hidden_size":
        _centre(weight, written, weight_axes[written], axes, plan)
    if output is not None and weight_axes[1 - written].dim in ("intermediate_size", "num_attention_heads"):
        weight.index_fill_(1 - written, rows[1 - written], 0)


_HEADS = ("num_attention_heads", "num_key_value_heads")


def _removed_rows(axis: Any, layer: int | None, plan: PruningPlan) -> Tensor:
    rows = kept_rows(axis, layer, plan)
    removed = torch.ones(int(axis.length(plan.source_dims)), dtype=torch.bool)
    removed[slice(None) if rows is None else rows] = False
    return removed.nonzero().flatten()


def _centre(weight: Tensor, position: int, axis: Any, axes: ModelAxes, plan: PruningPlan) -> None:
    """Take the kept channels' mean off what a weight writes to the stream, where every norm takes it off anyway."""
    centres = any(norm.centres for norm in axes.behaviour.norms.values())
    if axis.dim != "hidden_size" or not centres or stream_is_centred_by_norms(axes):
        return
    channels = torch.tensor(plan.hidden)
    part = weight.index_select(position, channels)
    weight.index_copy_(position, channels, part - part.mean(position, keepdim=True))


@contextmanager
def _norms_over_kept_channels(model: nn.Module, plan: PruningPlan) -> Iterator[None]:
    """Where norms that take the mean off write the stream themselves, they see the kept channels only."""
    axes, channels = probe_axes(model.config), torch.tensor(plan.hidden)

    def hook(module: Any, args: tuple[Tensor], output: Tensor) -> Tensor:
        inputs = args[0][..., channels]
        normal = nn.functional.layer_norm(inputs, inputs.shape[-1:], eps=module.eps)
        result = torch.zeros_like(output)
        result[..., channels] = normal * module.weight[channels] + (0 if module.bias is None else module.bias[channels])
        return result

    handles = []
    for name, module in model.named_modules():
        norm = axes.behaviour.norms.get(axes.template(name))
        if stream_is_centred_by_norms(axes) and norm is not None and norm.centres:
            handles.append(module.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _outputs(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits, or the last hidden state of a model without a head."""
    result: Tensor = model(input_ids=ids)[0]
    return result


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
