"""Optimizers by name, as one object: Muon takes the matrices inside the layers and leaves the rest to AdamW."""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from cascade.distillation import sharding
from cascade.distillation.options import OPTIMIZERS
from cascade.models.architecture.axes import probe_axes
from cascade.models.architecture.sized import Sized
from cascade.runtime import ranks
from cascade.runtime.errors import UserError


class Optimizer:
    """One or more torch optimizers, each with parameters of its own."""

    def __init__(self, parts: list[torch.optim.Optimizer]) -> None:
        self.parts = parts

    def step(self) -> None:
        """Update every parameter."""
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def set_rate(self, rate: float) -> None:
        """The learning rate of the next step."""
        for group in self._groups():
            if isinstance(group["lr"], Tensor):  # 8-bit AdamW's compiled step wants one and the same tensor
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def tensors(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(key, parameter, tensor) of every state; quantised states as the plain tensors that they are made of."""
        for part in self.parts:
            for parameter, state in part.state.items():
                for key, tensor in state.items():
                    if hasattr(tensor, "__tensor_flatten__") and not sharding.is_sharded(tensor):
                        for inner in tensor.__tensor_flatten__()[0]:
                            yield f"{key}@{inner}", parameter, getattr(tensor, inner)
                    else:
                        yield key, parameter, tensor

    def prepare_state(self) -> None:
        """Create every state, as a first step that changes no weight would."""
        options = [(group, group["lr"], group["weight_decay"]) for group in self._groups()]
        for group, rate, _ in options:
            group["lr"], group["weight_decay"] = torch.zeros_like(rate) if isinstance(rate, Tensor) else 0.0, 0.0
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        self.step()
        self.zero_grad()
        for group, rate, decay in options:
            group["lr"], group["weight_decay"] = rate, decay

    def forget(self) -> None:
        """Drop every state, as before the first step."""
        for part in self.parts:
            part.state.clear()

    def _groups(self) -> Iterator[dict[str, Any]]:
        return (group for part in self.parts for group in part.param_groups)


def require_optimizer(kind: str) -> None:
    """Refuse an optimizer that cannot run here.

    Raises:
        UserError: the name is unknown, torchao is missing, or several processes train with another one than AdamW.
    """
    if kind not in OPTIMIZERS:
        raise UserError(f"optimizer '{kind}' is unknown; known: {', '.join(OPTIMIZERS)}")
    if kind != "adamw" and ranks.world_size() > 1:
        raise UserError(f"optimizer: {kind} needs whole matrices, which several processes do not have; use adamw")
    if kind == "adamw_8bit" and find_spec("torchao") is None:
        raise UserError("optimizer: adamw_8bit needs torchao: pip install 'cascade-distill[8bit]'")


_NEWTON_SCHULZ_STEPS = 5
"""Iterations that torch.optim.Muon makes by default."""


def orthogonalisation_flops(config: Any) -> float:
    """FLOPs that Muon adds to each optimizer step of a model of `config`: five Newton-Schulz iterations a matrix."""
    sized, total = Sized(config), 0.0
    axes, dims = sized.axes, sized.dims
    for name in axes.weights:
        lengths = sorted(float(axis.length(dims)) for axis in axes.weights[name])
        if len(lengths) == 2 and ".*." in name:
            short, long = lengths
            total += dims.num_hidden_layers * _NEWTON_SCHULZ_STEPS * (4 * short**2 * long + 2 * short**3)
    return total


def build_optimizer(kind: str, model: nn.Module, learning_rate: float, weight_decay: float) -> Optimizer:
    """The optimizer of a student's trainable parameters; vectors (norms, biases) have no weight decay.

    adamw: fused. adamw_8bit: moments in 8 bits, through torchao. muon: orthogonalised momentum for matrices inside the
    layers, its steps as long as AdamW's, so that one learning rate serves both (https://arxiv.org/abs/2502.16982).

    Raises:
        UserError: as `require_optimizer`.
    """
    require_optimizer(kind)
    named = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    if kind == "muon":
        axes: Any = probe_axes(model.config)
        matrices = [weight for name, weight in named.items() if weight.ndim == 2 and axes.layer_of(name) is not None]
        orthogonalised = {id(weight) for weight in matrices}
        rest = [weight for weight in named.values() if id(weight) not in orthogonalised]
        muon = torch.optim.Muon(matrices, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        return Optimizer([muon, _adamw(rest, learning_rate, weight_decay)])
    if kind == "adamw_8bit":
        return Optimizer([_adamw_8bit(list(named.values()), learning_rate, weight_decay)])
    return Optimizer([_adamw(list(named.values()), learning_rate, weight_decay)])


def _adamw(parameters: list[nn.Parameter], learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(_groups(parameters, weight_decay), lr=learning_rate, betas=_BETAS, fused=True)


def _adamw_8bit(parameters: list[nn.Parameter], learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    from torchao.optim import AdamW8bit

    optimizer: torch.optim.Optimizer = AdamW8bit(_groups(parameters, weight_decay), lr=learning_rate, betas=_BETAS)
    return optimizer


_BETAS = (0.9, 0.95)


def _groups(parameters: list[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    # Norm weights and biases are not decayed: shrinking them has no regularising effect.
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
