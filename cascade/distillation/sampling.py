"""Unbiased samples of a teacher's probabilities: few ids that stand for all of them, on average exactly.

A sample t of probabilities p has E[t] = p, so the gradient q - t of forward KL is right on average at every token,
whatever the student q; truncation to the likeliest ids is not. Anshumann et al. 2025 (https://arxiv.org/abs/2503.16870)
draw each id independently. Here the draws of a token are systematic: one uniform number shifts n even steps along the
cumulated probabilities, so that an id is drawn floor(n p) or ceil(n p) times and no more noise is added than that.

Shapes: T = tokens, V = vocabulary, n = draws.
"""

import hashlib

import torch
from torch import Tensor


def shifts(root: bytes, window: bytes, count: int) -> Tensor:
    """float64 [T]: a number from 0 up to 1 for each position of a window, a function of these alone."""
    seed = hashlib.sha256(root + window).digest()
    words = [hashlib.sha256(seed + place.to_bytes(4, "little")).digest() for place in range(-(-count // 4))]
    whole = b"".join(words)
    numbers = [int.from_bytes(whole[8 * place : 8 * place + 8], "little") >> 11 for place in range(count)]
    return torch.tensor(numbers, dtype=torch.float64) / 2**53


def systematic_draws(p: Tensor, shift: Tensor, draws: int) -> Tensor:
    """int64 [T, n]: ids drawn from probabilities [T, V], in rising order, with repetition; `shift` [T] of `shifts`.

    The expected share of an id among the draws is its probability.
    """
    steps = torch.cumsum(p.double(), -1)
    points = (torch.arange(draws, dtype=torch.float64, device=p.device) + shift.to(p.device)[:, None]) / draws
    # Sums end a little beside 1; points are stretched with them, so that the last id does not get what is missing.
    return torch.searchsorted(steps, points * steps[:, -1:], right=True).clamp_max(p.shape[-1] - 1)
