"""Corrections of the weights that stay after a cut: norms and scales whose values depend on the hidden size."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from cascade.models.architecture.axes import ModelAxes
from cascade.models.architecture.twin import EPSILON_KEYS
from cascade.pruning.importance.statistics import Statistics

if TYPE_CHECKING:
    from cascade.pruning.plan import PruningPlan


def corrected(plan: "PruningPlan", axes: ModelAxes, statistics: Statistics | None) -> "PruningPlan":
    """The plan with the factors on norms and scaled weights that its cut needs, and the norms' epsilon.

    A norm divides by the root of a mean square, and over fewer channels that mean is another. With `statistics` its
    weight is multiplied by the root of the mean energy that the kept channels really carry (all channels' mean being
    1); without, as if the removed ones carried nothing: sqrt(D / D').
    """
    norm_scales = {
        name: scale for name in _all_names(plan, axes) if (scale := _norm_scale(name, plan, axes, statistics)) != 1.0
    }
    scales: dict[str, float] = {}
    ratio = plan.source_dims.hidden_size / plan.target_dims.hidden_size
    exponent = axes.behaviour.embedding_exponent
    if exponent and ratio != 1:
        embedding = next(name for name in axes.weights if axes.module_of(name) in axes.behaviour.lookups)
        scales[embedding] = ratio**exponent
        if embedding in axes.tied.values() and plan.rotation is None:  # a rotation has untied them
            # The head reads the same weight, so its norm gives the factor back.
            for name in axes.weights:
                facts = axes.behaviour.norms.get(axes.module_of(name))
                if facts is None or "*" in name or facts.writes_stream:
                    continue
                if name.endswith(".weight"):
                    norm_scales[name] = norm_scales.get(name, 1.0) / ratio**exponent
                else:
                    scales[name] = ratio**-exponent
    config = dict(plan.target_config)
    for key in EPSILON_KEYS:
        if key in config and ratio != 1 and _norms_share_no_epsilon(axes):
            # Exact where the removed channels carry nothing: the mean over fewer channels is larger by this factor.
            config[key] *= ratio
    return replace(plan, norm_scales=norm_scales, scales=scales, target_config=config)


def stream_is_centred_by_norms(axes: ModelAxes) -> bool:
    """Whether a LayerNorm writes the stream (BERT), so that no linear map can keep the kept channels' mean at zero."""
    return any(norm.centres and norm.writes_stream for norm in axes.behaviour.norms.values())


def _all_names(plan: "PruningPlan", axes: ModelAxes) -> list[str]:
    """The source's norms that stay, by parameter name."""
    names = [name for name in axes.weights if axes.is_norm(name)]
    return [
        name.replace("*", str(layer)) for name in names for layer in (plan.layers if "*" in name else plan.layers[:1])
    ]


def _norm_scale(name: str, plan: "PruningPlan", axes: ModelAxes, statistics: Statistics | None) -> float:
    part = axes.of(name)[0].parts[0]
    units, total = plan.units(part.dim, axes.layer_of(name)), getattr(plan.source_dims, part.dim or "")
    if units is None or len(units) == total:
        return 1.0
    rotated = plan.rotation is not None and part.dim == "hidden_size"
    measured = {} if statistics is None else statistics.rotated_energies if rotated else statistics.norm_energies
    if name in measured:
        energies = measured[name].view(total, -1)
        return float(energies[torch.tensor(units)].double().mean().sqrt())
    norm = axes.behaviour.norms[axes.module_of(name)]
    if norm.centres and stream_is_centred_by_norms(axes):
        return 1.0  # such a norm's statistics are those of the kept channels, whatever the removed ones carried
    return float((total / len(units)) ** 0.5)


def _norms_share_no_epsilon(axes: ModelAxes) -> bool:
    """Whether every norm spans the hidden size, so that the config's epsilon is theirs alone."""
    weights: dict[str, Any] = {axes.module_of(name): axes.of(name)[0].dim for name in axes.weights}
    return not stream_is_centred_by_norms(axes) and all(
        weights[module] == "hidden_size" for module in axes.behaviour.norms
    )
