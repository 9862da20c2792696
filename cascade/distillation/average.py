"""The running average of a student's weights over its last steps (EMA), which often is better than the last."""

import torch
from torch import Tensor, nn


class Average:
    """average <- decay * average + (1 - decay) * weights after each step, from the weights at the start on."""

    def __init__(self, student: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {
            name: weight.detach().clone() for name, weight in student.named_parameters() if weight.requires_grad
        }

    @torch.no_grad()
    def update(self, student: nn.Module, step: int) -> None:
        """Add the weights after `step` steps; the average is short at first, so that it forgets the start."""
        decay = min(self.decay, (1 + step) / (10 + step))
        parameters = dict(student.named_parameters())
        for name, average in self.values.items():
            average.lerp_(parameters[name].detach(), 1 - decay)

    @torch.no_grad()
    def put_into(self, student: nn.Module) -> None:
        """Replace the student's weights by their average."""
        parameters: dict[str, Tensor] = dict(student.named_parameters())
        for name, average in self.values.items():
            parameters[name].copy_(average)
