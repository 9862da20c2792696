"""The recipe's sections as the options of `distill` and `find_learning_rate`."""

from pathlib import Path

from cascade.distillation.losses.divergences import Options
from cascade.distillation.options import Execution, Objective, OnPolicy, Optimization, Safekeeping
from cascade.distillation.schedule import Schedule
from cascade.distillation.supervision import Supervision
from cascade.recipe.distill import Distill, OnPolicySettings
from cascade.recipe.schema import Fit, Pretrain


def cosine_schedule(settings: Pretrain | Fit) -> Schedule:
    """The schedule of a parent's training, by `parent.pretrain` or `parent.fit`."""
    return Schedule(
        kind="cosine",
        warmup_fraction=settings.warmup_fraction,
        final_fraction=settings.final_learning_rate_fraction,
    )


def supervision_of(settings: Distill, vocab_size: int | None = None) -> Supervision:
    """The loss on logits and the on-policy batches; callers add features and targets, which need the models.

    `vocab_size` is that of `Objective`.
    """
    objective = Objective(
        divergence=settings.loss,
        temperature=settings.temperature,
        temperature_scale=settings.temperature_scale,
        cross_entropy_weight=settings.cross_entropy_weight,
        options=Options(beta=settings.beta, skew=settings.skew, top_k=settings.top_k),
        vocab_size=vocab_size,
    )
    on_policy = None if settings.on_policy is None else _on_policy(settings.on_policy)
    return Supervision(objective=objective, on_policy=on_policy)


def _on_policy(settings: OnPolicySettings) -> OnPolicy:
    return OnPolicy(
        fraction=settings.fraction,
        prompt_tokens=settings.prompt_tokens,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        divergence=settings.loss,
        buffer_size=settings.buffer_size,
        replay_fraction=settings.replay_fraction,
    )


def optimization_of(
    settings: Distill, *, learning_rate: float, optimizer: str, seed: int, first_position: int = 0
) -> Optimization:
    """The batches and the optimizer of a student's training, at this learning rate.

    `optimizer` is the name that `distill.optimizer`, which may be auto, stands for with this student.
    """
    schedule = Schedule(
        kind=settings.schedule,
        warmup_fraction=settings.warmup_fraction,
        final_fraction=settings.final_learning_rate_fraction,
        decay_fraction=settings.decay_fraction,
    )
    return Optimization(
        batch_size=settings.batch_size,
        seed=seed,
        first_position=first_position,
        optimizer=optimizer,
        learning_rate=learning_rate,
        schedule=schedule,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        ema_decay=settings.ema_decay,
    )


def execution_of(settings: Distill) -> Execution:
    """How the steps of a training are computed, by the `distill` section."""
    return Execution(
        microbatch_size=settings.microbatch_size,
        gradient_checkpointing=settings.gradient_checkpointing,
        compiled=settings.compile,
    )


def safekeeping_of(settings: Distill, state_folder: Path | None = None) -> Safekeeping:
    """Which states a training saves into `state_folder`, None for none, and when it stops by itself."""
    return Safekeeping(
        state_folder=state_folder,
        save_every_minutes=settings.save_every_minutes,
        keep_states=settings.keep_states,
        on_nan=settings.on_nan,
        max_skipped=settings.max_skipped,
        on_divergence=settings.on_divergence,
    )
