"""Hooks that sum up what a forward pass shows, on the modules that the axes point at.

Shapes: L = layers, H = query heads, I = neurons, D = hidden channels, B = batch, S = block size.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cascade.models.architecture.axes import ModelAxes
from cascade.models.architecture.behaviour import first_tensor
from cascade.models.architecture.dims import dims_of


class Sums:
    """Hooks on the modules that the axes point at, and the running sums that they fill."""

    def __init__(self, model: nn.Module, axes: ModelAxes, head_contributions: bool):
        self.model, self.axes, self.head_contributions = model, axes, head_contributions
        self.layers = list(model.get_submodule(axes.layers_prefix).children())
        self.sums: dict[str, Tensor] = {}
        self.second_moments, self.batch_size = False, 0
        self.last_tokens: list[Tensor] = []
        self.lengths: dict[str, Tensor] = {}
        self.writers = {
            dim: [name for name, _ in model.named_parameters() if self._is_writer(name, dim)]
            for dim in ("intermediate_size", "num_attention_heads")
        }
        body: Any = model.base_model
        inside = {id(module) for module in body.modules()}  # a masked-LM head has a norm of its own
        self.norms = [
            name for name, _ in model.named_parameters() if axes.is_norm(name) and id(self._module(name)) in inside
        ]
        self.read_norms, self.bare_readers = self._stream_readers()

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Add to the sums during forward passes inside."""
        handles = []
        try:
            for number, layer in enumerate(self.layers):
                handles.append(layer.register_forward_hook(self._layer_hook(number), with_kwargs=True))
            for name in self.norms:
                handles.append(self._module(name).register_forward_hook(self._norm_hook(name)))
            for dim, names in self.writers.items():
                for name in names:
                    handles.append(self._module(name).register_forward_pre_hook(self._writer_hook(name, dim)))
            for name in self.bare_readers:
                handles.append(self._module(name).register_forward_pre_hook(self._reader_hook(name)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def complete_lengths(self) -> None:
        """Add the lengths that no batch has brought: of several processes, one can have had no batch."""
        for name in (name for names in self.writers.values() for name in names if name not in self.lengths):
            self._add_lengths(name)

    def per_layer(self, kind: str) -> Tensor:
        """[L, ...] float32: the sums of one kind, layer by layer."""
        prefix = self.axes.layers_prefix
        return torch.stack([self.sums[f"{kind}:{prefix}.{number}"] for number in range(len(self.layers))]).float()

    def _module(self, name: str) -> nn.Module:
        return self.model.get_submodule(name.rpartition(".")[0])

    def _is_writer(self, name: str, dim: str) -> bool:
        return self.axes.layer_of(name) is not None and self.axes.reads(name) == dim

    def _stream_readers(self) -> tuple[list[str], list[str]]:
        """(norms inside the layers that only branches read, linear maps that read the stream where no norm stands)."""
        norms = self.axes.behaviour.norms
        before = [
            name
            for name in self.norms
            if self.axes.layer_of(name) is not None
            and self.axes.of(name)[0].dim == "hidden_size"
            and not norms[self.axes.module_of(name)].writes_stream
        ]
        if before:
            return before, []
        first: dict[tuple[int | None, str | None], str] = {}
        for name, _ in self.model.named_parameters():
            if self.axes.module_of(name) in self.axes.behaviour.readers and self.axes.output_axis(name) is not None:
                kind = "intermediate_size" if self.axes.writes(name) == "intermediate_size" else "heads"
                first.setdefault((self.axes.layer_of(name), kind), name)
        return [], list(first.values())

    def _add_lengths(self, name: str) -> None:
        """Note the length of the vector that each unit along a matrix's input axis writes."""
        weight = self.model.get_parameter(name).detach().float().cpu()
        self.lengths[name] = torch.linalg.vector_norm(weight, dim=self.axes.output_axis(name))

    def _layer_hook(self, number: int) -> Callable[..., None]:
        name, depth = f"{self.axes.layers_prefix}.{number}", len(self.layers)

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before = (args[0] if args else kwargs["hidden_states"]).float()
            after = first_tensor(output).float()
            length, length_after = torch.linalg.vector_norm(before, dim=-1), torch.linalg.vector_norm(after, dim=-1)
            cosines = (before * after).sum(-1) / (length * length_after).clamp_min(1e-12)
            self._add(f"cosine:{name}", cosines.double().sum())
            self._add(f"ratio:{name}", (length_after / length.clamp_min(1e-12)).double().sum())
            if number == 0:
                self.last_tokens = [before[:, -1]]
            self.last_tokens.append(after[:, -1])
            if number == depth - 1:
                self._add_angles()

        return hook

    def _add_angles(self) -> None:
        stream = nn.functional.normalize(torch.stack(self.last_tokens).double(), dim=-1)
        angles = torch.arccos(torch.einsum("lbd,mbd->lmb", stream, stream).clamp(-1, 1)).sum(-1) / math.pi
        depth = len(self.layers)
        for layer in range(depth):
            row = torch.zeros(depth + 1, dtype=torch.float64)
            row[: depth + 1 - layer] = angles[layer, layer:].cpu()
            self._add(f"angle:{self.axes.layers_prefix}.{layer}", row)

    def _writer_hook(self, name: str, dim: str) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...]) -> None:
            self._add_squared_means(name, args[0])
            if name not in self.lengths:
                self._add_lengths(name)  # here, where an offloaded model has its weights
            if self.head_contributions and dim == "num_attention_heads":
                self._add_contributions(name, args[0])

        return hook

    def _add_contributions(self, name: str, activations: Tensor) -> None:
        # ||a_h W_h||^2 = a_h (W_h W_h^T) a_h: a small product per head instead of one output per head.
        weight = self.model.get_parameter(name).float()
        weight = weight.T if self.axes.output_axis(name) == 0 else weight
        head_dim = dims_of(self.model.config).head_dim
        by_head = weight.view(-1, head_dim, weight.shape[1])
        grams = by_head @ by_head.transpose(1, 2)
        heads = activations.float().reshape(-1, len(by_head), head_dim).transpose(0, 1)
        squares = torch.linalg.vecdot(heads @ grams, heads)
        self._add(f"contribution:{name}", squares.clamp_min(0).sqrt().double().sum(1))

    def _reader_hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            self._add_squared_means(name, args[0])
            if self.second_moments:
                self._add_covariance(args[0])

        return hook

    def _norm_hook(self, name: str) -> Callable[..., None]:
        centres = self.axes.behaviour.norms[self.axes.module_of(name)].centres
        is_read = name in self.read_norms

        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if is_read:
                self._add_squared_means(name, output)
            inputs = args[0].float()
            if centres:
                inputs = inputs - inputs.mean(-1, keepdim=True)
            squares = inputs.square().flatten(0, -2)
            energy = squares.mean(-1).clamp_min_(1e-30).reciprocal_() @ squares
            self._add(f"energy:{name}", energy)
            if is_read and self.second_moments:
                self._add_covariance(args[0])

        return hook

    def _add_squared_means(self, name: str, activations: Tensor) -> None:
        # Over [B, S, D]: mean over S of absolute values, squared, summed over B.
        if activations.ndim == 2:  # OPT joins batch and sequence before its MLP
            activations = activations.view(self.batch_size, -1, activations.shape[-1])
        means = activations.float().abs().sum(1) / activations.shape[1]  # four times as fast as vector_norm's ord=1
        self._add(f"norm:{name}", means.square_().sum(0))

    def principal_axes(self) -> Tensor:
        """[D, D] float64: eigenvectors of the stream's covariance as columns, largest eigenvalue first."""
        vectors: Tensor = torch.linalg.eigh(
            self.sums["covariance:the stream"] / self.sums["covariance count"]
        ).eigenvectors
        # An axis has no sign of its own: its largest part is made positive, whatever rounding would have it.
        largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
        axes: Tensor = (vectors * largest.sign()).flip(1).contiguous()
        return axes

    def _add_covariance(self, stream: Tensor) -> None:
        # Every token counts equally: the first ones of a text are often a hundred times as long as the others.
        tokens = stream.flatten(0, -2).double()
        tokens = tokens / tokens.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-15)
        self._add("covariance:the stream", tokens.T @ tokens)
        self._add("covariance count", torch.tensor(float(len(tokens)), dtype=torch.float64))

    def _add(self, name: str, value: Tensor) -> None:
        if name in self.sums:
            self.sums[name] += value.cpu()
        else:
            self.sums[name] = value.cpu()


class RotatedEnergies:
    """Hooks on norms over the stream that sum up their input's energy along other axes."""

    def __init__(self, model: nn.Module, norms: list[str], rotation: Tensor):
        self.model, self.rotation = model, rotation.float()
        self.names = [name for name in norms if model.get_parameter(name).numel() == len(rotation)]
        self.sums = {name: torch.zeros(len(rotation), dtype=torch.float64) for name in self.names}
        self.sums["count"] = torch.zeros((), dtype=torch.float64)

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Add to the sums during forward passes inside."""
        handles = [
            self.model.get_submodule(name.rpartition(".")[0]).register_forward_hook(self._hook(name))
            for name in self.names
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def finish(self) -> dict[str, Tensor]:
        """By norm weight, [D]: mean over tokens of (x Q)_d^2 / mean(x^2)."""
        return {name: (self.sums[name] * len(self.names) / self.sums["count"]).float() for name in self.names}

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            self.rotation = self.rotation.to(args[0].device)
            squares = (args[0].float().flatten(0, -2) @ self.rotation).square()
            self.sums[name] += (squares.mean(-1).clamp_min(1e-30).reciprocal() @ squares).double().cpu()
            self.sums["count"] += len(squares)

        return hook
