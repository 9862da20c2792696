"""The `target` of a member: how large it shall be."""

from typing import Literal

from pydantic import field_validator, model_validator

from cascade.recipe.section import PositiveInt, Section


class TargetSize(Section):
    """The size of a member: upper bounds, explicit dims, or both; all of them hold together."""

    params: float | None = None
    """Parameters: a share of the parent's (at most 1) or a number (from 1000 on)."""
    params_non_embedding: float | None = None
    """Parameters without embeddings and head: a share of the parent's or a number."""
    flops_per_token: float | None = None
    """Forward FLOPs per token at a context of `context` tokens: a share of the parent's or a number."""
    memory_bytes: float | None = None
    """Bytes of the weights, and of keys and values of `batch_size` sequences of `context` tokens, at 2 bytes per
    number: a share of the parent's or a number."""
    decode_ms: float | None = None
    """Milliseconds per decoding step of `batch_size` sequences after `context` tokens, measured on this machine: a
    share of the parent's (at most 1) or milliseconds."""
    context: PositiveInt = 2048
    """Context length in tokens, for `flops_per_token`, `memory_bytes` and `decode_ms`."""
    batch_size: PositiveInt = 1
    """Sequences, for `memory_bytes` and `decode_ms`."""
    dims: dict[
        Literal["num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"],
        PositiveInt,
    ] = {}
    """Explicit sizes by Hugging Face config name. `num_key_value_heads` removes whole groups, with their query
    heads."""

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
