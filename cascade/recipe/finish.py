"""One entry of `finish`: a stage that runs on a copy of a finished member."""

from typing import Literal

from pydantic import model_validator

from cascade.recipe.section import Names, PositiveFloat, PositiveInt, Section


class Finish(Section):
    """Weights in fewer bits; a row of its own beside what it is a copy of."""

    quantise: Literal["int8", "int4"]
    """int8: each row of a linear layer's weight has a scale; int4: each run of up to 128 of its columns. Embeddings and
    head stay as they are. Needs torchao. int4 is written a byte each: its packed layouts need GPU packages."""
    members: Names = []
    """Whose copies, `parent` among them; all where not given."""
    tokens: PositiveInt | None = None
    """Quantisation-aware: first train so many tokens with rounded weights, under the parent and with the loss of the
    recipe's distill section, but without distill.features and distill.on_policy."""
    examples: PositiveInt | None = None
    """Classification, instead of tokens."""
    learning_rate: Literal["auto"] | PositiveFloat = "auto"
    """Of that training; auto: found by short trainings."""

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
