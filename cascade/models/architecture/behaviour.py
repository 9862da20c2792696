"""What sizes cannot say about an architecture, observed on a tiny model at work instead of looked up by its name.

The stream is the sum that runs through the layers: x + attention(x) + MLP(...).
"""

import copy
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from cascade.models.architecture.dims import ModelDims
from cascade.models.architecture.twin import probe_values, twin_of
from cascade.runtime.errors import UserError

_DIMS = ModelDims(
    hidden_size=64,
    intermediate_size=40,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=64,
)


@dataclass(frozen=True)
class Norm:
    """The kind of a norm module."""

    centres: bool
    """Subtracts the mean first (LayerNorm)."""
    zero_centred: bool
    """Multiplies by 1 + weight (Gemma)."""
    writes_stream: bool
    """Its output becomes part of the stream (post-norms), and is not only read by a branch."""


@dataclass(frozen=True)
class Behaviour:
    """Modules by name, with '*' for the layer's number."""

    norms: dict[str, Norm]
    lookups: frozenset[str]
    """Embeddings."""
    transposed: frozenset[str]
    """Linear maps whose weight is [input, output] (GPT-2's Conv1D)."""
    readers: frozenset[str]
    """Linear maps inside a layer that read the stream, directly or through a norm: q, k, v, gate, up."""
    reads_through: dict[str, str]
    """The norm whose output a reader reads, where one stands between it and the stream."""
    writers: dict[str, float | None]
    """Linear maps inside a layer that do not read the stream (the outputs of attention and MLP), and the factor on
    their output's way into the stream; None where a norm stands between."""
    parallel: bool
    """Whether attention and MLP both read the layer's input, so that neither sees the other's output."""
    embedding_exponent: float
    """The embedding's output is its weight times hidden_size to this power (0.5 in Gemma), times a constant."""
    pooled: frozenset[str] = frozenset()
    """Linear maps outside the layers that a text passes once, not each of its tokens (poolers, heads of classes)."""


def observe(config: Any, layers_prefix: str) -> Behaviour:
    """The behaviour of an architecture: a tiny model of the config is run and nudged, and what moves is noted.

    Raises:
        UserError: it cannot be run, or its embedding's scale follows the hidden size in an unknown way.
    """
    plain = type(config)(**probe_values(config.to_dict()))
    plain.architectures = config.architectures
    try:
        model = twin_of(plain, dims=_DIMS)
        return _observe(model, layers_prefix, _embedding_exponent(plain, model))
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"model type '{config.model_type}': a tiny model of it cannot be run: {error}") from error


def run_body(model: nn.Module, **inputs: Tensor) -> Any:
    """One forward pass of the model without its head, and without a cache, on the device of its weights or inputs."""
    body: Any = model.base_model
    cacheless = {"use_cache": False} if "use_cache" in inspect.signature(body.forward).parameters else {}
    return body(**inputs, **cacheless)


def first_tensor(output: Any) -> Tensor:
    """A module's output, or the first of a tuple."""
    tensor: Tensor = output[0] if isinstance(output, tuple | list) else output
    return tensor


def _observe(model: nn.Module, prefix: str, embedding_exponent: float) -> Behaviour:
    layer = model.get_submodule(f"{prefix}.0")
    inside = {f"{prefix}.*.{name}": module for name, module in layer.named_modules() if name}
    outside = {name: module for name, module in model.named_modules() if not name.startswith(f"{prefix}.0")}
    linear = {name: module for name, module in inside.items() if isinstance(module, nn.Linear | Conv1D)}
    norms = {name: module for name, module in (outside | inside).items() if _is_norm(module)}
    probe = _Probe(model, layer)

    readers = frozenset(name for name, reads in probe.reads_stream(linear).items() if reads)
    writers = [name for name in linear if name not in readers]
    parallel = not any(probe.reaches(linear[writer], [linear[name] for name in readers]) for writer in writers)
    with torch.no_grad():
        for name in writers:
            for parameter in linear[name].parameters():
                parameter.zero_()
    return Behaviour(
        norms={
            name: _norm_facts(module, probe.moves_stream(module, inside=name in inside))
            for name, module in norms.items()
        },
        lookups=frozenset(name for name, module in outside.items() if isinstance(module, nn.Embedding)),
        transposed=frozenset(
            name for name, module in (outside | inside).items() if isinstance(module, Conv1D) and name
        ),
        readers=readers,
        reads_through=probe.norms_before({name: linear[name] for name in readers}, norms),
        writers={name: probe.gain(linear[name]) for name in writers},
        parallel=parallel,
        embedding_exponent=embedding_exponent,
        pooled=probe.pooled({name: module for name, module in outside.items() if isinstance(module, nn.Linear)}),
    )


class _Probe:
    """Forward passes of one tiny model, in which the output of some module is changed."""

    def __init__(self, model: nn.Module, layer: nn.Module):
        self.model, self.layer = model, layer
        self.ids = torch.arange(14).view(2, 7) + 3

    def run(self, watched: nn.Module, *, at_input: bool = False) -> Tensor:
        """The output (or input) of `watched` in one pass."""
        seen: list[Tensor] = []
        with _output_hook(watched, lambda args, output: seen.append(args[0] if at_input else output)):
            with torch.no_grad():
                run_body(self.model, input_ids=self.ids)
        return seen[0]

    def reads_stream(self, linear: dict[str, nn.Module]) -> dict[str, bool]:
        """Whether each linear map's input is still there when all of them write nothing."""
        inputs: dict[str, Tensor] = {}
        handles = []
        for name, module in linear.items():
            handles.append(module.register_forward_pre_hook(_keeper(inputs, name)))
            handles.append(module.register_forward_hook(lambda module, args, output: torch.zeros_like(output)))
        with torch.no_grad():
            run_body(self.model, input_ids=self.ids)
        for handle in handles:
            handle.remove()
        return {name: bool(tensor.abs().max() > 0) for name, tensor in inputs.items()}

    def pooled(self, linear: dict[str, nn.Module]) -> frozenset[str]:
        """Those of the linear maps that read one row of a text, heads included."""
        inputs: dict[str, Tensor] = {}
        handles = [module.register_forward_pre_hook(_keeper(inputs, name)) for name, module in linear.items()]
        with torch.no_grad():
            self.model(input_ids=self.ids[:1])
        for handle in handles:
            handle.remove()
        return frozenset(name for name, tensor in inputs.items() if tensor.shape[:-1].numel() == 1)

    def norms_before(self, linear: dict[str, nn.Module], norms: dict[str, nn.Module]) -> dict[str, str]:
        """For each linear map whose input is a norm's output, that norm."""
        inputs: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}
        handles = [module.register_forward_pre_hook(_keeper(inputs, name)) for name, module in linear.items()]
        handles += [module.register_forward_hook(_output_keeper(outputs, name)) for name, module in norms.items()]
        with torch.no_grad():
            run_body(self.model, input_ids=self.ids)
        for handle in handles:
            handle.remove()
        places = {tensor.data_ptr(): name for name, tensor in outputs.items()}
        return {name: places[tensor.data_ptr()] for name, tensor in inputs.items() if tensor.data_ptr() in places}

    def reaches(self, source: nn.Module, targets: list[nn.Module]) -> bool:
        """Whether a change of the source's output changes the input of any target."""
        before = [self.run(target, at_input=True) for target in targets]
        with _nudged(source):
            after = [self.run(target, at_input=True) for target in targets]
        return any(not torch.equal(first, second) for first, second in zip(before, after, strict=True))

    def moves_stream(self, module: nn.Module, *, inside: bool) -> bool:
        """Whether a change of a module's output changes the stream, all branches writing nothing."""
        before = self.run(self.layer, at_input=not inside)
        with _nudged(module):
            after = self.run(self.layer, at_input=not inside)
        return not torch.allclose(before, after, rtol=1e-5, atol=1e-5)

    def gain(self, writer: nn.Module) -> float | None:
        """What a change of the writer's output is multiplied by on its way into the stream."""
        before = self.run(self.layer)
        with _nudged(writer) as nudges:
            change = self.run(self.layer) - before
        gain = float((change * nudges[0].view_as(change)).sum() / nudges[0].square().sum())
        proportional = torch.allclose(change, gain * nudges[0].view_as(change), rtol=1e-3, atol=1e-4)
        return gain if proportional else None


def _keeper(inputs: dict[str, Tensor], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs[name] = args[0]

    return hook


def _output_keeper(outputs: dict[str, Tensor], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        outputs[name] = output

    return hook


@contextmanager
def _output_hook(module: nn.Module, see: Callable[[tuple[Any, ...], Tensor], None]) -> Iterator[None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        see(args or (kwargs.get("hidden_states"),), first_tensor(output))

    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _nudged(module: nn.Module) -> Iterator[list[Tensor]]:
    """Adds the same random change to the module's output in every pass; the change is the list's first entry."""
    nudges: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if not nudges:
            nudges.append(torch.randn(output.shape, generator=torch.Generator().manual_seed(1)))
        return output + nudges[0]

    handle = module.register_forward_hook(hook)
    try:
        yield nudges
    finally:
        handle.remove()


def _is_norm(module: nn.Module) -> bool:
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    return weight is not None and weight.ndim == 1 and not isinstance(module, nn.Linear | Conv1D)


def _norm_facts(module: nn.Module, writes_stream: bool) -> Norm:
    weight = dict(module.named_parameters())["weight"]
    inputs = torch.randn(5, weight.numel(), generator=torch.Generator().manual_seed(0))
    silent: Any = copy.deepcopy(module)
    with torch.no_grad():
        centres = torch.allclose(module(inputs), module(inputs + 3), rtol=1e-3, atol=1e-3)
        for parameter in silent.parameters():
            parameter.zero_()
        zero_centred = float(silent(inputs).abs().max()) > 0
    return Norm(centres, zero_centred, writes_stream)


def _embedding_exponent(config: Any, model: nn.Module) -> float:
    scales = [_embedding_scale(model)]
    if scales[0] == 1.0:
        return 0.0
    for factor in (2, 4):
        dims = _DIMS.replace(hidden_size=64 * factor, head_dim=16 * factor)
        scales.append(_embedding_scale(twin_of(config, dims=dims)))
    exponent = math.log2(scales[1] / scales[0])
    if not math.isclose(scales[2], scales[0] * 4**exponent, rel_tol=1e-4):
        raise UserError(
            f"model type '{config.model_type}': its embedding's scale ({scales} at hidden sizes 64, 128, 256) follows "
            "the hidden size in a way that is not explained; this architecture cannot be cut yet"
        )
    return 0.0 if abs(exponent) < 1e-6 else exponent


def _embedding_scale(model: Any) -> float:
    embedding, ids = model.get_input_embeddings(), torch.arange(3, 8)
    with torch.no_grad():
        return float(embedding(ids).norm() / embedding.weight[ids].norm())
