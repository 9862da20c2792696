"""Forward KL where only a teacher's likeliest ids are known, with one bucket for all others (the ghost token).

Shapes: C = tokens, V = vocabulary, K = ids listed at a place, at most.
"""

import torch
from torch import Tensor

from cascade.data.token_targets import ListedTargets

ROUNDING = 1e-6
"""Mass outside the listed ids that counts as none."""


def listed_kl(logits: Tensor, listed: ListedTargets, targets: Tensor, share: float, tokens: Tensor) -> None:
    """Losses of logits [C, V] into tokens [4, C], as `fused_loss` reports them; the logits become their gradient.

    KL over the listed ids and one bucket of all others, so that what is not known of the teacher asks for nothing: with
    listed p, rest r = 1 - sum of p, student q and its rest s the gradient is q - p at listed ids, q (1 - r / s) at the
    others. `share` is cross-entropy's, with `targets` [C]. Entropy is that of the listed ids and the bucket.
    """
    index, known = listed.ids.clamp_min(0), listed.ids >= 0
    agrees = logits.argmax(-1) == index.gather(-1, listed.log_p.argmax(-1, keepdim=True))[:, 0]
    listed_logits = logits.gather(-1, index)
    target_logits = logits.gather(-1, targets[:, None])[:, 0]
    # Missing ids (-1) point at id 0, which may be listed as well: adding 0 there leaves it as it is.
    outside = torch.zeros_like(logits).scatter_add_(-1, index, known.to(logits.dtype)).bool()
    log_rest = logits.masked_fill(outside, -torch.inf).logsumexp(-1)
    log_sum = torch.logaddexp(log_rest, listed_logits.masked_fill(~known, -torch.inf).logsumexp(-1))
    log_p = torch.where(known, listed.log_p, 0.0)
    p = torch.where(known, listed.log_p.exp(), 0.0)
    rest = 1 - p.sum(-1)
    rest = torch.where((rest > ROUNDING) & log_rest.isfinite(), rest, 0.0)
    log_q, log_s = listed_logits - log_sum[:, None], log_rest - log_sum
    of_rest = torch.where(rest > 0, rest * (rest.log() - log_s), 0.0)
    tokens[0] = (p * (log_p - log_q)).sum(-1) + of_rest
    tokens[1] = log_sum - target_logits
    tokens[2] = -(p * log_p).sum(-1) - torch.where(rest > 0, rest * rest.log(), 0.0)
    tokens[3] = agrees
    total = (p.sum(-1) + rest)[:, None]  # 1, but for rounding
    logits.sub_(log_sum[:, None]).exp_()
    scale_of_rest = total - torch.where(rest > 0, (rest.log() - log_s).exp(), 0.0)[:, None]
    text = logits.clone() if share else None
    at_listed = (total * logits.gather(-1, index) - p) * known
    logits.mul_(scale_of_rest).masked_fill_(outside, 0.0).scatter_add_(-1, index, at_listed)
    if text is not None:
        text.scatter_add_(-1, targets[:, None], text.new_full((len(targets), 1), -1.0))
        logits.mul_(1 - share).add_(text, alpha=share)
