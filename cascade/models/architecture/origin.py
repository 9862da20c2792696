"""Where a student's layers and channels come from in its teacher.

Shapes: D = hidden size of the teacher, d = of the student.
"""

from dataclasses import dataclass, field

from torch import Tensor

from cascade.models.architecture.dims import ModelDims
from cascade.runtime.errors import UserError


@dataclass(frozen=True)
class Origin:
    """How a teacher's stream is compared with a student's: point by point, channel by channel, nothing learned."""

    points: tuple[int, ...]
    """For each layer of the student the layer of the teacher that it comes from, and last the teacher's number of
    layers. What enters a student's layer is compared with what enters its origin: where layers between two were
    dropped, the one before learns to write what came after the gap."""
    channels: Tensor | None = field(default=None, compare=False)
    """[d]: the teacher's channels that the student has. None where it has all, or where the stream was rotated."""
    projection: Tensor | None = field(default=None, compare=False)
    """[D, d] float32: the student's stream is the teacher's times this matrix, where the stream was rotated."""

    def project(self, hidden: Tensor) -> Tensor:
        """The teacher's hidden states [..., D] in the student's channels [..., d]."""
        if self.projection is not None:
            return hidden @ self.projection.to(hidden.device, hidden.dtype)
        return hidden if self.channels is None else hidden[..., self.channels.to(hidden.device)]


def even_origin(student: ModelDims, teacher: ModelDims) -> Origin:
    """The origin of a student that was not cut from its teacher: evenly spaced layers, the same channels.

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
