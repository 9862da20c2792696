"""The dimension that each axis of each weight belongs to, found by probing sizes, not by knowing architectures.

The architecture is built on the meta device (no memory) under configs that differ in one dimension. An axis whose
length changed belongs to that dimension; by how much it changed says how many rows one unit has. What sizes cannot say
comes from a look at a tiny model at work (`behaviour.py`) and, for the order inside a fused weight, from one table.
"""

import json
import re
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers.initialization import no_init_weights

from cascade.models.architecture.behaviour import Behaviour, observe
from cascade.models.architecture.dims import ModelDims, config_with_dims, dims_of
from cascade.models.architecture.model_class import (
    build_on_meta,
    image_shape,
    model_from_config,
    reads_images,
    require_supported,
)
from cascade.models.architecture.parts import Axis, Part
from cascade.models.architecture.twin import probe_values
from cascade.runtime.errors import UserError

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

_H, _KV, _I = "num_attention_heads", "num_key_value_heads", "intermediate_size"

# The order of the parts inside a fused weight, by the module's name. One part: the units themselves hold several rows.
FUSED_LAYOUTS = {
    "qkv_proj": (_H, _KV, _KV),
    "c_attn": (_H, _H, _H),
    "query_key_value": (_H,),
    "gate_up_proj": (_I, _I),
}


@dataclass(frozen=True)
class ModelAxes:
    """The axes of every weight of an architecture."""

    weights: dict[str, tuple[Axis, ...]]
    """By parameter name; a layer's parameters once, with '*' for the layer's number."""
    layers_prefix: str
    """Name of the list of layers, 'model.layers' in most models."""
    tied: dict[str, str]
    """State-dict names that share their storage with a parameter (tied heads), and that parameter."""
    behaviour: Behaviour
    """What a tiny model at work showed: norms, readers and writers of the stream."""
    heads_fill_hidden: bool
    """Whether num_attention_heads x head_dim = hidden_size is wired in, so that both are cut together."""

    def of(self, name: str) -> tuple[Axis, ...]:
        """The axes of one parameter.

        Raises:
            UserError: no probe explains the parameter.
        """
        template = self.template(name)
        if template not in self.weights:
            raise UserError(f"parameter '{name}' is not explained by size-probing; this architecture cannot be cut")
        return self.weights[template]

    def output_axis(self, name: str) -> int | None:
        """Which axis of a matrix is its output; None for what is no matrix of a linear map (embeddings, vectors)."""
        if len(self.of(name)) != 2 or self.module_of(name) in self.behaviour.lookups:
            return None
        return 1 if self.module_of(name) in self.behaviour.transposed else 0

    def reads(self, name: str) -> str | None:
        """The dimension along a matrix's input axis."""
        output = self.output_axis(name)
        return None if output is None else self.of(name)[1 - output].dim

    def writes(self, name: str) -> str | None:
        """The dimension along a matrix's output axis."""
        output = self.output_axis(name)
        return None if output is None else self.of(name)[output].dim

    def is_norm(self, name: str) -> bool:
        """Whether a parameter is the weight of a norm whose length a cut changes (not of one head's width)."""
        return (
            name.endswith(".weight")
            and self.module_of(name) in self.behaviour.norms
            and self.of(name)[0].dim is not None
        )

    def module_of(self, name: str) -> str:
        """The module that a parameter belongs to, with '*' for the layer's number."""
        return self.template(name).rpartition(".")[0]

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
        """The count without every matrix that has the vocabulary as an axis (embeddings, head)."""
        return sum(self._count(name, dims) for name in self.weights if not self._has_vocabulary(name))

    def flops_per_token(self, dims: ModelDims, context: float) -> Any:
        """Forward FLOPs of one token, averaged over a causal context of `context` tokens.

        Two per weight of each matrix product (the head included, embedding look-ups not), and
        4 x (context / 2) x heads x head_dim per layer for attention scores and values.
        """
        products = sum(self._count(name, dims) for name in self.weights if self.output_axis(name) is not None)
        products += sum(self._count(owner, dims) for owner in self.tied.values() if self.output_axis(owner) is None)
        attention = 2 * context * dims.num_attention_heads * dims.head_dim * dims.num_hidden_layers
        return 2.0 * products + attention

    def flops_once(self, dims: ModelDims) -> Any:
        """Of `flops_per_token`, those that a text costs once, whatever its length."""
        pooled = self.behaviour.pooled
        return 2.0 * sum(
            self._count(name, dims)
            for name in self.weights
            if self.module_of(name) in pooled and self.output_axis(name) is not None
        )

    def cache_bytes_per_token(self, dims: ModelDims, bytes_per_value: int) -> Any:
        """Bytes of keys and values that one token leaves in the cache (without sliding windows)."""
        return 2 * dims.num_hidden_layers * dims.num_key_value_heads * dims.head_dim * bytes_per_value

    def _has_vocabulary(self, name: str) -> bool:
        return len(self.weights[name]) == 2 and any(axis.dim == "vocab_size" for axis in self.weights[name])

    def _count(self, name: str, dims: ModelDims) -> Any:
        count: Any = dims.num_hidden_layers if ".*." in name else 1
        for axis in self.weights[name]:
            count = count * axis.length(dims)  # not in place: dims may hold arrays
        return count


@dataclass(frozen=True)
class CountedAxes(ModelAxes):
    """Axes of an image model, which is not cut: its weights are counted as they are, whatever the dims."""

    total: int = 0
    """Parameters."""
    flops: float = 0.0
    """Forward FLOPs of one image."""

    def num_parameters(self, dims: ModelDims) -> Any:
        """The count of all weights, whatever `dims` are."""
        return self.total

    def num_parameters_non_embedding(self, dims: ModelDims) -> Any:
        """The count of all weights, as there is no vocabulary."""
        return self.total

    def flops_per_token(self, dims: ModelDims, context: float) -> Any:
        """Forward FLOPs of one image."""
        return self.flops


def _image_axes(config: Any) -> CountedAxes:
    model = build_on_meta(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(pixel_values=torch.empty(1, *image_shape(config), device="meta"))
    nothing = Behaviour({}, frozenset(), frozenset(), frozenset(), {}, {}, False, 0.0)
    return CountedAxes({}, "", {}, nothing, False, total, float(counter.get_total_flops()))


def probe_axes(config: Any) -> ModelAxes:
    """The axes of every weight of the architecture of `config`.

    Raises:
        UserError: the architecture cannot be built at other sizes, an axis does not follow one dimension, or it has
            units of another kind (experts, states).
    """
    require_supported(config)
    if reads_images(config):
        return _image_axes(config)
    return _probe(config.__class__, config.to_json_string(use_diff=False), tuple(config.architectures or ()))


@lru_cache(maxsize=64)
def _probe(config_class: Any, config_json: str, architectures: tuple[str, ...]) -> ModelAxes:
    config = config_class(**probe_values(json.loads(config_json)))
    config.architectures = list(architectures) or None
    dims_of(config)
    base, tied = _shapes(config, _BASE)
    probes = {dim: _shapes(config, _BASE.replace(**{dim: size}))[0] for dim, size in _STEPS.items()}
    heads_fill_hidden = probes["head_dim"] == base
    prefix = _layers_prefix(config, base)
    behaviour = observe(config, prefix)
    weights = {}
    for name, shape in base.items():
        template = name.replace(f"{prefix}.0.", f"{prefix}.*.", 1)
        module = template.rpartition(".")[0]
        output = (1 if module in behaviour.transposed else 0) if len(shape) == 2 else 0
        axes = []
        for position, length in enumerate(shape):
            moved = {dim: probe[name][position] for dim, probe in probes.items() if probe[name][position] != length}
            is_input = len(shape) == 2 and position != output
            if heads_fill_hidden and module in (behaviour.writers if is_input else behaviour.readers):
                # Sizes cannot tell heads from hidden channels here; what reads the stream writes heads, and back.
                moved = _heads_for_hidden(moved, length)
            axes.append(_explain(name, length, moved, heads_fill_hidden))
        weights[template] = tuple(axes)
    return ModelAxes(weights, prefix, tied, behaviour, heads_fill_hidden)


def _heads_for_hidden(moved: dict[str, int], length: int) -> dict[str, int]:
    if moved.keys() != {"hidden_size"}:
        return moved
    # As if the heads were twice as many, of the same width: what doubling the hidden size did.
    return {"num_attention_heads": moved["hidden_size"], "head_dim": -1}


def _explain(name: str, base: int, moved: dict[str, int], heads_fill_hidden: bool) -> Axis:
    """What an axis of length `base` is made of, given its length under each dimension's step that changed it."""
    dims = _BASE.replace(head_dim=_BASE.hidden_size // _BASE.num_attention_heads) if heads_fill_hidden else _BASE
    by_head_dim = "head_dim" in moved
    scale = dims.head_dim if by_head_dim else 1
    if not moved:
        return Axis((Part(None, base),))
    if moved.keys() == {"head_dim"} and base % scale == 0:
        return Axis((Part(None, base // scale, True),))
    counts = {
        dim: (length - base) // ((_STEPS[dim] - getattr(dims, dim)) * scale)
        for dim, length in moved.items()
        if dim != "head_dim"
    }
    if sum(count * getattr(dims, dim) * scale for dim, count in counts.items()) == base:
        if list(counts.values()) == [1]:
            return Axis((Part(next(iter(counts)), 1, by_head_dim),))
        layout = FUSED_LAYOUTS.get(name.split(".")[-2])
        if layout is not None and len(layout) == 1 and counts.keys() == set(layout):
            return Axis((Part(layout[0], counts[layout[0]], by_head_dim),))
        if layout is not None and counts == Counter(layout):
            return Axis(tuple(Part(dim, 1, by_head_dim) for dim in layout))
    raise UserError(
        f"parameter '{name}': an axis of length {base} follows {sorted(moved)} in a way that size-probing does not "
        f"explain; if it is a fused weight, its layout is missing (known: {', '.join(FUSED_LAYOUTS)}). This "
        "architecture cannot be cut yet"
    )


def _shapes(config: Any, dims: ModelDims) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    try:
        with no_init_weights():  # memory that nobody touches; quicker than the meta device
            model = model_from_config(config_with_dims(config, dims))
            model.tie_weights()  # which building does only where it initialises
    except UserError:
        raise
    except Exception as error:  # any architecture's constructor: whatever it raises means the same to the user
        raise UserError(
            f"model type '{config.model_type}' cannot be built at other sizes, so not cut: {error}"
        ) from error
    parameters = dict(model.named_parameters())
    owners = {id(parameter): name for name, parameter in parameters.items()}
    everywhere = dict(model.named_parameters(remove_duplicate=False))
    tied = {name: owners[id(parameter)] for name, parameter in everywhere.items() if name not in parameters}
    return {name: tuple(parameter.shape) for name, parameter in parameters.items()}, tied


def _layers_prefix(config: Any, one_layer: dict[str, tuple[int, ...]]) -> str:
    two_layers, _ = _shapes(config, _BASE.replace(num_hidden_layers=2))
    prefixes = {name.split(".1.")[0] for name in two_layers if name not in one_layer}
    if len(prefixes) != 1:
        raise UserError(f"model type '{config.model_type}': expected one list of layers, found {sorted(prefixes)}")
    return prefixes.pop()
