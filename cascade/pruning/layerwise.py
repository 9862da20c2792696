"""A batch of text on its way through a model, one layer at a time."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from cascade.models.architecture.axes import probe_axes
from cascade.models.architecture.behaviour import first_tensor, run_body


class Stream:
    """A batch on its way through a model's layers: the stream, and what each layer is called with besides."""

    def __init__(self, hidden: Tensor, calls: list[tuple[tuple[Any, ...], dict[str, Any]]]):
        self.hidden, self.calls = hidden, calls
        self.after = hidden  # past the layer that is being refitted, and those that are dropped behind it

    @classmethod
    def of(cls, model: nn.Module, **inputs: Tensor) -> "Stream":
        """The stream of a batch at the first layer's input."""
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        first: list[Tensor] = []

        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            if not first:
                first.append(hidden)
            calls.append((args[1:], {name: value for name, value in kwargs.items() if name != "hidden_states"}))

        layers: Any = model.get_submodule(probe_axes(model.config).layers_prefix)
        handles = [layer.register_forward_pre_hook(see, with_kwargs=True) for layer in layers]
        try:
            run_body(model, **inputs)
        finally:
            for handle in handles:
                handle.remove()
        return cls(first[0], calls)

    def through(self, layer: nn.Module, number: int, hidden: Tensor | None = None) -> Tensor:
        """The layer's output for `hidden` (default: the stream), which the stream does not move to."""
        args, kwargs = self.calls[number]
        return first_tensor(layer(self.hidden if hidden is None else hidden, *args, **kwargs))

    def watched(self, layer: nn.Module, number: int, modules: dict[str, nn.Module]) -> "Watched":
        """Inputs and outputs of some modules while the stream passes through their layer."""
        inputs: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}

        def keeper(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
                inputs[name], outputs[name] = args[0], output

            return hook

        handles = [module.register_forward_hook(keeper(name)) for name, module in modules.items()]
        try:
            after = self.through(layer, number)
        finally:
            for handle in handles:
                handle.remove()
        return Watched(inputs, outputs, after)


@dataclass(frozen=True)
class Watched:
    """Inputs and outputs of some modules in one pass of their layer, and the layer's output."""

    inputs: dict[str, Tensor]
    """Weight name -> the input of its module."""
    outputs: dict[str, Tensor]
    after: Tensor
    """The layer's output."""
