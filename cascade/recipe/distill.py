"""The `distill` section: how members are recovered."""

from typing import Annotated, Literal

from pydantic import Field

from cascade.recipe.section import Fraction, PositiveFloat, PositiveInt, Section

WITHOUT_EFFECT = ("microbatch_size", "save_every_minutes", "gradient_checkpointing")
"""Keys that change memory, speed and safety, and the result at most by rounding."""


class Distill(Section):
    """Recovery: the student learns from the original parent."""

    tokens: PositiveInt
    """Training tokens of each member."""
    batch_size: PositiveInt = 8
    """Blocks per optimizer step."""
    microbatch_size: PositiveInt = 8
    """Blocks per forward pass; changes memory and speed, not the result."""
    learning_rate: Literal["auto"] | PositiveFloat = "auto"
    """The schedule's peak. auto: found for each member by short trainings from its own start."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """cosine: down from the warm-up on; wsd: stable at the peak, then a linear decay."""
    decay_fraction: Fraction = 0.2
    """wsd: share of the steps that decay."""
    warmup_fraction: Fraction = 0.05
    """Share of the steps with a linear warm-up."""
    final_learning_rate_fraction: Fraction = 0.05
    """Where the schedule ends, as a share of the peak."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: PositiveFloat = 1.0
    loss: Literal["forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd", "ghost_top_k"] = (
        "forward_kl"
    )
    """The divergence from the teacher; forward_kl is KL(teacher ‖ student)."""
    temperature: PositiveFloat = 1.0
    """Divides both models' logits."""
    temperature_scale: Literal["tsq", "none"] = "tsq"
    """tsq: the divergence is multiplied by the squared temperature; none: it is not (as in TRL and Liger)."""
    beta: Fraction = 0.5
    """jsd: the teacher's share of the mixture."""
    skew: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """skew_forward_kl, skew_reverse_kl: the share of the first argument in the mixture."""
    top_k: PositiveInt = 64
    """ghost_top_k: ids that keep a probability of their own."""
    cross_entropy_weight: Fraction = 0.0
    """Share of cross-entropy with the text in the loss."""
    gradient_checkpointing: bool = False
    """Compute layers again in the backward pass instead of keeping them: less memory, a third more time."""
    selection_every: PositiveInt = 25
    """Optimizer steps between two looks at the selection loss."""
    selection_blocks: PositiveInt = 16
    save_every_minutes: Annotated[float, Field(ge=0)] = 10.0
    """Minutes between two training states; a run that was killed goes on from the last, to the same bits."""
