"""The loss of a batch of texts for a student that learns its teacher's sentence embeddings.

Shapes: N = texts, S = tokens, D = hidden size, of both models.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from cascade.data.examples import Examples
from cascade.distillation.losses.class_losses import both_outputs
from cascade.distillation.losses.features import FeatureLoss
from cascade.distillation.losses.fused import FusedLoss


def embedding_losses(
    student: Any, teacher: Any, batch: Examples, features: FeatureLoss | None = None, *, keep: bool = True
) -> tuple[FusedLoss, dict[str, Tensor]]:
    """(1 - cosine similarity of both models' embeddings, feature losses by name), summed over the texts.

    Raises:
        ValueError: there is no teacher.
    """
    inputs = batch.inputs(next(student.parameters()).device)
    ours_ND, theirs_ND, inside = both_outputs(student, teacher, inputs, embed, "embeddings", features, keep)
    if theirs_ND is None:
        raise ValueError("embeddings are learned from a teacher")
    distance = 1 - cosine_similarity(ours_ND, theirs_ND, dim=-1)
    detached, none = distance.detach(), torch.zeros_like(distance)
    return FusedLoss(distance.sum(), detached, detached, none, none), inside


def embed(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """[N, D] float32: the mean of the last hidden states over each text's tokens, as sentence-transformers pools."""
    hidden: Tensor = model(**inputs).last_hidden_state.float()
    mask = inputs["attention_mask"][:, :, None].to(hidden.dtype)
    return (hidden * mask).sum(1) / mask.sum(1).clamp_min(1)
