"""Where a student's layers and channels come from in its teacher, read off the pruning plans between the two.

Shapes: D = hidden size of the teacher, d = of the student.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cascade.errors import UserError
from cascade.models.dims import ModelDims
from cascade.pruning.plan import PruningPlan


@dataclass(frozen=True)
class Origin:
    """How a teacher's stream is compared with a student's: point by point, channel by channel, nothing learned."""

    points: tuple[int, ...]
    """For each layer of the student the layer of the teacher that it comes from, and last the teacher's number of
    layers. What enters a student's layer is compared with what enters its origin: where layers between two were
    dropped, the one before learns to write what came after the gap."""
    projection: Tensor | None = field(default=None, compare=False)
    """[D, d] float32: the student's stream is the teacher's times this. None where no channel was cut."""

    def project(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., d]."""
        return hidden if self.projection is None else hidden @ self.projection.to(hidden.device, hidden.dtype)


def origin_of(plans: Sequence[PruningPlan]) -> Origin:
    """The origin after cuts by `plans`, the teacher's own first.

    Raises:
        ValueError: there is none, or one does not start where the one before it ended.
    """
    if not plans:
        raise ValueError("at least one plan")
    before = plans[0].source_dims
    kept, projection = list(range(before.num_hidden_layers)), torch.eye(before.hidden_size, dtype=torch.float64)
    for plan in plans:
        if plan.source_dims.num_hidden_layers != len(kept) or plan.source_dims.hidden_size != projection.shape[1]:
            raise ValueError("a plan does not start from the model that the plan before it made")
        kept = [kept[layer] for layer in plan.layers]
        turned = projection if plan.rotation is None else projection @ plan.rotation.double()
        projection = turned[:, plan.hidden]
    whole = projection.shape[0] == projection.shape[1] and all(plan.rotation is None for plan in plans)
    return Origin((*kept, before.num_hidden_layers), None if whole else projection.float())


def even_origin(student: ModelDims, teacher: ModelDims) -> Origin:
    """For a student that was not cut: evenly spaced layers, the same channels.

    Raises:
        UserError: the student has another width, or more layers.
    """
    if student.hidden_size != teacher.hidden_size or student.num_hidden_layers > teacher.num_hidden_layers:
        raise UserError(
            f"distill.features: a student of {student.num_hidden_layers} layers x {student.hidden_size} channels that "
            f"was not cut from its teacher ({teacher.num_hidden_layers} x {teacher.hidden_size}) cannot be compared "
            "with it channel by channel; its width has to be the teacher's"
        )
    depth = student.num_hidden_layers
    return Origin(tuple(number * teacher.num_hidden_layers // depth for number in range(depth + 1)))
