"""Proof of the cut on a tiny twin: the pruned model equals the parent with the removed units silenced.

The twin has the parent's architecture, small sizes and non-trivial weights, so the proof takes a fraction of a
second, needs no real weight and runs before any is touched.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from cascade.errors import UserError
from cascade.importance.scores import Scores
from cascade.models.axes import ModelAxes, probe_axes
from cascade.models.dims import ModelDims, config_with_dims, dims_of
from cascade.pruning.cut import prune
from cascade.pruning.plan import PruningPlan, plan_pruning

_TWIN = ModelDims(
    hidden_size=48,
    intermediate_size=20,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=64,
)
_CUTS = {
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 13,
    "hidden_size": 32,
}
PROOF_TOLERANCE = 1e-4
"""Largest difference of logits, relative to the largest logit, that counts as equal in float32."""


def prove_cuts(config: Any, *, along: Sequence[str] = tuple(_CUTS), seed: int = 0) -> dict[str, float]:
    """Largest relative difference of logits between pruned and silenced, for a cut along each axis and all at once.

    Raises:
        UserError: a difference is above PROOF_TOLERANCE, so this architecture cannot be cut along that axis.
    """
    twin = twin_of(config, seed=seed)
    differences = {}
    wanted = {dim: size for dim, size in _CUTS.items() if dim in along}
    for name, cuts in [*((dim, {dim: size}) for dim, size in wanted.items()), ("all axes", wanted)]:
        target = dims_of(twin.config).replace(**cuts)
        if dims_of(twin.config).num_key_value_heads == dims_of(twin.config).num_attention_heads:
            target = target.replace(num_key_value_heads=target.num_attention_heads)
        plan = plan_pruning(random_scores(twin, seed=seed), twin.config, target)
        differences[name] = silenced_difference(twin, plan, seed=seed)
        if not differences[name] <= PROOF_TOLERANCE:
            raise UserError(
                f"model type '{config.model_type}' cannot be cut along {name} yet: on a tiny twin the pruned model's "
                f"logits differ from the silenced parent's by {differences[name]:.1e} (at most {PROOF_TOLERANCE:.0e})"
            )
    return differences


def silenced_difference(model: nn.Module, plan: PruningPlan, *, seed: int = 0) -> float:
    """Max |pruned - silenced| / max |silenced| over the logits of random ids."""
    silenced = silence(model, plan)
    ids = torch.randint(0, dims_of(model.config).vocab_size, (2, 12), generator=_generator(seed))
    with torch.inference_mode():
        expected: Tensor = silenced(input_ids=ids, use_cache=False).logits
        # Cut the silenced model, not the original: where removed channels carry nothing the cut is exact.
        actual: Tensor = prune(silenced, plan)(input_ids=ids, use_cache=False).logits
    return float((actual - expected).abs().max() / expected.abs().max())


def silence(model: nn.Module, plan: PruningPlan) -> nn.Module:
    """A copy of the model, of the same size, in which the units that the plan removes write nothing."""
    axes = probe_axes(model.config)
    copy: Any = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    copy.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name, weight in copy.named_parameters():
            _silence_weight(name, weight, axes, plan)
    result: nn.Module = copy.eval()
    return result


def twin_of(config: Any, *, seed: int = 0, dims: ModelDims = _TWIN) -> nn.Module:
    """A small random model of the same architecture, norm weights and biases included in the randomness."""
    before = dims_of(config)
    if before.num_key_value_heads == before.num_attention_heads:  # whole heads are cut there
        dims = dims.replace(num_key_value_heads=dims.num_attention_heads)
    values = config_with_dims(config, dims).to_dict() | {
        "pad_token_id": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any = AutoModelForCausalLM.from_config(type(config)(**values), dtype=torch.float32)
    generator = _generator(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter += 0.3 * noise
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    result: nn.Module = model.eval()
    return result


def random_scores(model: nn.Module, *, seed: int = 0) -> Scores:
    """Scores that make every kept set arbitrary."""
    dims, generator = dims_of(model.config), _generator(seed)
    draw: Callable[..., Tensor] = lambda *shape: torch.rand(*shape, generator=generator)  # noqa: E731
    depth = dims.num_hidden_layers
    return Scores(
        layers=draw(depth),
        heads=draw(depth, dims.num_attention_heads),
        neurons=draw(depth, dims.intermediate_size),
        hidden=draw(dims.hidden_size),
    )


def _silence_weight(name: str, weight: Tensor, axes: ModelAxes, plan: PruningPlan) -> None:
    weight_axes, layer = axes.of(name), axes.layer_of(name)
    # The stream's writers: matrices with the hidden size along their first axis, their biases, and the embedding.
    along_hidden = weight_axes[0].dim == "hidden_size"
    writes = along_hidden and (len(weight_axes) == 2 or name.endswith(".bias"))
    embeds = weight_axes[0].dim == "vocab_size" and weight_axes[-1].dim == "hidden_size" and "head" not in name
    removed = sorted(set(range(plan.source_dims.hidden_size)) - set(plan.hidden))
    if writes:
        weight[removed] = 0
    if embeds:
        weight[:, removed] = 0
    if layer is None or not writes:
        return
    if layer not in plan.layers:
        weight.zero_()
        return
    if len(weight_axes) == 1:
        return
    place = plan.layers.index(layer)
    kept = {"intermediate_size": plan.neurons[place], "num_attention_heads": plan.heads[place]}.get(
        weight_axes[1].dim or ""
    )
    if kept is not None:
        rows = (
            plan.source_dims.head_dim
            if weight_axes[1].rows_per_unit == "head_dim"
            else int(weight_axes[1].rows_per_unit)
        )
        mask = torch.ones(weight.shape[1] // rows, dtype=torch.bool)
        mask[kept] = False
        weight[:, mask.repeat_interleave(rows)] = 0


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
