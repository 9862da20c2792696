"""Divergences between two distributions over the vocabulary, each with its gradient in closed form.

Shapes: C = tokens, V = vocabulary. Every function takes log-probabilities log_q (student) and log_p (teacher), float32
[C, V], already divided by the temperature, and returns (the divergence [C] in nats, its gradient [C, V] with respect to
the student's tempered logits). Everything stays in log space: m is never formed where a logarithm of it is needed.

torch is not imported here, so that a recipe takes the names of losses from the table at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST_TAIL = 1e-8
"""The mass outside the top K is at least this: less cannot be told from rounding."""


@dataclass(frozen=True)
class Options:
    """Parameters of the divergences that have any."""

    beta: float = 0.5
    """Generalised JSD: the teacher's share of the mixture, between 0 and 1 (the ends are forward and reverse KL)."""
    skew: float = 0.1
    """Skew divergences: the share of the first argument in the mixture."""
    top_k: int = 64
    """Ghost-token: ids that keep a probability of their own."""


def forward_kl(log_q: Tensor, log_p: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """KL(p ‖ q); Hinton et al. 2015, https://arxiv.org/abs/1503.02531."""
    p = log_p.exp()
    return _dot(p, log_p - log_q), log_q.exp() - p


def reverse_kl(log_q: Tensor, log_p: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """KL(q ‖ p); MiniLLM, https://arxiv.org/abs/2306.08543."""
    q, ratio = log_q.exp(), log_q - log_p
    return _dot(q, ratio), _centred(q, ratio)


def jsd(log_q: Tensor, log_p: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """GKD's beta KL(p ‖ m) + (1 - beta) KL(q ‖ m), m = beta p + (1 - beta) q; https://arxiv.org/abs/2306.13649.

    The limits of this are 0; at beta 0 and 1 forward and reverse KL stand in, as in TRL.
    """
    beta = options.beta
    if beta in (0.0, 1.0):
        return (forward_kl if beta == 0.0 else reverse_kl)(log_q, log_p, options)
    log_m = _log_mixture(log_p, beta, log_q)
    q, of_q = log_q.exp(), log_q - log_m
    divergence = beta * _dot(log_p.exp(), log_p - log_m) + (1 - beta) * _dot(q, of_q)
    return divergence, (1 - beta) * _centred(q, of_q)


def skew_forward_kl(log_q: Tensor, log_p: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """KL(p ‖ skew p + (1 - skew) q); DistiLLM, https://arxiv.org/abs/2402.03898."""
    skew = options.skew
    log_m = _log_mixture(log_p, skew, log_q)
    ratio = log_p - log_m
    return _dot(log_p.exp(), ratio), _centred(log_q.exp(), -(1 - skew) * ratio.exp())


def skew_reverse_kl(log_q: Tensor, log_p: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """KL(q ‖ skew q + (1 - skew) p); DistiLLM, https://arxiv.org/abs/2402.03898."""
    skew = options.skew
    log_m = _log_mixture(log_q, skew, log_p)
    q, ratio = log_q.exp(), log_q - log_m
    return _dot(q, ratio), _centred(q, ratio - skew * ratio.exp())


def tvd(log_q: Tensor, log_p: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Total variation distance, half of the sum of |p - q|."""
    q = log_q.exp()
    difference = q - log_p.exp()
    return 0.5 * difference.abs().sum(-1), _centred(q, 0.5 * difference.sign())


def ghost_top_k(log_q: Tensor, log_p: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Forward KL over the teacher's top K ids and one bucket for all others."""
    ids = log_p.topk(min(options.top_k, log_p.shape[-1]), dim=-1).indices
    return ghost(log_q, ids, log_p.gather(-1, ids))


def ghost(log_q: Tensor, ids: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """Forward KL over listed ids [C, K] with the teacher's log-probabilities [C, K], and one bucket for all others."""
    listed, p, q = log_q.gather(-1, ids), log_p.exp(), log_q.exp()
    log_rest_p, log_rest_q = _log_tail(log_p), _log_tail(listed)
    divergence = _dot(p, log_p - listed) + log_rest_p.exp() * (log_rest_p - log_rest_q)
    gradient = q * (1 - (log_rest_p - log_rest_q).exp())[:, None]
    return divergence, gradient.scatter_(-1, ids, listed.exp() - p)


DIVERGENCES: dict[str, Callable[[Tensor, Tensor, Options], tuple[Tensor, Tensor]]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "tvd": tvd,
    "ghost_top_k": ghost_top_k,
}
"""The losses on logits by their names in a recipe."""


def _dot(weights: Tensor, values: Tensor) -> Tensor:
    # 0 times something that has run off to infinity is 0 here: what has no mass does not count.
    return (weights * values).nan_to_num_(nan=0.0).sum(-1)


def _centred(q: Tensor, inner: Tensor) -> Tensor:
    """The gradient through the softmax: q (g - sum of q g)."""
    weighted = (q * inner).nan_to_num_(nan=0.0)
    return weighted - q * weighted.sum(-1, keepdim=True)


def _log_mixture(first: Tensor, share: float, second: Tensor) -> Tensor:
    """log(share * e^first + (1 - share) * e^second)."""
    return (first + math.log(share)).logaddexp(second + math.log1p(-share))


def _log_tail(listed: Tensor) -> Tensor:
    """Log of the mass that the listed ids [C, K] leave over."""
    mass = listed.logsumexp(-1).clamp(max=0.0)
    return (-mass.expm1()).clamp(min=SMALLEST_TAIL).log()
