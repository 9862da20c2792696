"""Weights in 8 or 4 bits: torchao's formats as transformers stores them, and the same rounding in training.

Only linear layers of the body are rounded, symmetrically: int8 with a scale for each row of a weight, int4 with one for
each group of columns.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cascade.models.checkpoint.contents import match_weights
from cascade.models.checkpoint.formats import FORMATS
from cascade.models.checkpoint.loading_messages import require_whole
from cascade.runtime.by_name import function_at
from cascade.runtime.errors import UserError

_INT4 = getattr(torch, "int4")  # noqa: B009 - torch makes it while it starts, unseen by type checkers

GROUPS = (128, 64, 32, 16, 8)
"""Possible numbers of columns that share a scale in int4; the largest that divides every weight's columns is taken."""


def require_torchao() -> None:
    """Refuse to start a quantisation that would fail at its end.

    Raises:
        UserError: torchao is not installed.
    """
    try:
        import torchao  # noqa: F401
    except ImportError as error:
        raise UserError("finish: quantise needs torchao: pip install 'cascade-distill[quantise]'") from error


def group_size(model: nn.Module, *, least: int | None = GROUPS[-1], place: str = "finish") -> int:
    """The number of columns that share a scale in int4; 1 where none of `GROUPS` fits and `least` is None.

    `least` is the number that must divide every weight's columns; None where no number must.

    Raises:
        UserError: the body has no linear layer, or a weight's columns are divided by none of `GROUPS`.
    """
    widths = {
        name: module.in_features for name, module in _body(model).named_modules() if isinstance(module, nn.Linear)
    }
    if not widths:
        raise UserError(f"{place}: {type(model).__name__} has no linear layers that could be rounded")
    fitting = [size for size in GROUPS if all(width % size == 0 for width in widths.values())]
    if not fitting and least is not None:
        name = next(name for name, width in widths.items() if width % least)
        raise UserError(f"{place}: int4: {name} has {widths[name]} columns, which {least} does not divide; use int8")
    return fitting[0] if fitting else 1


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """torchao's settings of one format, for one model."""

    stored: Any
    """How weights are stored."""
    trained: Any
    """How a training rounds them; gradients reach the unrounded weights."""


def int8_rounding(model: nn.Module) -> Rounding:
    """8 bits, a scale for each row of a weight."""
    from torchao.quantization import Int8WeightOnlyConfig
    from torchao.quantization.qat import IntxFakeQuantizeConfig

    trained = IntxFakeQuantizeConfig(torch.int8, "per_channel", is_symmetric=True)
    return Rounding(stored=Int8WeightOnlyConfig(), trained=trained)


def int4_rounding(model: nn.Module) -> Rounding:
    """4 bits, a scale for each run of `group_size(model)` columns.

    Raises:
        UserError: no group of `GROUPS` divides every weight's columns.
    """
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup
    from torchao.quantization.qat import IntxFakeQuantizeConfig

    size = group_size(model)
    return Rounding(
        stored=IntxWeightOnlyConfig(weight_dtype=_INT4, granularity=PerGroup(size)),
        trained=IntxFakeQuantizeConfig(_INT4, group_size=size, is_symmetric=True),
    )


def rounding_of(model: nn.Module, kind: str) -> Rounding:
    """The rounding of a model to one of `FORMATS`."""
    rounding: Rounding = function_at(FORMATS[kind].rounding)(model)
    return rounding


def round_while_training(model: nn.Module, kind: str) -> None:
    """Let the body's linear layers compute with rounded weights from now on; gradients reach the unrounded weights."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import QATConfig

    quantize_(_body(model), QATConfig(weight_config=rounding_of(model, kind).trained, step="prepare"))


def load_rounded(folder: Path, plain: nn.Module, kind: str, dtype: torch.dtype) -> nn.Module:
    """The model of a plain checkpoint, the body's weights rounded while they are read, the others in `dtype`.

    `plain` is the same model unrounded: its layers are those that are rounded.
    """
    from transformers import TorchAoConfig

    stored = rounding_of(plain, kind).stored
    inside = {id(module) for module in _body(plain).modules()}
    linear = {name: module for name, module in plain.named_modules() if isinstance(module, nn.Linear)}
    unrounded = [name for name, module in linear.items() if id(module) not in inside]
    model, report = type(plain).from_pretrained(  # type: ignore[attr-defined]
        folder,
        dtype=dtype,
        quantization_config=TorchAoConfig(stored, modules_to_not_convert=unrounded),
        use_safetensors=True,
        output_loading_info=True,
    )
    config: Any = copy.deepcopy(plain.config)
    config.architectures = [type(plain).__name__]
    match = match_weights(folder, config, str(folder))
    require_whole(report, str(folder), left_out=match.left_out, absent=match.absent)
    result: nn.Module = model.eval()
    return result


def is_rounded(config: Any) -> bool:
    """Whether a checkpoint's weights are stored as torchao rounds them."""
    settings = getattr(config, "quantization_config", None) or {}
    by_key = isinstance(settings, dict)
    method = settings.get("quant_method") if by_key else getattr(settings, "quant_method", None)
    return str(getattr(method, "value", method)) == "torchao"


def unpacked(model: Any, dtype: torch.dtype) -> nn.Module:
    """The model with plain weights of the same values, in `dtype`; changed in place."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and hasattr(weight, "dequantize") and type(weight) is not nn.Parameter:
            module.weight = nn.Parameter(weight.dequantize(), requires_grad=False)
    for parameter in model.parameters():  # not .to(dtype): that would round the rotary frequencies, too
        parameter.data = parameter.data.to(dtype)
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        model.__dict__.pop(name, None)
    del model.config.quantization_config
    model.config.dtype = dtype
    result: nn.Module = model
    return result


def _body(model: Any) -> nn.Module:
    body: nn.Module = getattr(model, model.base_model_prefix, model)
    return body
