"""One entry of `finish`: a stage that runs on a copy of a finished member."""

from typing import Annotated, Literal

from pydantic import model_validator

from cascade.models.checkpoint.formats import FORMATS
from cascade.recipe.section import Names, OneOf, PositiveFloat, PositiveInt, Section


class Finish(Section):
    """A copy of finished models with fewer bits per weight, as a row of its own in the results."""

    quantise: Annotated[str, OneOf(*FORMATS)]
    """`int8`: one scale per row of a linear layer's weight; `int4`: one scale per run of up to 128 columns, stored at
    one byte per weight, because packed layouts need GPU packages. Embeddings and head stay as they are. Needs
    torchao."""
    members: Names = []
    """Names of the models to copy, `parent` among them; all where not given."""
    tokens: PositiveInt | None = None
    """Quantisation-aware training: tokens to train on with rounded weights first, under the parent and with the loss of
    the recipe's `distill` section, but without `distill.features` and `distill.on_policy`. No training where not
    given."""
    examples: PositiveInt | None = None
    """Classification and embedding tasks, instead of `tokens`: training examples."""
    learning_rate: Literal["auto"] | PositiveFloat = "auto"
    """Peak learning rate of that training. `auto`: found by short trainings."""

    @property
    def budget(self) -> int:
        """Tokens or examples of the quantisation-aware training; 0: none."""
        return self.tokens or self.examples or 0

    @property
    def suffix(self) -> str:
        """What its copies' names end in: int8, int4, int8qat or int4qat."""
        return self.quantise + ("qat" if self.budget else "")

    @model_validator(mode="after")
    def _trained(self) -> "Finish":
        if self.learning_rate != "auto" and not self.budget:
            raise ValueError("`learning_rate` is that of a quantisation-aware training; give its `tokens`, too")
        return self
