"""Unbiased samples of a teacher's probabilities: few ids that stand for all of them, on average exactly.

A sample t of probabilities p has E[t] = p, so the gradient q - t of forward KL is right on average at every token,
whatever the student q; truncation to the likeliest ids is not. Anshumann et al. 2025 (https://arxiv.org/abs/2503.16870)
draw each id independently. Here the draws of a token are systematic: one uniform number shifts n even steps along the
cumulated probabilities, so that an id is drawn floor(n p) or ceil(n p) times and no more noise is added than that.

Shapes: T = tokens, V = vocabulary, n = draws, E = ids whose probability is kept exactly.
"""

import hashlib
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

_BELOW_ONE = 1 - 1e-12

SAMPLER = 1
"""Raised when the same logits and shifts would give other draws."""


class Sample(NamedTuple):
    """What is kept of a teacher's probabilities for some tokens."""

    ids: Tensor
    """int64 [T, n]: drawn, in rising order, with repetition; each stands for 1/n of what the exact ids leave."""
    exact_p: Tensor
    """float32 [T, E]"""
    entropy: Tensor
    """float32 [T]: of all probabilities, in nats."""
    logsumexp: Tensor
    """float32 [T]: of the logits."""


def shifts(root: bytes, window: bytes, count: int) -> Tensor:
    """float64 [T]: a number from 0 up to 1 for each position of a window, a function of these alone."""
    stream = hashlib.shake_256(root + window).digest(8 * count)
    words = np.frombuffer(stream, dtype="<u8") >> np.uint64(11)
    return torch.from_numpy(words.astype(np.float64)) / 2**53


def systematic_draws(weights: Tensor, shift: Tensor, draws: int) -> Tensor:
    """int64 [T, n]: ids drawn in proportion to weights [T, V] >= 0, in rising order; `shift` [T] of `shifts`.

    The expected share of an id among the draws is its probability.
    """
    steps = weights.cumsum(-1, dtype=torch.float64)
    evenly = torch.arange(draws, dtype=torch.float64, device=weights.device)
    points = ((evenly + shift.to(weights.device)[:, None]) / draws).clamp_max_(_BELOW_ONE).mul_(steps[:, -1:])
    return torch.searchsorted(steps, points, right=True).clamp_max_(weights.shape[-1] - 1)


def sampled(logits: Tensor, shift: Tensor, draws: int, exact: Tensor) -> Sample:
    """A sample of the probabilities of logits [T, V] (float32; used up), `exact` [E] ids left out of the draws."""
    top = logits.amax(-1, keepdim=True)
    logits.sub_(top)
    weights = logits.exp()
    total = weights.sum(-1)
    log_total = total.log()
    entropy = log_total - torch.linalg.vecdot(weights, logits) / total
    exact_p = weights[:, exact] / total[:, None]
    if len(exact):
        weights[:, exact] = 0.0
    return Sample(systematic_draws(weights, shift, draws), exact_p, entropy, log_total + top[:, 0])
