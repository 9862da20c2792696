"""The `prune` section: what units are scored by, which shape is cut, and what is done to the weights that stay."""

from typing import Annotated, Literal

from pydantic import Field

from cascade.recipe.section import PositiveInt, Section


class Repair(Section):
    """Refitting the weights that stay, in closed form, before any training."""

    method: Literal["auto", "sequential", "independent", "none"] = "auto"
    """sequential: each weight on the already cut stream, also towards what the stream has lost; independent: each on
    the parent's own activations; auto: both, and the better one on selection blocks (or neither)."""
    num_blocks: PositiveInt = 32
    """Calibration blocks, spread over the split."""


class Search(Section):
    """Choosing a member's shape by trying several that meet its target."""

    candidates: Annotated[int, Field(ge=2)] = 8
    """Shapes that are cut, repaired and recovered on a quarter of `tokens`; ranked by KL to the teacher on selection
    blocks."""
    finalists: PositiveInt = 3
    """The best of them, which are recovered again, and longer, as rankings flip with training."""
    tokens: PositiveInt = 20_000
    """Training tokens of each finalist."""


class Prune(Section):
    """How a member is cut from its seed."""

    layers: Literal[
        "block_influence", "norm_ratio", "removal_loss", "removal_logits", "contiguous_angle", "contiguous_loss"
    ] = "block_influence"
    """The score of layers. Those by removal cost forward passes for every cut."""
    heads: Literal["activation_norm", "contribution"] = "activation_norm"
    """The score of heads, inside each key/value group."""
    neurons: Literal["activation_norm", "contribution", "taylor", "hessian"] = "activation_norm"
    """The score of neurons, inside each layer. taylor and hessian need gradients."""
    hidden: Literal["auto", "activation_norm", "pca"] = "auto"
    """The score of hidden channels. pca rotates the stream to its principal axes first, and unties the embeddings;
    auto: members with a size to meet are cut both ways, repaired and recovered on a twentieth of their tokens, and what
    is then nearer the parent on selection blocks stays; with explicit dims, pca where the norms allow it and the
    embeddings are small or untied already."""
    merge_heads: bool = False
    """Add to the weakest kept query heads what they differ by from the strongest removed ones (Minitron)."""
    repair: Repair = Repair()
    search: Search | None = None
    """Search the shape of members whose target is a bound; without it the shape is taken that loses least
    by what its axes have lost (`cascade.pruning.size.shape`)."""
