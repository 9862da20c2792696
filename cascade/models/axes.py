"""Which axis of which weight belongs to which dimension, found by probing sizes, not by knowing architectures.

The architecture is built on the meta device (no memory) under configs that differ in one dimension. An axis whose
length changed belongs to that dimension; by how much it changed says how many rows one unit has.
"""

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from cascade.errors import UserError
from cascade.models.dims import ModelDims, config_with_dims, dims_of

PROBED = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)

# Legal in every architecture tried, all different, so that no two axes have one length by accident.
_BASE = ModelDims(
    hidden_size=768,
    intermediate_size=176,
    num_hidden_layers=1,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=24,
    vocab_size=320,
)
_STEPS = {
    "hidden_size": 1536,
    "intermediate_size": 240,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 40,
    "vocab_size": 448,
}


@dataclass(frozen=True)
class Axis:
    """One axis of one weight."""

    dim: str | None
    """The dimension whose units lie along it: a name of PROBED, or None for a fixed length."""
    rows_per_unit: int | str
    """Consecutive rows that one unit takes: a number, or 'head_dim'."""

    def length(self, dims: ModelDims) -> Any:
        """The axis's length under `dims`; a fixed axis has its own length in `rows_per_unit`."""
        rows = dims.head_dim if self.rows_per_unit == "head_dim" else int(self.rows_per_unit)
        return rows if self.dim is None else rows * getattr(dims, self.dim)


@dataclass(frozen=True)
class ModelAxes:
    """The axes of every weight of an architecture."""

    weights: dict[str, tuple[Axis, ...]]
    """By parameter name; a layer's parameters once, with '*' for the layer's number."""
    layers_prefix: str
    """Name of the list of layers, 'model.layers' in most models."""
    tied: tuple[str, ...]
    """State-dict names that share their storage with another name (tied heads)."""

    def of(self, name: str) -> tuple[Axis, ...]:
        """The axes of one parameter.

        Raises:
            UserError: no probe explains the parameter.
        """
        template = self.template(name)
        if template not in self.weights:
            raise UserError(f"parameter '{name}' is not explained by size-probing; this architecture cannot be cut")
        return self.weights[template]

    def is_norm(self, name: str) -> bool:
        """Whether a parameter is the weight of a norm over the residual stream (and not some matrix's bias)."""
        axes = self.of(name)
        return len(axes) == 1 and axes[0].dim == "hidden_size" and name.endswith(".weight")

    def template(self, name: str) -> str:
        """The parameter's name with the layer's number replaced by '*'."""
        return re.sub(rf"^{re.escape(self.layers_prefix)}\.\d+\.", f"{self.layers_prefix}.*.", name)

    def layer_of(self, name: str) -> int | None:
        """The number of the layer that a parameter belongs to, or None."""
        match = re.match(rf"^{re.escape(self.layers_prefix)}\.(\d+)\.", name)
        return int(match[1]) if match else None

    def num_parameters(self, dims: ModelDims) -> Any:
        """Exact count under `dims` (numbers, or arrays of candidates), each tied weight once."""
        return sum(self._count(name, dims) for name in self.weights)

    def num_parameters_non_embedding(self, dims: ModelDims) -> Any:
        """The count without every weight that has the vocabulary as an axis (embeddings, head)."""
        return sum(self._count(name, dims) for name in self.weights if not self._has_vocabulary(name))

    def flops_per_token(self, dims: ModelDims, context: int) -> Any:
        """Forward FLOPs of one token, averaged over a causal context of `context` tokens.

        Two per weight of each matrix product (the head included, the embedding look-up not), and
        4 x (context / 2) x heads x head_dim per layer for attention scores and values.
        """
        layers_and_head = sum(self._count(name, dims) for name, axes in self.weights.items() if len(axes) >= 2) - (
            0 if self.tied else self._count(self._embedding(), dims)
        )
        attention = 2 * context * dims.num_attention_heads * dims.head_dim * dims.num_hidden_layers
        return 2.0 * layers_and_head + attention

    def _embedding(self) -> str:
        return next(name for name in self.weights if self._has_vocabulary(name))

    def _has_vocabulary(self, name: str) -> bool:
        return any(axis.dim == "vocab_size" for axis in self.weights[name])

    def _count(self, name: str, dims: ModelDims) -> Any:
        count: Any = dims.num_hidden_layers if ".*." in name else 1
        for axis in self.weights[name]:
            count = count * axis.length(dims)  # not in place: dims may hold arrays
        return count


def probe_axes(config: Any) -> ModelAxes:
    """The axes of every weight of the architecture of `config`.

    Raises:
        UserError: the architecture cannot be built at other sizes, or an axis does not follow one dimension.
    """
    return _probe(config.__class__, config.to_json_string(use_diff=False))


def build_on_meta(config: Any) -> nn.Module:
    """The model of a config without memory for its weights."""
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config)
    return model


@lru_cache(maxsize=8)
def _probe(config_class: Any, config_json: str) -> ModelAxes:
    config = config_class(**_without_special_tokens(json.loads(config_json)))
    dims_of(config)
    base_shapes, tied = _shapes(config, _BASE)
    prefix = _layers_prefix(config, base_shapes)
    probes = {dim: _shapes(config, _BASE.replace(**{dim: value}))[0] for dim, value in _STEPS.items()}
    weights = {}
    for name, shape in base_shapes.items():
        template = name.replace(f"{prefix}.0.", f"{prefix}.*.", 1)
        weights[template] = tuple(
            _explain(name, length, {dim: probe[name][position] for dim, probe in probes.items()})
            for position, length in enumerate(shape)
        )
    return ModelAxes(weights, prefix, tied)


def _explain(name: str, base: int, changed: dict[str, int]) -> Axis:
    """Which dimension an axis of length `base` follows, given its length when each dimension changes."""
    moved = {dim: length for dim, length in changed.items() if length != base}
    heads = sorted(set(moved) - {"head_dim"})
    if not moved:
        return Axis(None, base)
    if moved.keys() == {"head_dim"} and base == _BASE.head_dim:
        return Axis(None, "head_dim")
    if len(heads) == 1:
        dim = heads[0]
        unit, rest = divmod(moved[dim] - base, _STEPS[dim] - getattr(_BASE, dim))
        rows: int | str = "head_dim" if "head_dim" in moved else unit
        axis = Axis(dim, rows)
        if rest == 0 and axis.length(_BASE) == base:
            return axis
    raise UserError(
        f"parameter '{name}': an axis of length {base} follows {sorted(moved)} in a way that size-probing does not "
        "explain (a fused weight?); this architecture cannot be cut yet"
    )


def _shapes(config: Any, dims: ModelDims) -> tuple[dict[str, tuple[int, ...]], tuple[str, ...]]:
    try:
        model = build_on_meta(config_with_dims(config, dims))
    except Exception as error:  # any architecture's constructor: whatever it raises means the same to the user
        raise UserError(
            f"model type '{config.model_type}' cannot be built at other sizes, so not cut: {error}"
        ) from error
    parameters = dict(model.named_parameters())
    tied = tuple(name for name in model.state_dict() if name not in parameters and name.endswith(".weight"))
    return {name: tuple(parameter.shape) for name, parameter in parameters.items()}, tied


def _layers_prefix(config: Any, one_layer: dict[str, tuple[int, ...]]) -> str:
    two_layers, _ = _shapes(config, _BASE.replace(num_hidden_layers=2))
    prefixes = {name.split(".1.")[0] for name in two_layers if name not in one_layer}
    if len(prefixes) != 1:
        raise UserError(f"model type '{config.model_type}': expected one list of layers, found {sorted(prefixes)}")
    return prefixes.pop()


def _without_special_tokens(values: dict[str, Any]) -> dict[str, Any]:
    # A padding id beyond the twin's small vocabulary would stop nn.Embedding.
    return values | {"pad_token_id": None, "quantization_config": None}
