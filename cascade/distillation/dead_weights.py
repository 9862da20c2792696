"""Weights through which nothing flows: left by a cut or a start that went wrong, and not brought back by training."""

import logging

from torch import nn

from cascade.distillation import sharding

logger = logging.getLogger(__name__)


def zero_matrices(student: nn.Module) -> dict[str, float]:
    """{'zero_matrices': how many weight matrices are all zero}, for the log; {} where none is."""
    names = [
        name
        for name, weight in student.named_parameters()
        if weight.dim() > 1 and not sharding.is_sharded(weight) and not bool(weight.any())
    ]
    if names:
        logger.warning("all zero before the first step: %s", ", ".join(names))
    return {"zero_matrices": float(len(names))} if names else {}
