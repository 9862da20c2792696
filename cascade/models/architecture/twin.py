"""A tiny random model of an architecture: small enough to build, run and cut in milliseconds."""

from typing import Any

import torch
from torch import nn

from cascade.models.architecture.dims import ModelDims, config_with_dims, dims_of
from cascade.models.architecture.model_class import model_from_config

EPSILON_KEYS = (
    "rms_norm_eps",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "norm_epsilon",
    "norm_eps",
)
"""Config keys of the norms' epsilon."""

_VOCABULARY, _WINDOW = 64, 5


def probe_values(values: dict[str, Any]) -> dict[str, Any]:
    """A config's values without those that depend on its sizes: special tokens, quantisation, lists of factors."""
    padding = values.get("pad_token_id")
    changed: dict[str, Any] = {"quantization_config": None, "bos_token_id": 1, "eos_token_id": 2}
    # A padding id beyond a small vocabulary would stop nn.Embedding; RoBERTa counts positions from its own.
    changed["pad_token_id"] = padding if isinstance(padding, int) and padding < _VOCABULARY else None
    return _without_factor_lists(values) | changed


def _without_factor_lists(values: dict[str, Any]) -> dict[str, Any]:
    """The values with plain rotary positions where factors are listed one by one: such lists are half a head long."""
    rope = values.get("rope_parameters")
    values = {name: value for name, value in values.items() if name != "rope_scaling"}
    if isinstance(rope, dict) and any(isinstance(value, list) for value in rope.values()):
        plain = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
        values["rope_parameters"] = plain | {"rope_type": "default"}
    return values


def twin_of(config: Any, *, seed: int = 0, dims: ModelDims | None = None, epsilon: float | None = None) -> nn.Module:
    """A small random model of the same architecture in float32, norm weights and biases included in the randomness.

    The default dims keep the parent's head_dim, whose rotary factors may be listed one by one. Windows of attention
    are made shorter than the proof's texts. `epsilon` sets that of the norms, where the config has one.
    """
    before, architectures = dims_of(config), config.architectures
    if dims is None:
        dims = small_dims(config)
    if before.num_key_value_heads == before.num_attention_heads:  # whole heads are cut there
        dims = dims.replace(num_key_value_heads=dims.num_attention_heads)
    config = type(config)(**_without_factor_lists(config.to_dict()))
    config.architectures = architectures
    values = config_with_dims(config, dims).to_dict()
    padding = values.get("pad_token_id")
    values |= {
        "pad_token_id": padding if isinstance(padding, int) and padding < dims.vocab_size else None,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if isinstance(values.get("sliding_window"), int):
        values["sliding_window"] = _WINDOW
    if epsilon is not None:
        values |= {key: epsilon for key in EPSILON_KEYS if key in values}
    for key in ("architectures", "transformers_version"):
        values.pop(key, None)
    small = type(config)(**values)
    small.architectures = config.architectures
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any = model_from_config(small)
    generator = torch.Generator().manual_seed(seed)
    lookups = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter += 0.3 * noise
            else:
                parameter.copy_(noise if id(parameter) in lookups else noise / parameter.shape[-1] ** 0.5)
    result: nn.Module = model.eval()
    return result


def small_dims(config: Any) -> ModelDims:
    """Dims of a twin with the config's head_dim, and with the hidden size that follows from it where it must."""
    before = dims_of(config)
    wired = before.num_attention_heads * before.head_dim == before.hidden_size and not hasattr(config, "head_dim")
    return ModelDims(
        hidden_size=4 * before.head_dim if wired else 48,
        intermediate_size=20,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=before.head_dim,
        vocab_size=_VOCABULARY,
    )
