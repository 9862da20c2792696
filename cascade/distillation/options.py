"""The options of a training, declared once: for `distill`, and for the sections of a recipe.

Plain values without torch, so that a recipe can be read without it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cascade.distillation.losses.divergences import Options
from cascade.distillation.schedule import Schedule

OPTIMIZERS = ("adamw", "adamw_8bit", "muon")
"""Names of optimizers (`cascade.distillation.optimizer`)."""
FORMS = ("cosine", "mse")
"""Distances between hidden states (`cascade.distillation.losses.features`)."""
RELATIONS = ("qq", "kk", "vv", "qk")
"""Attention relations: queries with queries, keys with keys, values with values, queries with keys."""

TemperatureScale = Literal["tsq", "none"]
NanPolicy = Literal["stop", "skip", "rollback"]
DivergencePolicy = Literal["warn", "stop"]


@dataclass(frozen=True)
class Objective:
    """The loss on a student's logits."""

    divergence: str = "forward_kl"
    """A name from `DIVERGENCES`."""
    temperature: float = 1.0
    """Divides both models' logits, for the divergence alone."""
    temperature_scale: str = "tsq"
    """tsq: the divergence is multiplied by the squared temperature, which keeps the gradient on cross-entropy's
    scale; none: it is not."""
    cross_entropy_weight: float = 0.0
    """Share of the cross-entropy with the text in the loss; the divergence has the rest."""
    options: Options = field(default_factory=Options)
    vocab_size: int | None = field(default=None, repr=False)
    """Ids, from 0 on, that the models are compared over; None: all rows that both heads have."""

    def common_rows(self, *rows: int) -> int:
        """The ids that models with heads of so many rows are compared over."""
        return min(*rows, self.vocab_size or min(rows))


@dataclass(frozen=True)
class Features:
    """The losses on a student's hidden states, embeddings and attention, beside the loss on its logits."""

    hidden: str | None = None
    """cosine: 1 - cosine similarity; mse: squared distance over the teacher's squared length. Of each token's hidden
    state, averaged over layers."""
    embedding: str | None = None
    """cosine or mse, of the input of the first layer."""
    relations: tuple[str, ...] = ()
    """qq, kk, vv: softmax of scaled products of the projections with themselves; qk: of queries with keys, as in
    attention. KL from the teacher's, averaged over relation heads, in the last layer."""
    relation_heads: int | None = None
    """Heads that all projections' widths are split into; None: as many as divide them, up to the student's heads."""
    weights: dict[str, float] = field(default_factory=dict)
    """Weights of the losses, by 'hidden', 'embedding' and 'relations'; 1 for those that have none here."""
    balanced: bool = True
    """Their sum is first scaled to the size of the logit loss, as both were in the step before (ModelOpt)."""
    fade_fraction: float | None = None
    """Over this many times the steps the losses' weight falls evenly towards nothing (0.5: gone at half; 2: half of it
    is left at the end); None: it stays."""

    def names(self) -> list[str]:
        """The losses that are in use: of hidden, embedding, relations."""
        losses = {"hidden": self.hidden, "embedding": self.embedding, "relations": self.relations}
        return [name for name, form in losses.items() if form]


@dataclass(frozen=True)
class OnPolicy:
    """When and how the student writes its own batches."""

    fraction: float
    """Share of the steps."""
    prompt_tokens: int = 32
    """Tokens that are the prompt in a block without a prompt of its own (labels that do not count at its start)."""
    max_new_tokens: int = 64
    temperature: float = 1.0
    divergence: str = "reverse_kl"
    buffer_size: int = 0
    """Batches that the buffer holds; 0: each batch is used once."""
    replay_fraction: float = 0.5
    """Share of the on-policy steps that take a batch from a full buffer instead of writing one."""


@dataclass(frozen=True, kw_only=True)
class Optimization:
    """The batches that a student reads, and how each step changes its weights."""

    batch_size: int = 8
    """Blocks (or examples) per optimizer step."""
    seed: int = 0
    """Seed of the order of blocks, of dropout and of what a student writes itself."""
    first_position: int = 0
    """Position in the endless, seeded order of blocks at which reading starts."""
    optimizer: str = "adamw"
    """A name from `OPTIMIZERS`."""
    learning_rate: float = 3e-3
    """The learning rate at the schedule's peak."""
    schedule: Schedule = Schedule()
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    ema_decay: float | None = None
    """The student ends as the running average of its weights, with this decay per step; None: as its last weights."""


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How steps are computed: this changes memory and speed, and the result by rounding at most."""

    microbatch_size: int = 8
    """Blocks (or examples) per forward pass; halved where they do not fit into memory."""
    gradient_checkpointing: bool = False
    """Compute layers again in the backward pass instead of keeping their activations."""
    compiled: bool = False
    """Compile each layer of the student (torch.compile)."""
    remember_teacher: bool = False
    """Keep what the teacher computes for each batch (`teacher_memory.remember`) for a training of the same batches."""


@dataclass(frozen=True, kw_only=True)
class Safekeeping:
    """The states that a training saves on its way, and when it stops by itself."""

    state_folder: Path | None = None
    """The folder that the training's states are saved in, and resumed from; None: no states."""
    save_every_minutes: float = 10.0
    keep_states: int = 2
    """How many of the last states stay; an older one serves where the last is damaged."""
    on_nan: NanPolicy = "stop"
    """Where a loss or gradient is not finite. stop: an error; skip: the step's gradients are thrown away; rollback:
    back to the last state, and all steps from there up to this one are left out, as PaLM (arXiv 2204.02311, 5.1) did.
    Without states it is skip."""
    max_skipped: int = 3
    """How often a training may skip or go back before it is an error after all."""
    on_divergence: DivergencePolicy = "warn"
    """Where the loss stays high (`cascade.store.health.diverged`): say so at the end, or stop with an error."""


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """A training's log, and functions that it calls."""

    log_path: Path | None = None
    """A file of JSON lines, one per step."""
    on_step: Callable[[int, int], None] | None = None
    """Called after each step with (steps done, all steps)."""
    on_log: Callable[[dict[str, float]], None] | None = None
    """Called after each step with its log entry."""
