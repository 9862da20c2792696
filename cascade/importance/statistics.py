"""One forward pass over the calibration blocks -> statistics of every kind of unit.

Shapes: L = layers, H = query heads, I = neurons, D = hidden channels, M = norms on the residual stream,
B = batch, S = block size.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cascade.data.blocks import TokenBlocks
from cascade.models.axes import ModelAxes, probe_axes
from cascade.models.dims import dims_of


@dataclass(frozen=True)
class Statistics:
    """What the calibration tokens showed, float32.

    (L2, mean) is the square root of the sum over batch rows of squared means over the sequence, the best of
    Minitron's nine aggregations (https://arxiv.org/abs/2407.14679, table 11).
    """

    block_influence: Tensor
    """[L]: 1 - cosine(layer input, layer output), mean over tokens; ShortGPT, https://arxiv.org/abs/2403.03853."""
    head_norms: Tensor
    """[L, H]: (L2, mean) of each query head's channels at the input of the attention output projection."""
    neuron_norms: Tensor
    """[L, I]: (L2, mean) at the input of the MLP's output projection."""
    hidden_norms: Tensor
    """[M, D]: (L2, mean) of the outputs of the norms inside the layers; zero for the final norm."""
    norm_energies: Tensor
    """[M, D]: mean over tokens of x_d^2 / mean(x^2), x = the norm's input. Each row sums to D."""
    norm_names: tuple[str, ...]
    """The M norms' weight names."""
    num_tokens: int
    """Calibration tokens seen."""


def collect_statistics(
    model: nn.Module,
    blocks: TokenBlocks,
    *,
    batch_size: int = 8,
    on_batch: Callable[[int, int], None] | None = None,
) -> Statistics:
    """All statistics from one forward pass of the model's body (without its head).

    Raises:
        UserError: the architecture's axes cannot be explained.
        ValueError: an activation is not finite; the message names the layer.
    """
    axes = probe_axes(model.config)
    dims = dims_of(model.config)
    sums = _Sums(model, axes)
    device = next(model.parameters()).device
    batches = blocks.batches(batch_size)
    body: Any = model.base_model
    with torch.inference_mode(), sums.hooked():
        for number, (ids, _) in enumerate(batches):
            body(input_ids=ids.to(device), use_cache=False)
            if on_batch is not None:
                on_batch(number + 1, len(batches))
    return sums.finish(dims.head_dim, blocks.input_ids.numel())


def save_statistics(statistics: Statistics, path: Path) -> None:
    """One safetensors file."""
    tensors = {field.name: getattr(statistics, field.name) for field in fields(statistics) if field.type is Tensor}
    metadata = {"norm_names": "\n".join(statistics.norm_names), "num_tokens": str(statistics.num_tokens)}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)


def load_statistics(path: Path) -> Statistics:
    """What `save_statistics` wrote."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    return Statistics(
        **tensors,
        norm_names=tuple(metadata["norm_names"].split("\n")),
        num_tokens=int(metadata["num_tokens"]),
    )


class _Sums:
    """Hooks on the modules that the axes point at, and the running sums they fill."""

    def __init__(self, model: nn.Module, axes: ModelAxes):
        self.model, self.axes = model, axes
        self.layers = list(model.get_submodule(axes.layers_prefix).children())
        self.cosines = [torch.zeros((), dtype=torch.float64) for _ in self.layers]
        self.squares: dict[str, Tensor] = {}
        self.energies: dict[str, Tensor] = {}

    @contextmanager
    def hooked(self) -> Iterator[None]:
        handles = []
        try:
            for number, layer in enumerate(self.layers):
                handles.append(layer.register_forward_hook(self._layer_hook(number), with_kwargs=True))
            for name, template in self._weights():
                module = self.model.get_submodule(name.rpartition(".")[0])
                weight_axes = self.axes.weights[template]
                if self.axes.is_norm(name):
                    handles.append(module.register_forward_hook(self._norm_hook(name)))
                elif _reader_of(weight_axes) in ("intermediate_size", "num_attention_heads"):
                    handles.append(module.register_forward_pre_hook(self._input_hook(name)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def finish(self, head_dim: int, num_tokens: int) -> Statistics:
        per_layer: dict[str, list[Tensor]] = {"intermediate_size": [], "num_attention_heads": []}
        hidden, energies, names = [], [], []
        for name, template in self._weights():
            weight_axes = self.axes.weights[template]
            kind = _reader_of(weight_axes)
            if self.axes.is_norm(name):
                names.append(name)
                energies.append(self.energies[name] / num_tokens)
                inside = self.axes.layer_of(name) is not None
                hidden.append(self.squares[name].sqrt() if inside else torch.zeros_like(self.energies[name]))
            elif kind in per_layer:
                per_layer[kind].append(self.squares[name].sqrt())
        heads = torch.stack(per_layer["num_attention_heads"])
        for name, values in [
            *self.squares.items(),
            *zip(names, energies, strict=True),
        ]:  # in the order they were met
            if not torch.isfinite(values).all():
                raise ValueError(f"activations at '{name}' are not finite; the model or its calibration text is broken")
        return Statistics(
            block_influence=(1 - torch.stack(self.cosines) / num_tokens).float(),
            head_norms=torch.linalg.vector_norm(heads.view(*heads.shape[:1], -1, head_dim), dim=2).float(),
            neuron_norms=torch.stack(per_layer["intermediate_size"]).float(),
            hidden_norms=torch.stack(hidden).float(),
            norm_energies=torch.stack(energies).float(),
            norm_names=tuple(names),
            num_tokens=num_tokens,
        )

    def _weights(self) -> list[tuple[str, str]]:
        """(name, template) of each parameter, in the model's order."""
        return [(name, self.axes.template(name)) for name, _ in self.model.named_parameters()]

    def _layer_hook(self, number: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before = (args[0] if args else kwargs["hidden_states"]).float()
            after = (output[0] if isinstance(output, tuple) else output).float()
            norms = torch.linalg.vector_norm(before, dim=-1) * torch.linalg.vector_norm(after, dim=-1)
            cosines = torch.linalg.vecdot(before, after) / norms.clamp_min(1e-12)
            self.cosines[number] += cosines.double().sum().cpu()

        return hook

    def _input_hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            self._add_squared_means(name, args[0])

        return hook

    def _norm_hook(self, name: str) -> Callable[..., None]:
        inside = self.axes.layer_of(name) is not None

        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if inside:
                self._add_squared_means(name, output)
            squares = args[0].float().square().flatten(0, -2)
            energy = squares.mean(-1).clamp_min_(1e-30).reciprocal_() @ squares
            _add(self.energies, name, energy)

        return hook

    def _add_squared_means(self, name: str, activations: Tensor) -> None:
        # Over [B, S, D]: mean over S of absolute values, squared, summed over B.
        means = torch.linalg.vector_norm(activations.float(), ord=1, dim=1) / activations.shape[1]
        _add(self.squares, name, means.square_().sum(0))


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    if name in sums:
        sums[name] += value.cpu()
    else:
        sums[name] = value.cpu()


def _reader_of(axes: tuple[Any, ...]) -> str | None:
    """The dimension that a matrix reads along its last axis, or None."""
    return axes[-1].dim if len(axes) == 2 and axes[0].dim == "hidden_size" else None
