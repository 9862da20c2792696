"""What every section of a recipe is: closed, strict, and unchanged once read."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import core_schema

Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
PositiveInt = Annotated[int, Field(gt=0)]


def as_list(entry: object) -> object:
    """One text as a list of one."""
    return [entry] if isinstance(entry, str) else entry


Names = Annotated[list[str], BeforeValidator(as_list)]


class OneOf:
    """Marks a text of a section as one of these names, as a `Literal` does, where the names are those of a table."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.literal_schema(list(self.names))


class Section(BaseModel):
    """Refuses unknown keys, conversions between types, and NaN."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
