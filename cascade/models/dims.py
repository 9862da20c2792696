"""The seven numbers that make a decoder's size, by their Hugging Face names."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from cascade.errors import UserError

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

    def as_dict(self) -> dict[str, int]:
        """By Hugging Face name, in a fixed order."""
        return asdict(self)

    def replace(self, **changes: int) -> "ModelDims":
        """A copy with some of the numbers changed."""
        return replace(self, **changes)


def dims_of(config: Any) -> ModelDims:
    """The dims of a transformers config.

    Raises:
        UserError: the config lacks one of them under its Hugging Face name.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    missing = [name for name in DIM_NAMES[:4] + DIM_NAMES[6:] if getattr(text, name, None) is None]
    if missing:
        raise UserError(
            f"model type '{config.model_type}' has no {', '.join(missing)} in its config; not supported yet"
        )
    heads = text.num_attention_heads
    return ModelDims(
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        num_hidden_layers=text.num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        vocab_size=text.vocab_size,
    )


def config_with_dims(config: Any, dims: ModelDims, *, kept_layers: list[int] | None = None) -> Any:
    """A new config of the same class with these dims; per-layer lists follow `kept_layers` (default: the first ones).

    `head_dim` is always written, as older configs derive it from hidden_size / num_attention_heads.

    Raises:
        ValueError: the architecture's own config class does not accept the dims.
    """
    values = config.to_dict()
    old_depth = values["num_hidden_layers"]
    kept = list(range(dims.num_hidden_layers)) if kept_layers is None else kept_layers
    for name, value in list(values.items()):
        if isinstance(value, list) and len(value) == old_depth and name in _PER_LAYER_LISTS:
            # A deeper twin than the original repeats the last entry.
            values[name] = [value[min(layer, old_depth - 1)] for layer in kept]
    # Qwen's sliding window starts at this layer; layer_types, sliced above, already says so.
    if "max_window_layers" in values and values.get("layer_types"):
        values["max_window_layers"] = min(values["max_window_layers"], dims.num_hidden_layers)
    values |= dims.as_dict()
    for name in ("architectures", "transformers_version", "quantization_config"):
        values.pop(name, None)
    try:
        rebuilt = type(config)(**values)
    except Exception as error:  # transformers' strict dataclasses raise several unrelated classes
        raise ValueError(f"{type(config).__name__} does not accept {dims.as_dict()}: {error}") from error
    rebuilt.architectures = config.architectures
    return rebuilt


_PER_LAYER_LISTS = ("layer_types", "no_rope_layers", "mlp_layer_types")
