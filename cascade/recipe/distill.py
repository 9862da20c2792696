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
    """Losses on hidden states, embeddings and attention, added to the loss on the logits."""

    hidden: Annotated[str, OneOf("auto", "none", *FORMS)] = "auto"
    """Loss on hidden states, layer by layer, along the layers and channels that the cut left. `auto`: `cosine` for
    members that are cut and have fewer than 20M training tokens (`distill.tokens`), else `none`: its gain shrinks as
    training grows, and without it a sample of the teacher's probabilities is enough to keep."""
    embedding: Annotated[str, OneOf("none", *FORMS)] = "none"
    """Loss on the input of the first layer."""
    relations: list[Annotated[str, OneOf(*RELATIONS)]] = []
    """Attention relations of the last layer to match (MiniLM): `qq` queries with queries, `kk` keys with keys, `vv`
    values with values, `qk` queries with keys."""
    relation_heads: PositiveInt | None = None
    """Number of heads that the projections are split into for `relations`; the most that both models allow where not
    given."""
    weights: dict[Literal["hidden", "embedding", "relations"], PositiveFloat] = {}
    """Weight of each of these losses; 1 where not given."""
    balanced: bool = True
    """Scale the feature losses so that together they are as large as the loss on the logits, before weights apply;
    false: weights apply to the losses as they are."""
    fade_fraction: Literal["auto", "none"] | PositiveFloat = "auto"
    """The weight of all feature losses falls linearly towards 0 over this multiple of the training's steps (0.5: gone
    at half; 2: half of it is left at the end); `none`: constant weight. `auto`: for language models that are cut, gone
    after 17 tokens per student parameter times the student's share of its teacher's parameters; else `none`."""


class OnPolicySettings(Section):
    """Training steps on text that the student writes and the teacher judges (GKD)."""

    fraction: Fraction
    """Share of the optimizer steps that train on the student's own text."""
    prompt_tokens: PositiveInt = 32
    """Tokens from the start of each block that serve as the prompt."""
    max_new_tokens: PositiveInt = 64
    """Tokens that the student writes after each prompt, at most."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature of the student."""
    loss: Literal["reverse_kl", "skew_reverse_kl", "skew_forward_kl", "jsd", "forward_kl", "tvd"] = "reverse_kl"
    """Divergence from the teacher on these batches."""
    buffer_size: Annotated[int, Field(ge=0)] = 0
    """Number of written batches to keep for another use; 0: none."""
    replay_fraction: Fraction = 0.5
    """Share of the on-policy steps that take a batch from the buffer, once it is full."""


class TargetCache(Section):
    """Which of the teacher's outputs are kept on disk, so that a text is labelled only once."""

    kind: Literal["auto", "none", "sampled", "top_k", "hidden"] = "auto"
    """`sampled`: an unbiased sample of the teacher's probabilities; `hidden`: the input of its head (and its layers'
    outputs, where `features` needs them), from which every loss follows; `top_k`: its likeliest ids and one bucket for
    the rest, as in `loss: ghost_top_k`; `none`: nothing, the teacher runs in every step. `auto`: one of `sampled`,
    `hidden` and `none`; `cascade plan` shows which and why."""
    draws: PositiveInt = 38
    """`sampled`: draws per token."""
    exact_tokens: list[str] = []
    """`sampled`: tokens, as the vocabulary writes them, whose probability is always kept exactly (an end of turn, a
    tool call)."""
    dtype: Literal["bfloat16", "int8"] = "bfloat16"
    """`hidden`: data type of the kept states; `int8` has one scale per token."""
    folder: RecipePath = ""
    """Folder of the cache, shared between runs; `~/.cache/cascade/teacher` where not given."""


def _cache(section: object) -> object:
    return {"kind": section} if isinstance(section, str) else section


class Distill(Section):
    """Recovery: how students are trained under their teacher."""

    tokens: PositiveInt | None = None
    """Training tokens of each member; required but for classification and embedding tasks."""
    examples: PositiveInt | None = None
    """Classification and embedding tasks, instead of `tokens`: training examples of each member."""
    teacher: Literal["parent", "text", "logprobs"] = "parent"
    """What members learn from. `parent`: the parent's probabilities; `text`: the text alone, by cross-entropy, where
    another model or an endpoint has written it (`data.source: generated`); `logprobs`: an endpoint's log-probabilities
    of its likeliest tokens (`generate.endpoint.top_logprobs`), by forward KL with one bucket for all other tokens."""
    batch_size: PositiveInt = 8
    """Blocks (or examples) per optimizer step."""
    microbatch_size: PositiveInt = 8
    """Blocks (or examples) per forward pass; changes memory and speed, not the result."""
    learning_rate: Literal["auto"] | PositiveFloat = "auto"
    """Peak learning rate. `auto`: found for each member by short trainings from its own start."""
    schedule: Annotated[str, OneOf(*SCHEDULES)] = "cosine"
    """Learning-rate schedule after the warm-up. `cosine`: falls along a cosine; `wsd`: stays at the peak, then falls
    linearly."""
    decay_fraction: Fraction = 0.2
    """`schedule: wsd`: share of the optimizer steps in which the rate falls."""
    warmup_fraction: Fraction = 0.05
    """Share of the optimizer steps with a linear warm-up."""
    final_learning_rate_fraction: Fraction = 0.05
    """Learning rate at the end of the schedule, as a share of the peak."""
    optimizer: Annotated[str, OneOf("auto", *OPTIMIZERS)] = "auto"
    """`adamw_8bit`: AdamW with moments in 8 bits (needs torchao); `muon`: orthogonalised momentum for the layers'
    matrices, which recovers a cut language model in fewer tokens. `auto`: `muon` for language models on one process
    where it adds at most half to a step's operations and the learning rate is searched for (a rate that a recipe gives
    was tried with AdamW), else `adamw`; in `finish` always `adamw`. A run that goes on with another number of processes
    needs the optimizer's name, or trains its members again."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay per step, as a multiple of the learning rate."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are clipped to this norm."""
    loss: Annotated[str, OneOf(*DIVERGENCES)] = "forward_kl"
    """Divergence from the teacher; `forward_kl` is KL(teacher ‖ student), `reverse_kl` is KL(student ‖ teacher)."""
    temperature: PositiveFloat = 1.0
    """Divides the logits of teacher and student before the softmax, for the divergence alone."""
    temperature_scale: TemperatureScale = "tsq"
    """`tsq`: the divergence is multiplied by the squared temperature; `none`: it is not (as in TRL and Liger)."""
    beta: Fraction = 0.5
    """`loss: jsd`: the teacher's share of the mixture."""
    skew: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """`loss: skew_forward_kl` and `skew_reverse_kl`: share of the divergence's first argument in the mixture."""
    top_k: PositiveInt = 64
    """`loss: ghost_top_k` and `cache: top_k`: number of ids that keep a probability of their own."""
    cache: Annotated[TargetCache, BeforeValidator(_cache)] = TargetCache()
    """What is kept of the teacher: a section, or its `kind` alone."""
    cross_entropy_weight: Fraction = 0.0
    """Share of cross-entropy with the text (or labels) in the loss; the divergence has the rest."""
    features: FeatureLosses = FeatureLosses()
    """Losses on hidden states, embeddings and attention relations."""
    on_policy: OnPolicySettings | None = None
    """Training steps on the student's own text; none where not given."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Members end as the exponential moving average of their weights, with this decay per optimizer step; no average
    where not given."""
    gradient_checkpointing: bool = False
    """Compute layers again in the backward pass instead of keeping their activations: less memory, about a third more
    time."""
    compile: bool = False
    """Compile each layer of the student with torch.compile."""
    trackers: list[Literal["tensorboard", "trackio", "wandb", "mlflow"]] = []
    """Where a training's losses go besides `log.jsonl`; each needs its package."""
    selection_every: PositiveInt = 25
    """Optimizer steps between two measurements on selection text."""
    selection_blocks: PositiveInt = 16
    """Blocks of selection text per measurement."""
    selection_examples: PositiveInt = 256
    """Classification and embedding tasks: selection examples per measurement, instead of blocks."""
    save_every_minutes: Annotated[float, Field(ge=0)] = 10.0
    """Minutes between two saved training states; a run that was killed goes on from the last one, to the same bits."""
    keep_states: Annotated[int, Field(ge=2)] = 2
    """Number of saved training states to keep; an older one serves where the last is damaged."""
    on_nan: NanPolicy = "stop"
    """What happens when a loss or gradient is not finite. `stop`: the training stops before the optimizer's step;
    `skip`: the step is left out; `rollback`: the training returns to its last saved state and leaves out the steps from
    there up to this one."""
    on_divergence: DivergencePolicy = "warn"
    """What happens when the loss stays above twice the mean of its first steps for 20 steps or more. `warn`: a message
    at the end and in the report; `stop`: the training stops."""
    max_skipped: PositiveInt = 3
    """Number of times that a training may skip a step or roll back before it stops."""

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
