"""The running average of a student's weights over its last steps (EMA), which often is better than the last."""

import torch
from torch import Tensor, nn


class Average:
    """average <- decay * average + (1 - decay) * weights after each step; the first weights start it."""

    def __init__(self, student: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {
            name: value.detach().clone() for name, value in student.named_parameters() if value.requires_grad
        }

    @torch.no_grad()
    def update(self, student: nn.Module, step: int) -> None:
        """Take in the weights after `step` steps; early on the average is shorter, so that it forgets the start."""
        decay = min(self.decay, (1 + step) / (10 + step))
        parameters = dict(student.named_parameters())
        for name, value in self.values.items():
            value.lerp_(parameters[name].detach(), 1 - decay)

    @torch.no_grad()
    def put_into(self, student: nn.Module) -> None:
        """The student gets the average's weights."""
        parameters: dict[str, Tensor] = dict(student.named_parameters())
        for name, value in self.values.items():
            parameters[name].copy_(value)
