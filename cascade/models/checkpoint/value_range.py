"""Whether a dtype can hold a model's weights and activations. float16 ends at 65,504; beyond is infinity."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cascade.models.checkpoint.tensor_file import checkpoint_entries
from cascade.models.checkpoint.weight_files import listed_names
from cascade.runtime.errors import UserError


def require_held(weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype, place: str) -> None:
    """Refuse to round finite weights to infinity.

    Raises:
        UserError: `dtype` cannot hold a weight; with its name and size.
    """
    largest: dict[str, float] = {}
    for name, weight in weights:
        if not weight.is_floating_point() or torch.finfo(weight.dtype).max <= torch.finfo(dtype).max:
            continue
        detached = weight.detach()
        if not detached.to(dtype).isfinite().all() and detached.isfinite().all():
            largest[name] = float(detached.abs().max())
    if largest:
        raise UserError(
            f"{place}: {_name(dtype)} cannot hold the weights {listed_names(largest)}: they reach "
            f"{max(largest.values()):,.0f}, and it ends at {torch.finfo(dtype).max:,.0f}. Use bfloat16 or float32 "
            "(save.dtype)"
        )


def require_stored_held(folder: Path, dtype: torch.dtype, place: str) -> None:
    """Refuse to round finite weights of a checkpoint on disk to infinity; one tensor is read at a time.

    Raises:
        UserError: `dtype` cannot hold a weight.
    """
    entries = checkpoint_entries(folder)
    wider = {
        name: entry
        for name, entry in entries.items()
        if entry.dtype.is_floating_point and torch.finfo(entry.dtype).max > torch.finfo(dtype).max
    }
    require_held(((name, entry.read()) for name, entry in wider.items()), dtype, place)


@torch.no_grad()
def require_computable(
    model: nn.Module, inputs: Mapping[str, Tensor], dtype: torch.dtype, place: str, *, refuse: bool = True
) -> str:
    """A sentence on values beyond the range of `dtype` that the model computes in float32; empty where there are none.

    Raises:
        UserError: there are such values, and `refuse` is set.
    """
    device = next(model.parameters()).device
    with _largest_values(model) as largest:
        model(**{name: value.to(device) for name, value in inputs.items()})
    limit = torch.finfo(dtype).max
    beyond = {name: magnitude for name, magnitude in largest.items() if not magnitude <= limit}
    if not beyond:
        return ""
    worst = max(beyond, key=lambda name: beyond[name])
    message = (
        f"{place}: computes values of up to {beyond[worst]:,.0f} (in {worst}), and {_name(dtype)} ends at "
        f"{limit:,.0f}: whoever loads it in that dtype gets infinities or NaN. Use bfloat16 or float32 (save.dtype)"
    )
    if refuse:
        raise UserError(message)
    return message


@contextmanager
def _largest_values(model: nn.Module) -> Iterator[dict[str, float]]:
    """The largest magnitude that enters or leaves each module inside; the model as a whole is left out."""
    largest: dict[str, float] = {}

    def note(name: str, values: Any) -> None:
        for value in values if isinstance(values, tuple | list) else (values,):
            if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
                real = value[value > torch.finfo(value.dtype).min / 2]  # masks hold the lowest number of their dtype
                magnitude = float(real.abs().max()) if real.numel() else 0.0
                largest[name] = max(largest.get(name, 0.0), magnitude)

    def hook_of(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            note(name, args)
            note(name, output)

        return hook

    handles = [module.register_forward_hook(hook_of(name)) for name, module in model.named_modules() if name]
    try:
        yield largest
    finally:
        for handle in handles:
            handle.remove()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
