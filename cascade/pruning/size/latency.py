"""Measured decode latency as a function of a shape: some shapes are timed on this machine, the rest follows a fit.

A step of decoding costs something per call, per layer, per weight that is read and per key and value that is read:
four non-negative coefficients, fitted to the measured shapes by least squares of the relative error.
"""

import logging
import math
import statistics
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from cascade.models.architecture.axes import ModelAxes, probe_axes
from cascade.models.architecture.dims import ModelDims, config_with_dims
from cascade.models.architecture.model_class import model_from_config
from cascade.models.architecture.positions import usable_context
from cascade.models.architecture.sized import Sized
from cascade.pruning.size.shape import legal_values, solve_shape
from cascade.pruning.size.target import Target
from cascade.runtime.errors import UserError

logger = logging.getLogger(__name__)

TOLERANCE = 0.05
"""A solved shape may be measured slower than its bound by this share: about what a quiet machine repeats."""

_CORRECTIONS = 5


@dataclass(frozen=True)
class DecodeLatency:
    """What a decoding step costs on one machine, at one batch size and context."""

    context: int
    """Tokens in the cache."""
    batch_size: int
    coefficients: tuple[float, ...]
    """Milliseconds per step, per layer, per million weights of matrix products, per million cached values."""
    points: tuple[tuple[dict[str, int], float], ...]
    """(dims, measured milliseconds) that the coefficients were fitted to."""
    device: str
    threads: int

    @property
    def parent_ms(self) -> float:
        """Measured milliseconds of the parent, which shares are of."""
        return self.points[0][1]

    def milliseconds(self, axes: ModelAxes, dims: ModelDims) -> Any:
        """Milliseconds of one step under `dims` (numbers, or arrays of candidates)."""
        features = _features(axes, dims, self.context, self.batch_size)
        return sum(rate * feature for rate, feature in zip(self.coefficients, features, strict=True))

    def as_dict(self) -> dict[str, Any]:
        """The record for a JSON file."""
        return vars(self) | {"points": [list(point) for point in self.points]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DecodeLatency":
        """The latency that `as_dict` gave a record of."""
        points = tuple((dims, float(milliseconds)) for dims, milliseconds in values["points"])
        return cls(**values | {"points": points, "coefficients": tuple(values["coefficients"])})


def measure_decode_ms(config: Any, dims: ModelDims, *, context: int, batch_size: int, steps: int = 15) -> float:
    """Milliseconds of one decoding step: the median of `steps`, in transformers, on the device that evaluation uses.

    Random weights, as values do not change the time; float32 on the CPU, the config's dtype on a GPU.

    Raises:
        UserError: the model does not decode, or the context is longer than it can take.
    """
    limit = usable_context(config)
    if limit and context + steps + 2 > limit:
        raise UserError(f"target.context: {context} is too long to measure decoding: the parent has {limit} positions")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(config, "dtype", None) if device.type == "cuda" else torch.float32
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype.removeprefix("torch."))
    shaped = config_with_dims(config, dims)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_from_config(shaped, dtype=dtype or torch.float32).to(device).eval()
    if not model.can_generate():
        raise UserError(f"target.decode_ms: model type '{config.model_type}' does not decode; give another bound")
    times = []
    with torch.inference_mode():
        ids = torch.ones(batch_size, context, dtype=torch.int64, device=device)
        cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
        for _ in range(steps + 2):
            started = time.perf_counter()
            output = model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
            cache = output.past_key_values
    return statistics.median(times[2:]) * 1e3


def fit_decode_latency(config: Any, *, context: int, batch_size: int) -> DecodeLatency:
    """The fitted latency of the model of `config`: times it, a cut along each axis and one along all axes.

    Raises:
        UserError: the model does not decode at this context.
    """
    seed = Sized(config)
    points: list[tuple[dict[str, int], float]] = []
    for change in _halves(seed):
        dims = seed.dims.replace(**change)
        try:
            config_with_dims(config, dims)
        except ValueError:
            continue  # the architecture does not take this one
        points.append((dims.as_dict(), measure_decode_ms(config, dims, context=context, batch_size=batch_size)))
    return _fit(seed.axes, context, batch_size, points)


def _halves(seed: Sized) -> list[dict[str, int]]:
    """Changes to time: none; each axis halved alone, heads also with their groups; all axes halved."""
    half = {name: values[len(values) // 2] for name, values in legal_values(seed).items()}
    groups, dims = half["num_key_value_heads"], seed.dims
    half["num_attention_heads"] = groups * (dims.num_attention_heads // dims.num_key_value_heads)
    with_groups = {name: half[name] for name in ("num_attention_heads", "num_key_value_heads")}
    if seed.axes.heads_fill_hidden:
        half["hidden_size"] = half["num_attention_heads"] * dims.head_dim
        alone = [with_groups | {"hidden_size": half["hidden_size"]}]
    else:
        alone = [with_groups, {"hidden_size": half["hidden_size"]}]
        if groups < half["num_attention_heads"]:
            # As many key/value heads as before: the query heads are a multiple of those.
            share = half["num_attention_heads"] // dims.num_key_value_heads
            alone.append({"num_attention_heads": max(1, share) * dims.num_key_value_heads})
    alone += [{name: half[name]} for name in ("num_hidden_layers", "intermediate_size")]
    return [{}, *alone, half]


def corrected(latency: DecodeLatency, config: Any, target: Target, *, parent: Any) -> DecodeLatency:
    """The fit after the shape that it solves `target` for has been measured and added to the points.

    Raises:
        UserError: no legal shape meets the target.
    """
    bound = target.decode_ms or math.inf
    bound *= latency.parent_ms if bound <= 1 else 1
    for _ in range(_CORRECTIONS):
        dims = solve_shape(config, target.with_latency(latency), parent=parent)
        known = [milliseconds for point, milliseconds in latency.points if point == dims.as_dict()]
        measured = (
            known[-1]
            if known
            else measure_decode_ms(config, dims, context=latency.context, batch_size=latency.batch_size)
        )
        predicted = float(latency.milliseconds(probe_axes(config), dims))
        latency = replace(latency, points=(*latency.points, (dims.as_dict(), measured)))
        if measured <= bound * (1 + TOLERANCE) and abs(measured / predicted - 1) <= 2 * TOLERANCE:
            return latency
        # The whole fit is moved to what was measured here, where it has to be right.
        latency = replace(latency, coefficients=tuple(rate * measured / predicted for rate in latency.coefficients))
    logger.warning(
        "target.decode_ms: after %d corrections the shape still measures %.3g ms where %.3g ms are allowed; is the "
        "machine busy?",
        _CORRECTIONS,
        measured,
        bound,
    )
    return latency


def _fit(axes: ModelAxes, context: int, batch_size: int, points: list[tuple[dict[str, int], float]]) -> DecodeLatency:
    rows = np.array(
        [_features(axes, ModelDims(**dims), context, batch_size) for dims, _ in points], dtype=np.float64
    ) / np.array([[milliseconds] for _, milliseconds in points])
    used = list(range(rows.shape[1]))
    coefficients = np.zeros(rows.shape[1])
    while used:
        rates = np.linalg.lstsq(rows[:, used], np.ones(len(rows)), rcond=None)[0]
        if (rates >= 0).all():
            coefficients[used] = rates
            break
        used.pop(int(rates.argmin()))
    return DecodeLatency(
        context=context,
        batch_size=batch_size,
        coefficients=tuple(float(rate) for rate in coefficients),
        points=tuple(points),
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        threads=torch.get_num_threads(),
    )


def _features(axes: ModelAxes, dims: ModelDims, context: int, batch_size: int) -> tuple[Any, Any, Any, Any]:
    weights = axes.flops_per_token(dims, 0) / 2e6
    cached = axes.cache_bytes_per_token(dims, 1) * context * batch_size / 1e6
    return 1.0, dims.num_hidden_layers, weights, cached
