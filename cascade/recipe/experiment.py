"""The file of `cascade experiment`: ways to make one family (arms), compared at seeds and token budgets."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from cascade.recipe.baseline import Kind
from cascade.recipe.load import problems_of, refuse_secrets
from cascade.recipe.places import FOLDER, RecipePath
from cascade.recipe.section import PositiveInt, Section, as_list
from cascade.runtime.errors import RecipeError
from cascade.store.strict_yaml import Place, YamlDocument, read_yaml

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")

_SET_ELSEWHERE = {
    "seed": "give `seeds`",
    "output": "give --output",
    "name": "the experiment has a `name` of its own",
    "baselines": "give an arm {of: ARM, row: ce}; cut and repaired likewise",
    "finish": "copies in fewer bits are not compared; leave it out",
    "distill.tokens": "give `tokens`: a list of budgets for all arms; `tokens: accumulated` for an arm",
    "members.*.tokens": "give `tokens`: a list of budgets for all arms; `tokens: accumulated` for an arm",
}
_MEASURED_ALIKE = ("evaluate",)


def _as_overrides(overrides: object) -> object:
    """A mapping of dotted keys as KEY=VALUE texts; what else is given stays as it is."""
    if not isinstance(overrides, dict):
        return as_list(overrides)
    return [f"{key}={json.dumps(part, ensure_ascii=False)}" for key, part in overrides.items()]


Overrides = Annotated[list[str], BeforeValidator(_as_overrides)]
"""KEY=VALUE texts as of `cascade run --set`, or the same as a mapping (distill.features.hidden: none); `members.*` in a
key stands for each member."""


class Arm(Section):
    """One way to make the family, or a baseline of another arm's members."""

    set: Overrides = []
    """Recipe keys that this arm changes: `KEY=VALUE` texts as of `cascade run --set`, or a mapping; `members.*` in a
    key stands for each member."""
    tokens: Literal["new", "accumulated"] = "new"
    """Training tokens that a member may use. `new`: the budget; `accumulated`: as many as the reference's chain has
    used altogether, from the parent down to the member of the same name."""
    of: str = ""
    """With `row`: the arm whose baseline this arm is."""
    row: Literal["cut", "repaired", "ce", ""] = ""
    """With `of`: the baseline of that arm's members (`cut`, `repaired` or `ce`) that stands as this arm."""

    @model_validator(mode="after")
    def _row_of_an_arm(self) -> "Arm":
        if bool(self.of) != bool(self.row):
            raise ValueError("`of` and `row` go together: {of: default, row: ce} is that baseline of the arm `default`")
        if self.row and (self.set or self.tokens != "new"):
            raise ValueError("a baseline row is made with its arm; remove `set` and `tokens`")
        return self

    @property
    def is_row(self) -> bool:
        """Whether it is a baseline of another arm, and no family of its own."""
        return bool(self.row)


def _arm(section: object) -> object:
    return {} if section is None else section


class Experiment(Section):
    """The keys at the top level: arms, seeds and token budgets over one parent."""

    name: str
    """Name of the experiment; up to 40 letters, digits, `.`, `_` and `-`."""
    recipe: RecipePath
    """A recipe, relative to this file; its members are the sizes. Of its baselines only those are made that some arm
    names."""
    set: Overrides = []
    """Recipe keys that change for all arms, written as in `arms.NAME.set`."""
    arms: Annotated[dict[str, Annotated[Arm, BeforeValidator(_arm)]], Field(min_length=2)]
    """The ways to make the family, by name; at least two. An empty arm is the recipe as it stands."""
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = [0]
    """Random seeds; each gives one family per arm and budget."""
    tokens: list[PositiveInt] = []
    """Token budgets: new training tokens of each member; each gives one family per arm and seed. The recipe's
    `distill.tokens` where empty."""
    reference: str = ""
    """The arm that the others are compared with; the first arm where not given."""
    fixed_rates: bool = False
    """Whether the recipe and its arms may give learning rates. Otherwise each arm's rate is searched for, with equal
    effort."""
    may_differ: list[Literal["data", "parent"]] = []
    """Inputs in which arms may differ, besides the way the family is made."""
    results: RecipePath = ""
    """Folder, relative to this file, with results of cells that were made before (a copy of OUTPUT/results). They are
    taken over where recipe and inputs are the same."""

    @field_validator("name")
    @classmethod
    def _safe(cls, name: str) -> str:
        return _safe_name(name)

    @field_validator("arms")
    @classmethod
    def _distinct(cls, arms: dict[str, Arm]) -> dict[str, Arm]:
        small = [_safe_name(name).lower() for name in arms]
        twice = [name for name in arms if small.count(name.lower()) > 1]
        if twice:
            raise ValueError(f"{' and '.join(twice)} are one name on disks that ignore capitals; give another name")
        return arms

    @field_validator("seeds", "tokens")
    @classmethod
    def _require_distinct_numbers(cls, numbers: list[int]) -> list[int]:
        twice = [number for number in numbers if numbers.count(number) > 1]
        if twice:
            raise ValueError(f"{twice[0]} stands twice; each is one family")
        return numbers

    @model_validator(mode="after")
    def _known_arms(self) -> "Experiment":
        known = ", ".join(self.arms)
        if self.reference and self.reference not in self.arms:
            raise ValueError(f"reference: unknown arm '{self.reference}'; known: {known}")
        for name, arm in self.arms.items():
            if arm.of and (arm.of not in self.arms or self.arms[arm.of].is_row):
                raise ValueError(f"arms.{name}.of: '{arm.of}' is no arm with members; use one of {self._families()}")
        if self.arms[self.reference_arm].is_row:
            raise ValueError(
                f"reference: '{self.reference_arm}' is a baseline row; use an arm with members: {self._families()}"
            )
        if self.arms[self.reference_arm].tokens == "accumulated":
            raise ValueError(f"reference: '{self.reference_arm}' takes its tokens from the reference; use another arm")
        return self

    def _families(self) -> str:
        return ", ".join(name for name, arm in self.arms.items() if not arm.is_row) or "none"

    @property
    def reference_arm(self) -> str:
        """What the others are compared with."""
        return self.reference or next(iter(self.arms))

    def rows_of(self, arm: str) -> list[Kind]:
        """The baselines that some arm asks of another one."""
        rows = {other_arm.row for other_arm in self.arms.values() if other_arm.of == arm}
        kinds: tuple[Kind, ...] = ("cut", "repaired", "ce")
        return [kind for kind in kinds if kind in rows]


@dataclass(frozen=True)
class ExperimentFile:
    """An experiment, and where its parts stand in its file."""

    path: Path
    form: Experiment
    document: YamlDocument

    def where(self, *place: str | int) -> str:
        """'file:line:column: a.b' of a path of keys."""
        return f"{self.document.where(place)}: {'.'.join(map(str, place))}"


def load_experiment(path: str | Path) -> ExperimentFile:
    """The experiment in a file; the recipe that it names is not read yet.

    Raises:
        RecipeError: with every problem found.
    """
    path = Path(path)
    document = read_yaml(path)
    if not isinstance(document.data, dict):
        raise RecipeError(str(path), [f"{path}:1:1: an experiment is a mapping of keys, starting with `name:`"])
    refuse_secrets(document, path)
    try:
        form = Experiment.model_validate(document.data, context={FOLDER: path.resolve().parent})
    except ValidationError as error:
        raise RecipeError(str(path), problems_of(document, error, model=Experiment)) from error
    problems = [*_misplaced_overrides(document, form.set, ("set",))]
    for name, arm in form.arms.items():
        problems += _misplaced_overrides(document, arm.set, ("arms", name, "set"))
        keys = [(number, text.partition("=")[0]) for number, text in enumerate(arm.set)]
        for number, key in keys:
            if key.split(".")[0] in _MEASURED_ALIKE:
                where = document.where(("arms", name, "set", number))
                problems.append(f"{where}: arms.{name}.set: {key}: all arms are measured alike; set it for all of them")
    if problems:
        raise RecipeError(str(path), problems)
    return ExperimentFile(path, form, document)


def expanded(overrides: list[str], num_members: int) -> list[str]:
    """Overrides with one for each member in place of `members.*`."""
    texts: list[str] = []
    for text in overrides:
        key, equals, value = text.partition("=")
        if key.split(".")[:2] != ["members", "*"]:
            texts.append(text)
            continue
        rest = "".join(f".{part}" for part in key.split(".")[2:])
        texts += [f"members.{number}{rest}{equals}{value}" for number in range(num_members)]
    return texts


def _misplaced_overrides(document: YamlDocument, overrides: list[str], place: Place) -> list[str]:
    problems = []
    for number, text in enumerate(overrides):
        key = text.partition("=")[0]
        general = re.sub(r"^members\.[^.]*\.", "members.*.", key)
        if general in _SET_ELSEWHERE or key.split(".")[0] in ("baselines", "finish"):
            remedy = _SET_ELSEWHERE.get(general) or _SET_ELSEWHERE[key.split(".")[0]]
            where = document.where((*place, number))
            problems.append(f"{where}: {'.'.join(map(str, place))}: {key} is not for an override here; {remedy}")
    return problems


def _safe_name(name: str) -> str:
    if not NAME.fullmatch(name):
        raise ValueError(
            f"'{name}' cannot be a folder's name; use up to 40 letters, digits, '.', '_' and '-', the first no sign"
        )
    return name
