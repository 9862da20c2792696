"""Unbiased samples of a teacher's probabilities: few ids that stand for all of them, on average exactly.

A sample t of probabilities p has E[t] = p, so the gradient q - t of forward KL is right on average at every token,
whatever the student q; truncation to the likeliest ids is not. Anshumann et al. 2025 (https://arxiv.org/abs/2503.16870)
draw each id independently. Here the draws of a token are systematic: one uniform number shifts n even steps along the
cumulated probabilities, so that an id is drawn floor(n p) or ceil(n p) times and no more noise is added than that.

Shapes: T = tokens, V = vocabulary, n = draws, E = ids whose probability is kept exactly.
"""

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor

_BLOCK = 64
"""Ids whose weights are summed first: a draw looks for its block, then inside it."""
_SMALL = 2048
"""A vocabulary up to which all weights are summed up at once."""
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
    seed = hashlib.sha256(root + window).digest()
    words = [hashlib.sha256(seed + place.to_bytes(4, "little")).digest() for place in range(-(-count // 4))]
    whole = b"".join(words)
    numbers = [int.from_bytes(whole[8 * place : 8 * place + 8], "little") >> 11 for place in range(count)]
    return torch.tensor(numbers, dtype=torch.float64) / 2**53


def systematic_draws(weights: Tensor, shift: Tensor, draws: int) -> Tensor:
    """int64 [T, n]: ids drawn in proportion to weights [T, V] >= 0, in rising order; `shift` [T] of `shifts`.

    The expected share of an id among the draws is its probability.
    """
    tokens, vocabulary = weights.shape
    points = (
        torch.arange(draws, dtype=torch.float64, device=weights.device) + shift.to(weights.device)[:, None]
    ) / draws
    points.clamp_max_(_BELOW_ONE)
    if vocabulary <= _SMALL:
        return _first_beyond(weights.cumsum(-1, dtype=torch.float64), points)
    blocks = -(-vocabulary // _BLOCK)
    if vocabulary % _BLOCK:
        weights = torch.nn.functional.pad(weights, (0, blocks * _BLOCK - vocabulary))
    by_block = weights.view(tokens * blocks, _BLOCK)
    steps = by_block.sum(-1).view(tokens, blocks).cumsum(-1, dtype=torch.float64)
    block = _first_beyond(steps, points)
    ends = steps.gather(-1, block)
    starts = steps.gather(-1, (block - 1).clamp_min(0)) * (block > 0)
    # Sums of a block in two orders differ by rounding: a draw goes to the same share of both.
    within = ((points * steps[:, -1:] - starts) / (ends - starts)).clamp(0, _BELOW_ONE)
    rows = (block + blocks * torch.arange(tokens, device=weights.device)[:, None]).view(-1)
    place = _first_beyond(by_block[rows].cumsum(-1, dtype=torch.float64), within.view(-1, 1))
    return block * _BLOCK + place.view(tokens, draws)


def sampled(logits: Tensor, shift: Tensor, draws: int, exact: Tensor) -> Sample:
    """A sample of the probabilities of logits [T, V] (float32; used up), `exact` [E] ids left out of the draws."""
    top = logits.amax(-1, keepdim=True)
    logits.sub_(top)
    weights = logits.exp()
    total = weights.sum(-1)
    log_total = total.log()
    entropy = log_total - torch.linalg.vecdot(weights, logits) / total
    exact_p = weights[:, exact] / total[:, None]
    weights[:, exact] = 0.0
    return Sample(systematic_draws(weights, shift, draws), exact_p, entropy, log_total + top[:, 0])


def _first_beyond(steps: Tensor, shares: Tensor) -> Tensor:
    """[R, n]: where rising sums [R, m] first exceed these shares, below 1, of their last."""
    return torch.searchsorted(steps, shares * steps[:, -1:], right=True).clamp_max_(steps.shape[-1] - 1)
