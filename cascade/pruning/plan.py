"""A plan says exactly what stays: readable JSON, made from scores, without any weight.

Shapes: L = layers, H = query heads, I = neurons, D = hidden channels.
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig

from cascade.models.architecture.dims import ModelDims
from cascade.runtime.errors import UserError
from cascade.runtime.files import file_sha256, read_json

PLAN_FORMAT = 3

_ROTATION = ".rotation.safetensors"


@dataclass(frozen=True)
class PruningPlan:
    """The units that a cut keeps, and its factors; all indices are the source's, ascending."""

    source_dims: ModelDims
    target_dims: ModelDims
    target_config: dict[str, Any]
    """The pruned model's config, as transformers writes it."""
    layers: list[int]
    hidden: list[int]
    heads: list[list[int]]
    """Query heads, for each kept layer."""
    key_value_heads: list[list[int]]
    """Key/value heads, for each kept layer."""
    neurons: list[list[int]]
    """Neurons, for each kept layer."""
    norm_scales: dict[str, float]
    """Factor on what each norm multiplies by (1 + weight where it is zero-centred), by the source's parameter name:
    the shorter vector has another mean square."""
    scales: dict[str, float]
    """Factor on other weights: an embedding whose scale follows the hidden size, and what undoes it at a tied head."""
    merged_heads: list[list[list[int]]] = field(default_factory=list)
    """For each kept layer, [kept, removed] pairs of query heads: the kept one becomes 2 x kept - removed (Minitron)."""
    rotation: Tensor | None = field(default=None, compare=False)
    """[D, D] float64: the stream is rotated by this before `hidden` counts."""

    def units(self, dim: str | None, layer: int | None) -> list[int] | None:
        """The units that stay along a dimension (in one kept layer of the source); None where all do.

        Raises:
            ValueError: heads or neurons outside the layers.
        """
        if dim == "hidden_size":
            return self.hidden
        per_layer = {
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value_heads,
            "intermediate_size": self.neurons,
        }
        if dim not in per_layer:
            return None
        if layer is None:
            raise ValueError(f"an axis along {dim} outside the layers")
        return per_layer[dim][self.layers.index(layer)]


def save_plan(plan: PruningPlan, path: Path) -> None:
    """JSON with the summary first and one line per list of indices; a rotation in safetensors beside it."""
    record: dict[str, Any] = {"format": PLAN_FORMAT} | {
        name: value.as_dict() if isinstance(value, ModelDims) else value
        for name, value in vars(plan).items()
        if name != "rotation"
    }
    rotation = path.with_suffix(_ROTATION)
    rotation.unlink(missing_ok=True)  # of a plan that lay here before
    record["rotation_sha256"] = None
    if plan.rotation is not None:
        save_file({"rotation": plan.rotation.contiguous()}, rotation)
        record["rotation_sha256"] = file_sha256(rotation)
    lines = []
    for name, value in record.items():
        if name in ("heads", "key_value_heads", "neurons"):
            rows = ",\n    ".join(json.dumps(row) for row in value)
            lines.append(f"  {json.dumps(name)}: [\n    {rows}\n  ]")
        elif isinstance(value, dict):
            lines.append(f"  {json.dumps(name)}: " + json.dumps(value, indent=2).replace("\n", "\n  "))
        else:
            lines.append(f"  {json.dumps(name)}: {json.dumps(value)}")
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def load_plan(path: Path) -> PruningPlan:
    """Read the plan that `save_plan` wrote.

    Raises:
        UserError: it is no plan, one of another format, or without the rotation that belongs to it.
    """
    try:
        record = read_json(path)
        if record.pop("format") != PLAN_FORMAT:
            raise UserError(f"{path}: written in another plan format; make the plan again")
        digest = record.pop("rotation_sha256")
        for name in ("source_dims", "target_dims"):
            record[name] = ModelDims(**record[name])
        plan = PruningPlan(**record, rotation=None)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a pruning plan as `cascade prune` writes it ({error})") from error
    if digest is None:
        return plan
    rotation = path.with_suffix(_ROTATION)
    if not rotation.is_file() or file_sha256(rotation) != digest:
        raise UserError(f"{path}: its rotation, {rotation.name} beside it, is missing or another one; copy both files")
    return replace(plan, rotation=load_file(rotation)["rotation"])


def config_of(plan: PruningPlan) -> Any:
    """The pruned model's transformers config."""
    values = dict(plan.target_config)
    return AutoConfig.for_model(values.pop("model_type"), **values)
