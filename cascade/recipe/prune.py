"""The `prune` section: what units are scored by, which shape is cut, and what is done to the weights that stay."""

from typing import Annotated, Literal

from pydantic import Field

from cascade.pruning.importance.table import HEAD_SCORES, HIDDEN_SCORES, LAYER_SCORES, NEURON_SCORES
from cascade.recipe.section import OneOf, PositiveInt, Section


class Repair(Section):
    """Refitting the remaining weights in closed form after a cut, before any training."""

    method: Literal["auto", "sequential", "independent", "none"] = "auto"
    """`sequential`: each weight is refitted on the stream of the cut model, also towards what the stream has lost so
    far; `independent`: each on the parent's own activations; `auto`: whichever of the two is better on selection text,
    or neither; `none`: no repair."""
    num_blocks: PositiveInt = 32
    """Blocks of the calibration split, spread over it."""


class Search(Section):
    """Choosing a member's shape by trying several shapes that meet its target."""

    candidates: Annotated[int, Field(ge=2)] = 8
    """Number of shapes that are cut, repaired and recovered on a quarter of `tokens`, then ranked by KL to the teacher
    on selection text."""
    finalists: PositiveInt = 3
    """Number of the best candidates that are recovered again on all of `tokens`, because rankings change with
    training."""
    tokens: PositiveInt = 20_000
    """Training tokens of each finalist."""


class Prune(Section):
    """How a member is cut from the model that its `seed` names."""

    layers: Annotated[str, OneOf(*LAYER_SCORES)] = "block_influence"
    """Importance score of layers. `block_influence`: 1 - cosine similarity of a layer's input and output; `norm_ratio`:
    norm of its output over norm of its input; `removal_loss`, `removal_logits`: the loss, or the change of the logits,
    without the layer; `contiguous_angle`, `contiguous_loss`: the run of adjacent layers whose removal turns the stream,
    or raises the loss, least. Scores by removal take forward passes for every layer."""
    heads: Annotated[str, OneOf(*HEAD_SCORES)] = "activation_norm"
    """Importance score of query heads, inside each key/value group."""
    neurons: Annotated[str, OneOf(*NEURON_SCORES)] = "activation_norm"
    """Importance score of MLP neurons, inside each layer. `taylor` and `hessian` need gradients."""
    hidden: Annotated[str, OneOf("auto", *HIDDEN_SCORES)] = "auto"
    """Importance score of hidden channels. `pca` rotates the stream to its principal axes first, and unties the
    embeddings; `auto`: members with a bound in their target are cut both ways, repaired and recovered on a twentieth of
    their tokens, and the one nearer to the parent on selection text is taken; with explicit dims, `pca` where the norms
    allow it and the embeddings are small or untied already."""
    merge_heads: bool = False
    """Add to the weakest remaining query heads what they differ by from the strongest removed ones (Minitron)."""
    repair: Repair = Repair()
    """Refit the remaining weights in closed form."""
    search: Search | None = None
    """Search the shape of members whose target has a bound. Not given: the shape that loses least by what its axes have
    lost (`cascade.pruning.size.shape`)."""
