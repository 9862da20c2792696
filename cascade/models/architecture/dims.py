"""The seven numbers that make a transformer's size, by their Hugging Face names."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from cascade.runtime.errors import UserError

DIM_NAMES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)


@dataclass(frozen=True)
class ModelDims:
    """The size of a model."""

    hidden_size: int
    """Channels of the residual stream."""
    intermediate_size: int
    """Neurons of each MLP."""
    num_hidden_layers: int
    num_attention_heads: int
    """Query heads of each layer."""
    num_key_value_heads: int
    """Equal to num_attention_heads where every query head has a key/value head of its own."""
    head_dim: int
    """Channels of one head."""
    vocab_size: int
    """0 where a model reads no text."""

    def as_dict(self) -> dict[str, int]:
        """Hugging Face name -> size, in a fixed order."""
        return asdict(self)

    def replace(self, **changes: int) -> "ModelDims":
        """A copy with some of the numbers changed."""
        return replace(self, **changes)


def dims_of(config: Any) -> ModelDims:
    """The dims of a transformers config.

    Raises:
        UserError: the config lacks one of them.
    """
    values: dict[str, Any] = {name: getattr(config, _key_of(config, name), None) for name in DIM_NAMES}
    if values["intermediate_size"] is None and values["hidden_size"] is not None and hasattr(config, "n_inner"):
        values["intermediate_size"] = 4 * values["hidden_size"]  # GPT-2's default
    if values["vocab_size"] is None and getattr(config, "image_size", None) is not None:
        values["vocab_size"] = 0  # it reads no text
    missing = [name for name in DIM_NAMES if values[name] is None and name not in ("num_key_value_heads", "head_dim")]
    if missing:
        raise UserError(f"model type '{config.model_type}' has no {', '.join(missing)} in its config; it cannot be cut")
    heads = values["num_attention_heads"]
    values["num_key_value_heads"] = values["num_key_value_heads"] or heads
    values["head_dim"] = values["head_dim"] or values["hidden_size"] // heads
    return ModelDims(**values)


def config_with_dims(config: Any, dims: ModelDims, *, kept_layers: list[int] | None = None) -> Any:
    """A new config of the same class with these dims; per-layer lists follow `kept_layers` (default: the first ones).

    `head_dim` is written explicitly, as many configs derive it from hidden_size / num_attention_heads.

    Raises:
        ValueError: the architecture's own config class does not accept the dims.
    """
    values = config.to_dict()
    before = dims_of(config)
    layers = list(range(dims.num_hidden_layers)) if kept_layers is None else kept_layers
    for name in _PER_LAYER_LISTS:
        if isinstance(values.get(name), list) and len(values[name]) == before.num_hidden_layers:
            # A deeper twin than the original repeats the last entry.
            values[name] = [values[name][min(layer, before.num_hidden_layers - 1)] for layer in layers]
    # Qwen's sliding window starts at this layer: layer_types, sliced above, says so to transformers 5 alone.
    if "max_window_layers" in values and values.get("layer_types"):
        windows = [number for number, kind in enumerate(values["layer_types"]) if kind == "sliding_attention"]
        start = windows[0] if windows else values["max_window_layers"]
        values["max_window_layers"] = min(start, dims.num_hidden_layers)
    for name in _FOLLOW_HIDDEN_SIZE:
        if values.get(name) == before.hidden_size:
            values[name] = dims.hidden_size
    for name, size in dims.as_dict().items():
        key = _key_of(config, name)
        if name == "num_key_value_heads" and not hasattr(config, key):
            continue
        if name == "head_dim" and not hasattr(config, key) and size * dims.num_attention_heads == dims.hidden_size:
            continue
        values[key] = size
    for name in ("architectures", "transformers_version", "quantization_config"):
        values.pop(name, None)
    try:
        rebuilt = type(config)(**values)
    except Exception as error:  # transformers' strict dataclasses raise several unrelated classes
        raise ValueError(f"{type(config).__name__} does not accept {dims.as_dict()}: {error}") from error
    rebuilt.architectures = config.architectures
    return rebuilt


def _key_of(config: Any, name: str) -> str:
    """The config's own key for a dim: configs translate most names themselves, some have another word for the MLP."""
    if name == "intermediate_size":
        return next((key for key in _MLP_KEYS if hasattr(config, key)), name)
    return str(config.attribute_map.get(name, name))


_MLP_KEYS = ("intermediate_size", "ffn_dim", "hidden_dim", "n_inner")
_FOLLOW_HIDDEN_SIZE = ("word_embed_proj_dim",)
_PER_LAYER_LISTS = ("layer_types", "no_rope_layers", "mlp_layer_types")
