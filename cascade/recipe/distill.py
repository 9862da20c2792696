"""The `distill` section: how members are recovered."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from cascade.distillation.losses.divergences import DIVERGENCES
from cascade.distillation.options import (
    FORMS,
    OPTIMIZERS,
    RELATIONS,
    DivergencePolicy,
    NanPolicy,
    TemperatureScale,
)
from cascade.distillation.schedule import SCHEDULES
from cascade.recipe.places import RecipePath
from cascade.recipe.section import Fraction, OneOf, PositiveFloat, PositiveInt, Section

GUIDED_TOKENS_PER_PARAMETER = 17.0
"""Times a student's share of its teacher's parameters: the tokens, per parameter of its own, over which
`features.fade_fraction: auto` lets the losses on its inside fall to nothing. A small student cannot follow all of the
teacher's inside, and they hold it back once it has learnt what it can of it. KL on selection text without them, with
them to the end, fading over all steps, and over about what this comes to:
stories260K at 60%, 2.6 tokens per parameter: 0.431, 0.386, 0.386, -; 10.5: 0.266, 0.250, 0.239, 0.239;
at 35%, 4.4: 0.621, 0.633, 0.617, 0.619; at 20%, 2.0: 1.135, 1.141, 1.121, 1.110; 7.8: 0.837, 0.876, 0.829, 0.819;
31: 0.631, -, -, 0.625;
at 10%, 3.9: 1.522, 1.605, 1.532, 1.506; 15.6: 1.209, -, 1.245, 1.197;
pico-python at 60%, 0.06: 0.206, 0.178, 0.185, 0.178; at 20%, 0.2: 0.681, 0.627, 0.635, 0.627.
"""
LONG_TRAINING_TOKENS = 20_000_000
"""From here on `features.hidden: auto` is none."""

WITHOUT_EFFECT = (
    "microbatch_size",
    "save_every_minutes",
    "keep_states",
    "on_nan",
    "max_skipped",
    "on_divergence",
    "gradient_checkpointing",
    "compile",
    "trackers",
)
"""Keys that change memory, speed and safety, and the result of a sound training at most by rounding."""


class FeatureLosses(Section):
    """Losses on what happens inside, beside the logits."""

    hidden: Annotated[str, OneOf("auto", "none", *FORMS)] = "auto"
    """Of hidden states, layer by layer, along the layers and channels that the cut has kept. auto: cosine for members
    that are cut and have fewer than 20M training tokens (distill.tokens), else none: what it gives fades as training
    grows, and a sample of the teacher's probabilities is then enough to keep."""
    embedding: Annotated[str, OneOf("none", *FORMS)] = "none"
    """Of what enters the first layer."""
    relations: list[Annotated[str, OneOf(*RELATIONS)]] = []
    """Who attends to whom in the last layer (MiniLM): queries with queries, keys with keys, ..."""
    relation_heads: PositiveInt | None = None
    """What the projections are split into; the most that both models allow where not given."""
    weights: dict[Literal["hidden", "embedding", "relations"], PositiveFloat] = {}
    """1 where not given."""
    balanced: bool = True
    """Together as large as the logit loss, then weighted; else weighted as they are."""
    fade_fraction: Literal["auto", "none"] | PositiveFloat = "auto"
    """Over this many times the training's steps the weight of all these losses falls evenly towards nothing (0.5: gone
    at half; 2: half of it is left at the end); none: it stays. auto: for language models that are cut, so that it is
    gone after 17 tokens per parameter times the student's share of its teacher's parameters; for others none."""


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


class TargetCache(Section):
    """What is kept of the teacher, so that it need not read the same text twice."""

    kind: Literal["auto", "none", "sampled", "top_k", "hidden"] = "auto"
    """sampled: an unbiased sample of its probabilities; hidden: what its head reads (and its layers, where features ask
    for them), which gives every loss; top_k: the likeliest ids and a bucket for the rest, as loss: ghost_top_k; none:
    the teacher is asked each time. auto: one of sampled, hidden and none, as `cascade plan` shows and explains."""
    draws: PositiveInt = 38
    """sampled: of each token's probabilities."""
    exact_tokens: list[str] = []
    """sampled: tokens, as the vocabulary writes them, whose probability is kept as it is (end of turn, tool call)."""
    dtype: Literal["bfloat16", "int8"] = "bfloat16"
    """hidden: of the states; int8 has a scale per token."""
    folder: RecipePath = ""
    """Shared between runs; among the user's caches (~/.cache/cascade/teacher) where not given."""


def _cache(section: object) -> object:
    return {"kind": section} if isinstance(section, str) else section


class Distill(Section):
    """Recovery: the student learns from the original parent."""

    tokens: PositiveInt | None = None
    """Training tokens of each member."""
    examples: PositiveInt | None = None
    """Classification, instead of tokens: training examples of each member."""
    teacher: Literal["parent", "text", "logprobs"] = "parent"
    """Who teaches: the parent, by its probabilities; the text alone, by cross-entropy, where that is a teacher's own
    (data.source: generated by another model or an endpoint); or an endpoint by the log-probabilities of its likeliest
    tokens (generate.endpoint.top_logprobs), forward KL with one bucket for all others."""
    batch_size: PositiveInt = 8
    """Blocks per optimizer step."""
    microbatch_size: PositiveInt = 8
    """Blocks per forward pass; changes memory and speed, not the result."""
    learning_rate: Literal["auto"] | PositiveFloat = "auto"
    """The schedule's peak. auto: found for each member by short trainings from its own start."""
    schedule: Annotated[str, OneOf(*SCHEDULES)] = "cosine"
    """cosine: down from the warm-up on; wsd: stable at the peak, then a linear decay."""
    decay_fraction: Fraction = 0.2
    """wsd: share of the steps that decay."""
    warmup_fraction: Fraction = 0.05
    """Share of the steps with a linear warm-up."""
    final_learning_rate_fraction: Fraction = 0.05
    """Where the schedule ends, as a share of the peak."""
    optimizer: Annotated[str, OneOf("auto", *OPTIMIZERS)] = "auto"
    """adamw_8bit: moments in 8 bits (needs torchao); muon: orthogonalised momentum for the layers' matrices, which
    recovers a cut language model in fewer tokens. auto: muon for language models on one process where its extra work is
    at most half of a step's and the rate is searched for (a rate that is given was tried with adamw), else adamw, as in
    `finish`. A run that goes on with another number of processes needs the optimizer's name, or it trains its members
    again."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: PositiveFloat = 1.0
    loss: Annotated[str, OneOf(*DIVERGENCES)] = "forward_kl"
    """The divergence from the teacher; forward_kl is KL(teacher ‖ student)."""
    temperature: PositiveFloat = 1.0
    """Divides both models' logits."""
    temperature_scale: TemperatureScale = "tsq"
    """tsq: the divergence is multiplied by the squared temperature; none: it is not (as in TRL and Liger)."""
    beta: Fraction = 0.5
    """jsd: the teacher's share of the mixture."""
    skew: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """skew_forward_kl, skew_reverse_kl: the share of the first argument in the mixture."""
    top_k: PositiveInt = 64
    """ghost_top_k: ids that keep a probability of their own."""
    cache: Annotated[TargetCache, BeforeValidator(_cache)] = TargetCache()
    """What is kept of the teacher: a section, or its `kind` alone."""
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
    selection_examples: PositiveInt = 256
    """Classification, instead of blocks."""
    save_every_minutes: Annotated[float, Field(ge=0)] = 10.0
    """Minutes between two training states; a run that was killed goes on from the last, to the same bits."""
    keep_states: Annotated[int, Field(ge=2)] = 2
    """How many of the last states are kept; an older one serves where the last is damaged."""
    on_nan: NanPolicy = "stop"
    """Where a loss or gradient is not finite. stop: before the optimizer's step; skip: the step is left out; rollback:
    back to the last state, and the steps from there up to this one are left out."""
    on_divergence: DivergencePolicy = "warn"
    """Where the loss stays over twice its first steps' for 20 steps and more: say so at the end and in the report, or
    stop."""
    max_skipped: PositiveInt = 3
    """How often a training may skip or go back before it stops."""

    def hidden_features(self, cut: bool) -> str:
        """What `features.hidden` comes to for a member that is cut from another, or is not: none, cosine or mse."""
        if self.features.hidden != "auto":
            return self.features.hidden
        return "cosine" if cut and (self.tokens or 0) < LONG_TRAINING_TOKENS else "none"

    def fade_fraction(self, tokens_per_parameter: float, share: float, *, guided: bool) -> float | None:
        """What `features.fade_fraction` comes to, for a student with this share of its teacher's parameters.

        `guided`: it is a language model that was cut from its teacher, the case that auto was measured on.
        """
        if self.features.fade_fraction == "auto":
            return GUIDED_TOKENS_PER_PARAMETER * share / tokens_per_parameter if guided else None
        return None if self.features.fade_fraction == "none" else self.features.fade_fraction
