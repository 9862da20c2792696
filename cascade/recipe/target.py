"""The `target` of a member: how large it shall be."""

from typing import Literal

from pydantic import field_validator, model_validator

from cascade.recipe.section import PositiveInt, Section


class TargetSize(Section):
    """The size of a member: a parameter count, explicit dims, or both."""

    params: float | None = None
    """Parameters: a fraction of the parent's (at most 1) or a number. Bounds can be combined; all hold."""
    params_non_embedding: float | None = None
    """Parameters without embeddings and head: a fraction or a number."""
    flops_per_token: float | None = None
    """Forward FLOPs of one token at a context of `context` tokens: a fraction or a number."""
    memory_bytes: float | None = None
    """Weights, and keys and values of `batch_size` sequences of `context` tokens, 2 bytes each: a fraction or bytes."""
    decode_ms: float | None = None
    """Milliseconds of one decoding step of `batch_size` sequences after `context` tokens, measured on this machine: a
    fraction of the parent's (at most 1), or milliseconds."""
    context: PositiveInt = 2048
    """Tokens."""
    batch_size: PositiveInt = 1
    """Sequences."""
    dims: dict[
        Literal["num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"],
        PositiveInt,
    ] = {}
    """num_hidden_layers, hidden_size, intermediate_size, num_attention_heads, num_key_value_heads (whole groups)."""

    @field_validator("params", "params_non_embedding", "flops_per_token", "memory_bytes")
    @classmethod
    def _positive(cls, bound: float | None) -> float | None:
        if bound is not None and not (0 < bound <= 1 or bound >= 1000):
            raise ValueError(
                f"{bound:g} is neither a fraction of the parent's (above 0, at most 1) nor a number (from 1000 on)"
            )
        return bound

    @field_validator("decode_ms")
    @classmethod
    def _time(cls, milliseconds: float | None) -> float | None:
        if milliseconds is not None and milliseconds <= 0:
            raise ValueError(f"{milliseconds:g} is not above 0")
        return milliseconds

    @model_validator(mode="after")
    def _something(self) -> "TargetSize":
        if not self.has_bounds() and not self.dims:
            raise ValueError("give `params`, another bound, or `dims`")
        return self

    def has_bounds(self) -> bool:
        """Whether it says more than explicit dims."""
        bounds = (self.params, self.params_non_embedding, self.flops_per_token, self.memory_bytes, self.decode_ms)
        return any(bound is not None for bound in bounds)
