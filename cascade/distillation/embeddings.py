"""What a batch of texts costs a student that is asked for its teacher's sentence embeddings.

Shapes: N = texts, S = tokens, D = hidden size, of both models.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from cascade.data.examples import Examples
from cascade.distillation.features import FeatureLoss, Seen
from cascade.distillation.fused import FusedLoss
from cascade.distillation.memory import remembered


def embedding_losses(
    student: Any, teacher: Any, batch: Examples, features: FeatureLoss | None = None, *, keep: bool = True
) -> tuple[FusedLoss, dict[str, Tensor]]:
    """(1 - cosine similarity of both embeddings, losses on what happens inside), summed over the texts.

    Raises:
        ValueError: there is no teacher.
    """
    if teacher is None:
        raise ValueError("embeddings are learned from a teacher")
    inputs = batch.inputs(next(student.parameters()).device)
    with torch.no_grad():
        theirs_ND, theirs = _teacher(teacher, inputs, features, keep)
    inside: dict[str, Tensor] = {}
    if features is None:
        ours_ND = embed(student, inputs)
    else:
        with features.watching(student, teacher=False) as ours:
            ours_ND = embed(student, inputs)
        mask_BS = inputs["attention_mask"].bool()
        inside = features.losses(ours, theirs, mask_BS, lambda: mask_BS[:, None, :].expand(-1, mask_BS.shape[1], -1))
    distance = 1 - cosine_similarity(ours_ND, theirs_ND, dim=-1)
    shown, none = distance.detach(), torch.zeros_like(distance)
    return FusedLoss(distance.sum(), shown, shown, none, none), inside


def embed(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """[N, D] float32: the mean of the last hidden states over each text's tokens, as sentence-transformers pools."""
    hidden: Tensor = model(**inputs).last_hidden_state.float()
    mask = inputs["attention_mask"][:, :, None].to(hidden.dtype)
    return (hidden * mask).sum(1) / mask.sum(1).clamp_min(1)


def _teacher(
    teacher: nn.Module, inputs: dict[str, Tensor], features: FeatureLoss | None, keep: bool
) -> tuple[Tensor, Seen]:
    def look() -> dict[str, Tensor]:
        if features is None:
            return {"embedding": embed(teacher, inputs)}
        with features.watching(teacher, teacher=True) as seen:
            found = embed(teacher, inputs)
        return {"embedding": found} | seen.tensors()

    what = "embeddings" if features is None else f"embeddings {features.wanted()}"
    found = remembered(teacher, inputs, what, look, keep=keep)
    return found["embedding"], Seen.of(found)
