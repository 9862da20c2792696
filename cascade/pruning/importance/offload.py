"""A model that stays on disk: the weights of each layer are read when the layer runs, and dropped after it.

For statistics of models that do not fit in memory. Every batch reads every layer once.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.initialization import no_init_weights

from cascade.models.architecture.axes import ModelAxes, probe_axes
from cascade.models.architecture.model_class import model_from_config
from cascade.models.architecture.sized import Sized
from cascade.models.checkpoint.load import ModelSource, load_config
from cascade.models.checkpoint.stored_names import stored_parameters
from cascade.models.checkpoint.tensor_file import Entry
from cascade.runtime.errors import UserError


@contextmanager
def offloaded(source: ModelSource, device: torch.device) -> Iterator[nn.Module]:
    """The model of a checkpoint; only the layer, or other module, that runs at present has weights in memory (float32).

    All other parameters are on the meta device; forward passes run on `device`.

    Raises:
        UserError: the checkpoint is no safetensors folder, is damaged, or lacks a parameter.
    """
    if source.gguf_file:
        raise UserError(f"{source.reference}: a GGUF file is quantised; only safetensors are read layer by layer")
    config = load_config(source)
    axes = probe_axes(config)
    with no_init_weights(), _parameters_on_meta():
        model: nn.Module = model_from_config(config)
    for buffer_owner in model.modules():
        for name, buffer in buffer_owner.named_buffers(recurse=False):
            setattr(buffer_owner, name, buffer.to(device))
    entries = {name: entry for name, (_, entry) in stored_parameters(config, axes, source).items()}
    handles: list[Any] = []
    free: dict[torch.Size, list[torch.Tensor]] = {}
    for group in _groups(model, axes):
        names = {name for _, name, _ in _parameters(model, group)}
        missing = sorted(names - entries.keys() - axes.tied.keys())
        if missing:
            raise UserError(f"{source.reference}: the checkpoint lacks {', '.join(missing[:5])}")
        handles += [
            group.register_forward_pre_hook(_reader(model, group, axes, entries, device, free)),
            group.register_forward_hook(_dropper(model, group, free)),
        ]
    try:
        yield model.eval()
    finally:
        for handle in handles:
            handle.remove()


def blocks_at_once(config: Any, block_size: int) -> int:
    """The number of blocks whose activations take about the memory of one layer's weights; at least 1."""
    sized = Sized(config)
    axes, dims = sized.axes, sized.dims
    deeper = dims.replace(num_hidden_layers=dims.num_hidden_layers + 1)
    layer = axes.num_parameters(deeper) - axes.num_parameters(dims)
    per_token = 6 * dims.hidden_size + 3 * dims.intermediate_size + 4 * dims.num_attention_heads * dims.head_dim
    return max(1, int(layer / (per_token * block_size)))


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Let modules that are built inside have parameters without memory, but buffers with memory."""
    register: Any = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore


def _groups(model: nn.Module, axes: ModelAxes) -> Iterator[nn.Module]:
    """The modules whose weights are read together: each layer, and every other module that has parameters itself."""
    layers = list(model.get_submodule(axes.layers_prefix).children())
    inside = {id(module) for layer in layers for module in layer.modules()}
    yield from layers
    for module in model.modules():
        if id(module) not in inside and any(True for _ in module.parameters(recurse=False)):
            yield module


def _parameters(model: nn.Module, group: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """(owner, full name, name in the owner) of each parameter of a group."""
    prefix = next(name for name, module in model.named_modules() if module is group)
    for path, owner in group.named_modules(prefix=prefix):
        for name, _ in owner.named_parameters(recurse=False):
            yield owner, f"{path}.{name}", name


def _reader(
    model: nn.Module,
    group: nn.Module,
    axes: ModelAxes,
    entries: dict[str, Entry],
    device: torch.device,
    free: dict[torch.Size, list[torch.Tensor]],
) -> Callable[..., None]:
    """A hook that reads a group's weights into memory that an earlier group has freed, or into new memory."""
    parts = list(_parameters(model, group))

    def read(module: nn.Module, args: Any) -> None:
        for owner, full_name, name in parts:
            stored = entries[axes.tied.get(full_name, full_name)].read()
            reusable = free.get(stored.shape)
            # The same memory for every layer: an allocator need not give memory back at once.
            value = reusable.pop() if reusable else torch.empty(stored.shape, dtype=torch.float32, device=device)
            owner._parameters[name] = nn.Parameter(value.copy_(stored), requires_grad=False)

    return read


def _dropper(model: nn.Module, group: nn.Module, free: dict[torch.Size, list[torch.Tensor]]) -> Callable[..., None]:
    """A hook that frees a group's memory for the next group and leaves its parameters on the meta device."""
    parts = list(_parameters(model, group))

    def drop(module: nn.Module, args: Any, output: Any) -> None:
        for owner, _, name in parts:
            value = owner.get_parameter(name).detach()
            free.setdefault(value.shape, []).append(value)
            owner._parameters[name] = nn.Parameter(value.to("meta"), requires_grad=False)

    return drop
