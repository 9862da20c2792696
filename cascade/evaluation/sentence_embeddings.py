"""How near a student's sentence embeddings are to its teacher's, on texts that nothing else has read.

Shapes: N = texts, D = hidden size.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize

from cascade.data.examples import Examples
from cascade.distillation.losses.embedding_losses import embed
from cascade.evaluation.metric import heldout_metric
from cascade.report.records import Metric

_MOST_COMPARED = 2000
"""Most texts whose similarities to each other are compared."""


@torch.no_grad()
def embedding_metrics(
    model: Any, teacher: nn.Module | None, examples: Examples, *, batch_size: int = 64
) -> list[Metric]:
    """Metrics of the embeddings; nothing without a teacher.

    cosine_distance to the teacher's embeddings; similarity_correlation: Pearson's of all pairs' cosine similarities;
    same_neighbour: how often a text's nearest other is the one that the teacher finds.
    """
    if teacher is None:
        return []
    ours, theirs = (_embeddings(encoder, examples, batch_size) for encoder in (model, teacher))
    distance = 1 - cosine_similarity(ours, theirs, dim=-1)
    places = torch.arange(min(len(ours), _MOST_COMPARED)) * len(ours) // min(len(ours), _MOST_COMPARED)
    similar = [normalize(vectors[places], dim=-1) @ normalize(vectors[places], dim=-1).T for vectors in (ours, theirs)]
    pairs = torch.triu_indices(len(places), len(places), 1)
    correlation = float(torch.corrcoef(torch.stack([matrix[*pairs] for matrix in similar]))[0, 1])
    nearest = [matrix.fill_diagonal_(-torch.inf).argmax(1) for matrix in similar]
    same = (nearest[0] == nearest[1]).double()
    return [
        _mean("cosine_distance", distance, higher=False),
        heldout_metric("similarity_correlation", correlation, None, len(places), higher=True),
        _mean("same_neighbour", same, higher=True),
    ]


def _embeddings(model: Any, examples: Examples, batch_size: int) -> Tensor:
    """Sentence embeddings, float64 [N, D], on the CPU."""
    device = next(model.parameters()).device
    return torch.cat([embed(model, part.inputs(device)).double().cpu() for part in examples.split(batch_size)])


def _mean(name: str, values: Tensor, *, higher: bool) -> Metric:
    stderr = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else None
    return heldout_metric(name, float(values.mean()), stderr, len(values), higher=higher)
