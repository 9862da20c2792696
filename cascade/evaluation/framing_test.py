"""How a model's text is framed, asked of the model itself: as it reads best, so it was trained.

Shapes: N = blocks, S = block size.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from cascade.data.blocks import IGNORE_INDEX, TokenBlocks
from cascade.data.framing import Framing
from cascade.distillation.losses.fused import fused_loss
from cascade.distillation.options import Objective
from cascade.models.architecture.head import head_of, last_hidden

logger = logging.getLogger(__name__)

_TOKENS = 8192
"""Tokens of text on which a framing is judged."""


@dataclass(frozen=True)
class FramingChoice:
    """A framing, and what it was chosen by: losses of the model in nats per token."""

    framing: Framing
    text_loss: dict[str, float]
    """Losses of blocks that start inside a document: as they are (`documents`) and the same tokens behind the prefix
    (`blocks`); empty where the recipe leaves no choice, or no block starts inside a document."""
    end_token_loss: float | None
    """Loss of the end token behind documents; None where the recipe leaves no choice, or no document ends."""
    guess_loss: float
    """Loss of a guess among all tokens of the vocabulary."""

    def record(self) -> dict[str, Any]:
        """The choice as framing.json has it, in the recipe's words."""
        return self.framing.record() | {
            "prefix": list(self.framing.prefix),
            "text_loss": self.text_loss,
            "end_token_loss": self.end_token_loss,
            "guess_loss": self.guess_loss,
        }


def choose_framing(
    model: nn.Module,
    framing: Framing,
    pack: Callable[[Framing], TokenBlocks],
    *,
    choose_begin: bool = True,
    choose_end: bool = True,
    batch_size: int = 8,
) -> FramingChoice:
    """The framing of documents under which `model` reads as it was trained; `pack` packs selection text under one.

    A framing without a prefix leaves nothing to choose. With `choose_end` the end token is left out where the model
    finds it less likely behind a document than a guess would: it was not trained with it, and the next document's
    prefix ends the one before. With `choose_begin` blocks that start inside a document begin with the prefix, too,
    unless the model predicts the same tokens behind it worse than without.
    """
    guess = math.log(len(head_of(model).weight))
    if not framing.prefix:
        return FramingChoice(framing, {}, None, guess)
    end_loss = None
    if choose_end and framing.suffix:
        blocks = _sample(pack(replace(framing, begin_blocks=False)))
        behind = torch.isin(blocks.targets(), torch.tensor(framing.suffix))
        end_loss = _loss(model, blocks, behind, batch_size)
        if end_loss is not None and end_loss > guess:
            logger.warning(
                "the model gives its end token %.1f nats behind documents, more than a guess among all tokens (%.1f): "
                "it was not trained with it, and it is left out of the text (data.end_token: documents keeps it)",
                end_loss,
                guess,
            )
            framing = replace(framing, suffix=())
    losses: dict[str, float] = {}
    if choose_begin:
        losses = _prefix_losses(model, pack(replace(framing, begin_blocks=False)), framing, batch_size)
        framing = replace(framing, begin_blocks=not losses or losses["blocks"] <= losses["documents"])
    return FramingChoice(framing, losses, end_loss, guess)


def _prefix_losses(model: nn.Module, blocks: TokenBlocks, framing: Framing, batch_size: int) -> dict[str, float]:
    """Losses of the same tokens of blocks that start inside a document, without and behind the prefix; {}: no such."""
    prefix = torch.tensor(framing.prefix)
    count = len(prefix)
    begins = (blocks.input_ids[:, :count] == prefix).all(1)
    inside = _sample(blocks.rows((~begins).nonzero()[:, 0]))
    if len(inside) == 0:
        return {}
    ids = torch.cat([prefix.expand(len(inside), count), inside.input_ids], 1)[:, : inside.block_size]
    labels = torch.cat([torch.full((len(inside), count), IGNORE_INDEX), inside.labels], 1)[:, : inside.block_size]
    places = inside.position_ids
    if places is not None:  # the document that goes on starts with the prefix now; later ones start where they did
        later = (places[:, 1:] == 0).cummax(1).values
        shifted = torch.cat([places[:, :1] + count, torch.where(later, places[:, 1:], places[:, 1:] + count)], 1)
        places = torch.cat([torch.arange(count).expand(len(inside), count), shifted], 1)[:, : inside.block_size]
    behind = replace(inside, input_ids=ids, labels=labels, position_ids=places)
    targets = behind.targets()
    counted = (targets != IGNORE_INDEX) & ~torch.isin(targets, torch.tensor([*framing.prefix, *framing.suffix]))
    counted[:, :count] = False  # the first token has nothing before it in the other blocks
    plain = torch.cat([counted[:, count:], torch.zeros(len(inside), count, dtype=torch.bool)], 1)
    losses = {"documents": _loss(model, inside, plain, batch_size), "blocks": _loss(model, behind, counted, batch_size)}
    return {name: loss for name, loss in losses.items() if loss is not None}


def _sample(blocks: TokenBlocks) -> TokenBlocks:
    return blocks.take(max(4, _TOKENS // blocks.block_size))


@torch.no_grad()
def _loss(model: nn.Module, blocks: TokenBlocks, counted: Tensor, batch_size: int) -> float | None:
    """Mean cross-entropy of the targets where `counted` [N, S - 1]; None where none is."""
    device = next(model.parameters()).device
    losses: list[Tensor] = []
    for part, which in zip(blocks.split(batch_size), counted.split(batch_size), strict=True):
        if bool(which.any()):
            hidden = part.predicting(last_hidden(model, **part.inputs(device), use_cache=False)).float()
            targets = part.targets()[which].to(device)
            losses.append(fused_loss(hidden[which.to(device)], head_of(model), targets, Objective()).cross_entropy)
    return float(torch.cat(losses).mean()) if losses else None
