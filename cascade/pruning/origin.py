"""Where a student's layers and channels come from in its teacher, read off the pruning plans between the two."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cascade.models.architecture.origin import Origin
from cascade.pruning.plan import PruningPlan


def origin_of(plans: Sequence[PruningPlan]) -> Origin:
    """The origin after cuts by `plans`, the teacher's own first.

    Raises:
        ValueError: there is none, or one does not start where the one before it ended.
    """
    if not plans:
        raise ValueError("at least one plan")
    before = plans[0].source_dims
    depth, width = before.num_hidden_layers, before.hidden_size
    layers, channels = list(range(depth)), torch.arange(width)
    projection: Tensor | None = None
    for plan in plans:
        if plan.source_dims.num_hidden_layers != len(layers) or plan.source_dims.hidden_size != len(channels):
            raise ValueError("a plan does not start from the model that the plan before it made")
        layers = [layers[layer] for layer in plan.layers]
        if plan.rotation is not None:
            before_it = torch.eye(width, dtype=torch.float64)[:, channels] if projection is None else projection
            projection = before_it @ plan.rotation.double()
        channels = channels[plan.hidden]
        projection = None if projection is None else projection[:, plan.hidden]
    points = (*layers, depth)
    if projection is not None:
        return Origin(points, None, projection.float())
    return Origin(points, None if len(channels) == width else channels)
