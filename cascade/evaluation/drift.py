"""How unlike two texts are: their tokens, their runs of three, and how sure a teacher is of them.

Shapes: T = tokens.
"""

from typing import Any

import torch
from torch import Tensor, nn

from cascade.data.blocks import IGNORE_INDEX, TokenBlocks
from cascade.evaluation.token_scores import loss_and_entropy
from cascade.models.architecture.head import head_of, last_hidden


def unlikeness(known: Tensor, text: Tensor, vocab_size: int) -> dict[str, float]:
    """Of ids [T], as many of both, for numbers to compare.

    `unigram_jsd`: Jensen-Shannon divergence of the tokens' frequencies, in nats (0 to 0.69); `new_trigrams`: share of
    the other's runs of three tokens that are not in the known text.
    """
    p, q = (torch.bincount(ids, minlength=vocab_size).double() / len(ids) for ids in (known, text))
    middle = (p + q) / 2
    jsd = sum(torch.where(shares > 0, shares * (shares / middle).log(), 0.0).sum() for shares in (p, q)) / 2
    seen, new = (_trigrams(ids, vocab_size) for ids in (known, text))
    return {"unigram_jsd": float(jsd), "new_trigrams": float((~torch.isin(new, seen)).double().mean())}


def _trigrams(ids: Tensor, vocab_size: int) -> Tensor:
    return (ids[:-2] * vocab_size + ids[1:-1]) * vocab_size + ids[2:]


@torch.no_grad()
def uncertainty(model: nn.Module, blocks: TokenBlocks, *, batch_size: int = 8) -> dict[str, float]:
    """A model's `loss` on a text and its own `entropy` there, nats per token that counts."""
    device, head = next(model.parameters()).device, head_of(model)
    sums, count = torch.zeros(2, dtype=torch.float64), 0
    for part in blocks.split(batch_size):
        targets = part.targets().to(device)
        valid = targets != IGNORE_INDEX
        hidden = part.predicting(last_hidden(model, **part.inputs(device), use_cache=False)).float()[valid]
        sums += torch.stack([values.double().sum() for values in loss_and_entropy(hidden, head, targets[valid])]).cpu()
        count += int(valid.sum())
    return {"loss": float(sums[0]) / count, "entropy": float(sums[1]) / count}


def lengths(documents: list[Any]) -> dict[str, float]:
    """Median and 90th percentile of the documents' letters; of a conversation all its messages' together."""
    counts = [
        float(
            len(document) if isinstance(document, str) else sum(len(str(part.get("content", ""))) for part in document)
        )
        for document in documents
    ]
    values = torch.tensor(counts, dtype=torch.float64)
    return {"median": float(values.quantile(0.5)), "p90": float(values.quantile(0.9))}
