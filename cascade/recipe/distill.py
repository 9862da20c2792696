"""The `distill` section: how members are recovered."""

from typing import Annotated, Literal

from pydantic import Field

from cascade.recipe.section import Fraction, PositiveFloat, PositiveInt, Section

WITHOUT_EFFECT = ("microbatch_size", "save_every_minutes", "gradient_checkpointing", "compile", "trackers")
"""Keys that change memory, speed and safety, and the result at most by rounding."""


class FeatureLosses(Section):
    """Losses on what happens inside, beside the logits."""

    hidden: Literal["auto", "none", "cosine", "mse"] = "auto"
    """Of hidden states, layer by layer, along the layers and channels that the cut has kept. auto: cosine for members
    that are cut, none for a `student`."""
    embedding: Literal["none", "cosine", "mse"] = "none"
    """Of what enters the first layer."""
    relations: list[Literal["qq", "kk", "vv", "qk"]] = []
    """Who attends to whom in the last layer (MiniLM): queries with queries, keys with keys, ..."""
    relation_heads: PositiveInt | None = None
    """What the projections are split into; the most that both models allow where not given."""
    weights: dict[Literal["hidden", "embedding", "relations"], PositiveFloat] = {}
    """1 where not given."""
    balanced: bool = True
    """Together as large as the logit loss, then weighted; else weighted as they are."""


class OnPolicySettings(Section):
    """Batches that the student writes and the teacher judges."""

    fraction: Fraction
    """Share of the optimizer steps."""
    prompt_tokens: PositiveInt = 32
    """Of each block."""
    max_new_tokens: PositiveInt = 64
    temperature: PositiveFloat = 1.0
    """Of the student's sampling."""
    loss: Literal["reverse_kl", "skew_reverse_kl", "skew_forward_kl", "jsd", "forward_kl", "tvd"] = "reverse_kl"
    """The divergence on these batches."""
    buffer_size: Annotated[int, Field(ge=0)] = 0
    """Written batches to keep for another use; 0: none."""
    replay_fraction: Fraction = 0.5
    """Share of these steps that take a kept batch, once the buffer is full."""


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
    optimizer: Literal["adamw", "adamw_8bit", "muon"] = "adamw"
    """adamw_8bit: moments in 8 bits (needs torchao); muon: orthogonalised momentum for the layers' matrices."""
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
    features: FeatureLosses = FeatureLosses()
    """Losses on hidden states, embeddings and attention relations."""
    on_policy: OnPolicySettings | None = None
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Members end as the running average of their weights, with this decay per step."""
    gradient_checkpointing: bool = False
    """Compute layers again in the backward pass instead of keeping them: less memory, a third more time."""
    compile: bool = False
    """Compile each layer of the student (torch.compile)."""
    trackers: list[Literal["tensorboard", "trackio", "wandb", "mlflow"]] = []
    """Besides log.jsonl, where each training's losses go; each needs its package."""
    selection_every: PositiveInt = 25
    """Optimizer steps between two looks at the selection loss."""
    selection_blocks: PositiveInt = 16
    save_every_minutes: Annotated[float, Field(ge=0)] = 10.0
    """Minutes between two training states; a run that was killed goes on from the last, to the same bits."""
