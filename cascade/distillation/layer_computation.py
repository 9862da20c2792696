"""How a student's layers are computed while it trains: again in the backward pass, or compiled."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cascade.distillation.losses.features import FeatureLoss
from cascade.distillation.options import Execution
from cascade.models.architecture.axes import probe_axes


@contextmanager
def layer_computation(model: Any, execution: Execution, features: FeatureLoss | None) -> Iterator[None]:
    """A context in which the model's layers are checkpointed or compiled, as `execution` says."""
    layers: Any = list(model.get_submodule(probe_axes(model.config).layers_prefix)) if execution.compiled else []
    if execution.compiled and features is not None and features.features.relations:
        layers.pop()  # what is watched inside a layer cannot be seen once it is compiled
    if execution.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for layer in layers:
        layer.compile()
    try:
        yield
    finally:
        if execution.gradient_checkpointing:
            model.gradient_checkpointing_disable()
        for layer in layers:
            layer._compiled_call_impl = None
