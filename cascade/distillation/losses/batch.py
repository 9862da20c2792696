"""What a batch of text costs a student: both models run to their heads, the fused loss does the rest.

Shapes: B = batch, S = block size, N = tokens that count for the loss, D = hidden size (each model its own).
"""

from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cascade.data.blocks import IGNORE_INDEX, TokenBlocks
from cascade.data.examples import Examples
from cascade.data.token_targets import DrawnTargets, HiddenTargets, ListedTargets, StoredTargets
from cascade.distillation import sharding
from cascade.distillation.losses.class_losses import example_losses
from cascade.distillation.losses.embedding_losses import embedding_losses
from cascade.distillation.losses.features import FeatureLoss, Seen
from cascade.distillation.losses.fused import FusedLoss, fused_loss
from cascade.distillation.options import Objective
from cascade.distillation.teacher_memory import teacher_hidden
from cascade.models.architecture.head import Head, head_of, last_hidden
from cascade.models.architecture.model_class import is_body, model_class_of

FORWARD_KL = Objective()


class BatchLosses(NamedTuple):
    """Sums over the tokens of a batch that count."""

    fused: FusedLoss
    features: dict[str, Tensor]
    """The feature losses by name, with gradients; empty where the training has none."""
    embeds: bool = False
    """Whether the loss is the distance of embeddings: then there is no entropy and nothing that could agree."""


def batch_losses(
    student: nn.Module,
    teacher: nn.Module | None,
    batch: TokenBlocks | Examples,
    objective: Objective,
    features: FeatureLoss | None = None,
    *,
    keep: bool = True,
) -> BatchLosses:
    """Losses of the tokens that count; both models stop before their heads, which the loss takes chunk by chunk.

    A batch that brings a teacher's targets with it is learned from those, and a live teacher is not asked. Labelled
    examples have class losses, or those of sentence embeddings. With `keep` the outputs of a teacher that remembers
    (`teacher_memory.remember`) are kept, for a batch that will be read again.
    """
    device = next(student.parameters()).device
    if isinstance(batch, Examples):
        with autocast(device):
            if is_body(getattr(student, "config", None)):
                return BatchLosses(*embedding_losses(student, teacher, batch, features, keep=keep), embeds=True)
            return BatchLosses(*example_losses(student, teacher, batch, objective, features, keep=keep))
    inputs, next_BS = batch.inputs(device), batch.targets().to(device)
    counts_BS = next_BS != IGNORE_INDEX
    counted = counts_BS.flatten().nonzero()[:, 0]
    with autocast(device):
        teaching = _teaching_of(teacher, batch, inputs, counted, features, keep=keep)
        if teaching.hidden_ND is None:  # there is nothing that the student's layers could be compared with
            features = None
        watching = nullcontext(Seen()) if features is None else features.watching(student, teacher=False)
        with watching as student_inside:
            student_ND = _of_counted(batch, last_hidden(student, **inputs, use_cache=False), counted)
    feature_losses = {}
    if features is not None:  # in float32, as everything from here on
        all_BS = torch.nn.functional.pad(counts_BS, (0, inputs["input_ids"].shape[1] - counts_BS.shape[1]))
        feature_losses = features.losses(student_inside, teaching.inside, all_BS, lambda: visible(student, inputs))
    fused = fused_loss(
        student_ND,
        head_of(student),
        next_BS.flatten()[counted],
        objective,
        teacher_hidden=teaching.hidden_ND,
        teacher_head=teaching.head,
        known=teaching.probabilities,
    )
    return BatchLosses(fused, feature_losses)


@dataclass(frozen=True)
class _Teaching:
    """What a batch or a live teacher says of the tokens that count; nothing where the text alone teaches."""

    hidden_ND: Tensor | None = None
    """What the teacher's head reads."""
    head: Head | None = None
    """The teacher's head."""
    probabilities: ListedTargets | DrawnTargets | None = None
    """Some of the teacher's probabilities, instead of hidden states."""
    inside: Seen = field(default_factory=Seen)
    """What the feature losses read of the teacher's layers."""


def _teaching_of(
    teacher: nn.Module | None,
    batch: TokenBlocks,
    inputs: dict[str, Tensor],
    counted: Tensor,
    features: FeatureLoss | None,
    *,
    keep: bool,
) -> _Teaching:
    """What teaches a batch: the targets that it brings with it, or else the live teacher."""
    targets = batch.known.load() if isinstance(batch.known, StoredTargets) else batch.known
    if isinstance(targets, HiddenTargets):
        hidden_ND = targets.hidden.to(counted.device, targets.head.weight.dtype).flatten(0, 1)[counted]
        return _Teaching(hidden_ND, targets.head, inside=_points_of(targets, inputs["input_ids"], batch.masked))
    if targets is not None:
        return _Teaching(probabilities=_of_tokens(targets, counted))
    if teacher is None:
        return _Teaching()
    if features is None:
        hidden_BSD, inside = teacher_hidden(teacher, inputs, keep=keep), Seen()
    else:
        hidden_BSD, inside = features.of_teacher(teacher, inputs, keep=keep)
    return _Teaching(_of_counted(batch, hidden_BSD, counted), head_of(teacher), inside=inside)


def _of_counted(batch: TokenBlocks, hidden_BSD: Tensor, counted: Tensor) -> Tensor:
    """[N, D]: hidden states at the places that predict tokens that count."""
    return batch.predicting(hidden_BSD).flatten(0, 1)[counted]


def _of_tokens(known: ListedTargets | DrawnTargets, counted: Tensor) -> ListedTargets | DrawnTargets:
    """A batch's targets of the tokens that count, in their order."""
    device = counted.device
    if isinstance(known, ListedTargets):  # of the tokens that stand there, as labels are
        ids, log_p = (part[:, 1:].flatten(0, 1).to(device)[counted] for part in (known.ids, known.log_p))
        return ListedTargets(ids.long(), log_p)
    fields = (known.ids, known.shares, known.entropy)
    ids, shares, entropy = (part.flatten(0, 1).to(device)[counted] for part in fields)
    return DrawnTargets(ids.long(), shares, entropy)


def _points_of(targets: HiddenTargets, input_ids: Tensor, masked: bool) -> Seen:
    """Kept hidden states of layers, [B, S, D]; zeros at a causal block's last place, which predicts nothing."""
    missing = 0 if masked else 1
    device = input_ids.device
    return Seen(
        {at: torch.nn.functional.pad(states.to(device), (0, 0, 0, missing)) for at, states in targets.points.items()}
    )


def visible(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """[B, S, S]: whether a token may look at another: not at later ones in a causal model, nor at other documents'."""
    batch, size = inputs["input_ids"].shape
    device = inputs["input_ids"].device
    sees = torch.ones(batch, size, size, dtype=torch.bool, device=device)
    if model_class_of(model.config).can_generate():
        sees = sees.tril()
    if "position_ids" in inputs:
        document_BS = (inputs["position_ids"] == 0).cumsum(1)
        sees &= document_BS[:, :, None] == document_BS[:, None, :]
    return sees


def sums_of(losses: BatchLosses, with_teacher: bool) -> dict[str, float]:
    """A batch's losses summed over its tokens, by the names that the training's log has."""
    fused = losses.fused
    sums = {"loss": fused.loss.item(), "cross_entropy": fused.cross_entropy.sum().item()}
    if not with_teacher:
        return sums
    features = {f"{name}_loss": loss.item() for name, loss in losses.features.items()}
    divergence = {"divergence": fused.divergence.sum().item()}
    if losses.embeds:
        return {"loss": sums["loss"]} | divergence | features
    likeness = {"teacher_entropy": fused.teacher_entropy.sum().item(), "agreement": fused.agrees.sum().item()}
    return sums | divergence | likeness | features


@torch.no_grad()
def selection_losses(
    student: nn.Module,
    teacher: nn.Module | None,
    blocks: TokenBlocks | Examples,
    batch_size: int,
    *,
    vocab_size: int | None = None,
) -> dict[str, float]:
    """{'selection_loss', 'selection_kl' (with a teacher)}: nats per token over `blocks`; student left in train mode.

    `vocab_size` is `Objective.vocab_size`.
    """
    student.eval()
    objective = replace(FORWARD_KL, vocab_size=vocab_size)
    sums, count = [0.0, 0.0], 0
    for part in blocks.split(batch_size):
        fused = batch_losses(student, teacher, part, objective).fused
        sums[0] += fused.cross_entropy.sum().item()
        sums[1] += fused.divergence.sum().item()
        count += len(fused.divergence)
    student.train()
    sharding.reshard(student)
    losses = {"selection_loss": sums[0] / count}
    return losses if teacher is None else losses | {"selection_kl": sums[1] / count}


def autocast(device: torch.device) -> Any:
    """A context with the precision of forward passes on a device: bfloat16 on GPUs, the weights' own on CPUs."""
    # CPUs of the common kind have no fast bfloat16; there float32 is both faster and exact.
    return torch.autocast(device.type, dtype=torch.bfloat16) if device.type == "cuda" else nullcontext()
