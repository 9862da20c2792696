"""A model sharded over several processes with FSDP2; everything here is the identity in a single process."""

from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from cascade.models.architecture.axes import probe_axes
from cascade.runtime.ranks import world_size

_Model = TypeVar("_Model", nn.Module, nn.Module | None)


def shard(model: _Model) -> _Model:
    """Shard a model's parameters over all processes, layer by layer; one that is sharded already stays as it is."""
    if model is None or world_size() == 1 or isinstance(model, FSDPModule):
        return model
    layers: Any = model.get_submodule(probe_axes(model.config).layers_prefix)
    for layer in layers:
        fully_shard(layer)
    fully_shard(model)
    return model


def sync_gradients(model: nn.Module, exchange: bool) -> None:
    """Have the next backward pass exchange gradients, or not: only a step's last one has to."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(exchange)


def reshard(model: nn.Module) -> None:
    """Free the parameters that a forward pass without a backward pass has gathered: they are shards again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_sharded(tensor: Tensor) -> bool:
    """Whether each process holds a part of the tensor."""
    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The full tensor, on every process; all processes have to call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def copy_into(target: Tensor, full: Tensor) -> None:
    """Write a full tensor into one that may be sharded."""
    full = full.to(target.device, target.dtype)
    if isinstance(target, DTensor):
        full = distribute_tensor(full, target.device_mesh, target.placements)
    target.copy_(full)


def gathered(model: nn.Module, empty: nn.Module) -> nn.Module:
    """`empty`, a plain model of the same shape, with the weights of one that is sharded."""
    with torch.no_grad():
        for (name, weight), (expected, parameter) in zip(whole_weights(model), empty.named_parameters(), strict=True):
            if name != expected:
                raise ValueError(f"'{name}' where '{expected}' was due: the models are not of one shape")
            parameter.copy_(weight)
    return empty.eval()


def whole_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, full value) of every parameter."""
    for name, parameter in model.named_parameters():
        yield name, whole(parameter.detach())
