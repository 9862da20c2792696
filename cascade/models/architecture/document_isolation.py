"""Whether an architecture keeps the documents of a packed block apart when it is told where each of them starts."""

import json
from functools import lru_cache
from typing import Any

import torch

from cascade.models.architecture.model_class import model_class_of
from cascade.models.architecture.twin import twin_of
from cascade.runtime.errors import UserError

TOLERANCE = 1e-4
"""Largest difference, relative to the largest logit, between a document in a packed block and the same alone."""


def require_document_masks(config: Any) -> None:
    """Refuse an architecture that does not take position ids which start again for a new document.

    A tiny model shows it: two documents in one block have to give the logits that each gives alone.

    Raises:
        UserError: the logits differ by more than `TOLERANCE`.
    """
    config_class: Any = type(config)
    difference = _difference(config_class, config.to_json_string(use_diff=False), model_class_of(config))
    if not difference <= TOLERANCE:
        raise UserError(
            f"data.document_masks: model type '{config.model_type}' does not keep the documents of a block apart (a "
            f"tiny model's logits differ by {difference:.0e}); use document_masks: false"
        )


@lru_cache(maxsize=16)
def _difference(config_class: Any, config_json: str, model_class: Any) -> float:
    """Largest difference between packed and single documents' logits, relative to the largest logit."""
    config = config_class(**json.loads(config_json))
    config.architectures = [model_class.__name__]
    model: Any = twin_of(config)
    ids = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    lengths = ((5, 7), (8, 4))
    places = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])
    with torch.no_grad():
        packed = model(input_ids=ids, position_ids=places, use_cache=False).logits
        alone = torch.cat(
            [
                torch.cat([model(input_ids=part[None], use_cache=False).logits for part in ids[row].split(length)], 1)
                for row, length in enumerate(lengths)
            ]
        )
    return float((packed - alone).abs().max() / alone.abs().max())
