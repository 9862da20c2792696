"""Forward KL from an unbiased sample of a teacher's probabilities.

Shapes: C = tokens, V = vocabulary, K = ids drawn at a place, at most.
"""

import torch
from torch import Tensor

from cascade.data.token_targets import DrawnTargets


def drawn_kl(logits: Tensor, drawn: DrawnTargets, targets: Tensor, share: float, tokens: Tensor) -> None:
    """Losses of logits [C, V] into tokens [4, C], as `fused_loss` reports them; the logits become their gradient.

    The gradient is q - t of a sample t (Anshumann et al. 2025, https://arxiv.org/abs/2503.16870) and the loss the
    cross-entropy with t less the teacher's entropy: on average over samples, the gradient and value of forward KL.
    `share` is cross-entropy's with the text, `targets` [C]. Models agree where the student's likeliest id is the one
    drawn most often.
    """
    index, text = drawn.ids.clamp_min(0), targets[:, None]
    log_q = torch.log_softmax(logits, -1)
    log_drawn = log_q.gather(-1, index)
    log_text = log_q.gather(-1, text)[:, 0]
    most = drawn.shares.argmax(-1, keepdim=True)
    tokens[0] = -(drawn.shares * log_drawn).sum(-1) - drawn.entropy
    tokens[1] = -log_text
    tokens[2] = drawn.entropy
    tokens[3] = log_drawn.gather(-1, most)[:, 0] >= log_q.amax(-1)
    torch.exp(log_q, out=logits)
    logits.scatter_add_(-1, index, drawn.shares * (share - 1))
    if share:
        logits.scatter_add_(-1, text, logits.new_full((len(targets), 1), -share))
