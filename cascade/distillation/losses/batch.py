"""What a batch of text costs a student: both models run to their heads, the fused loss does the rest.

Shapes: B = batch, S = block size, N = tokens that count for the loss, D = hidden size (each model its own).
"""

from contextlib import nullcontext
from dataclasses import replace
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
from cascade.models.architecture.head import head_of, last_hidden
from cascade.models.architecture.model_class import is_body, model_class_of

FORWARD_KL = Objective()


class BatchLosses(NamedTuple):
    """Sums over the tokens of a batch that count."""

    fused: FusedLoss
    features: dict[str, Tensor]
    """By name, with gradients; empty where none is asked for."""
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

    What the batch itself knows of a teacher is learned from, rather than asking one that is here.

    Labelled examples are seen as they are. With `keep` what the teacher shows is kept, if it is one that is remembered:
    the batch will be read again.
    """
    device = next(student.parameters()).device
    if isinstance(batch, Examples):
        with autocast(device):
            if is_body(getattr(student, "config", None)):
                return BatchLosses(*embedding_losses(student, teacher, batch, features, keep=keep), embeds=True)
            return BatchLosses(*example_losses(student, teacher, batch, objective, features, keep=keep))
    inputs = batch.inputs(device)
    next_BS = batch.targets().to(device)
    counts_BS = next_BS != IGNORE_INDEX
    counted = counts_BS.flatten().nonzero()[:, 0]

    def of_counted(hidden_BSD: Tensor) -> Tensor:
        return batch.predicting(hidden_BSD).flatten(0, 1)[counted]

    teacher_ND, teacher_head, inside = None, None, {}
    ours, theirs = Seen(), Seen()
    known = None
    with autocast(device):
        kept = batch.known.load() if isinstance(batch.known, StoredTargets) else batch.known
        if isinstance(kept, HiddenTargets):
            teacher_head = kept.head
            teacher_ND = kept.hidden.to(device, teacher_head.weight.dtype).flatten(0, 1)[counted]
            theirs = _kept_points(kept, inputs["input_ids"], batch.masked)
        elif kept is not None:
            known = _of_tokens(kept, counted)
        elif teacher is not None and features is None:
            teacher_ND, teacher_head = of_counted(teacher_hidden(teacher, inputs, keep=keep)), head_of(teacher)
        elif teacher is not None and features is not None:
            hidden_BSD, theirs = features.of_teacher(teacher, inputs, keep=keep)
            teacher_ND, teacher_head = of_counted(hidden_BSD), head_of(teacher)
        if features is None or teacher_ND is None:
            student_ND = of_counted(last_hidden(student, **inputs, use_cache=False))
        else:
            with features.watching(student, teacher=False) as ours:
                student_ND = of_counted(last_hidden(student, **inputs, use_cache=False))
    if features is not None and teacher_ND is not None:  # in float32, as everything from here on
        all_BS = torch.nn.functional.pad(counts_BS, (0, inputs["input_ids"].shape[1] - counts_BS.shape[1]))
        inside = features.losses(ours, theirs, all_BS, lambda: visible(student, inputs))
    fused = fused_loss(
        student_ND,
        head_of(student),
        next_BS.flatten()[counted],
        objective,
        teacher_hidden=teacher_ND,
        teacher_head=teacher_head,
        known=known,
    )
    return BatchLosses(fused, inside)


def _of_tokens(known: ListedTargets | DrawnTargets, counted: Tensor) -> ListedTargets | DrawnTargets:
    """A batch's targets of the tokens that count, in their order."""
    device = counted.device
    if isinstance(known, ListedTargets):  # of the tokens that stand there, as labels are
        ids, log_p = (one[:, 1:].flatten(0, 1).to(device)[counted] for one in (known.ids, known.log_p))
        return ListedTargets(ids.long(), log_p)
    fields = (known.ids, known.shares, known.entropy)
    ids, shares, entropy = (one.flatten(0, 1).to(device)[counted] for one in fields)
    return DrawnTargets(ids.long(), shares, entropy)


def _kept_points(known: HiddenTargets, input_ids: Tensor, masked: bool) -> Seen:
    """What was kept of the layers, [B, S, D]: nothing is known of a block's last place, which predicts nothing."""
    missing = 0 if masked else 1
    device = input_ids.device
    return Seen(
        {at: torch.nn.functional.pad(value.to(device), (0, 0, 0, missing)) for at, value in known.points.items()}
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


def sums_of(found: BatchLosses, with_teacher: bool) -> dict[str, float]:
    """A batch's losses summed over its tokens."""
    fused = found.fused
    sums = {"loss": fused.loss.item(), "cross_entropy": fused.cross_entropy.sum().item()}
    if not with_teacher:
        return sums
    if found.embeds:
        inside = {f"{name}_loss": value.item() for name, value in found.features.items()}
        return {"loss": sums["loss"], "divergence": fused.divergence.sum().item()} | inside
    return (
        sums
        | {
            "divergence": fused.divergence.sum().item(),
            "teacher_entropy": fused.teacher_entropy.sum().item(),
            "agreement": fused.agrees.sum().item(),
        }
        | {f"{name}_loss": value.item() for name, value in found.features.items()}
    )


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

    `vocab_size` is that of `Objective`.
    """
    student.eval()
    objective = replace(FORWARD_KL, vocab_size=vocab_size)
    sums, count = [0.0, 0.0], 0
    for part in blocks.split(batch_size):
        found = batch_losses(student, teacher, part, objective).fused
        sums[0] += found.cross_entropy.sum().item()
        sums[1] += found.divergence.sum().item()
        count += len(found.divergence)
    student.train()
    sharding.reshard(student)
    losses = {"selection_loss": sums[0] / count}
    return losses if teacher is None else losses | {"selection_kl": sums[1] / count}


def autocast(device: torch.device) -> Any:
    """The precision of models' forward passes on this kind of device."""
    # CPUs of the common kind have no fast bfloat16; there float32 is both faster and exact.
    return torch.autocast(device.type, dtype=torch.bfloat16) if device.type == "cuda" else nullcontext()
