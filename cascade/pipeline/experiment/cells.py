"""The cells of an experiment: each is a recipe, and all are checked before the first runs. Loads no weights."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from cascade.planning.checks import check_family
from cascade.planning.family import ResolvedMember, resolve_family
from cascade.planning.foreseen import require_foreseen
from cascade.planning.parent import parent_config
from cascade.recipe.experiment import ExperimentFile, expanded
from cascade.recipe.load import load_recipe
from cascade.recipe.schema import Member, Recipe
from cascade.runtime.errors import RecipeError, UserError
from cascade.runtime.permissions import NO_PERMISSIONS, Permissions
from cascade.store.strict_yaml import Place, write_yaml


@dataclass(frozen=True)
class Cell:
    """A family to make: an arm at a seed and a budget."""

    arm: str
    seed: int
    tokens: int
    """New training tokens of each member of the reference arm."""
    recipe: Recipe
    members: list[ResolvedMember]

    @property
    def name(self) -> str:
        """The name of the cell's run directory and of its result."""
        return f"{self.arm}-s{self.seed}-{self.tokens}"


def plan_cells(file: ExperimentFile) -> list[Cell]:
    """All cells, ordered so that arms can be compared early: by seed, then by budget, the reference arm first.

    Raises:
        UserError: a cell cannot be made, or arms cannot be compared; the message has all problems of one kind.
    """
    form = file.form
    num_members = _num_members(file)
    common = expanded(form.set, num_members)
    base = _load(file, ("set",), common)
    families = [name for name, arm in form.arms.items() if not arm.is_row]
    families.sort(key=lambda name: name != form.reference_arm)  # stable
    budgets = form.tokens or [_budget_of(base, file)]
    plain = {
        name: _load(file, ("arms", name, "set"), [*common, *_arm_overrides(file, name, num_members)])
        for name in families
    }
    problems = [
        *_incomparable(file, plain),
        *_without_effect(file, plain, common, num_members),
        *_too_small(file, plain, budgets),
    ]
    if problems:
        raise RecipeError(str(file.path), list(dict.fromkeys(problems)))
    cells = []
    for seed in form.seeds:
        for budget in budgets:
            chain: dict[str, int] = {}
            for name in families:
                settings = [
                    *common,
                    *_arm_overrides(file, name, num_members),
                    *_cell_overrides(file, plain[name], name, seed, budget),
                ]
                if form.arms[name].tokens == "accumulated":
                    order = [member.name for member in plain[name].members]
                    settings += [f"members.{order.index(member)}.tokens={count}" for member, count in chain.items()]
                cells.append(_cell(file, name, seed, budget, settings))
                if name == form.reference_arm:
                    chain = accumulated_tokens(cells[-1].members)
    return cells


def _num_members(file: ExperimentFile) -> int:
    """The number of members that `members.*` stands for: the recipe's, or those that the file's `set` puts in place."""
    overrides = [override for override in file.form.set if not override.startswith("members.*")]
    return len(_load(file, ("set",), overrides).members)


def check_cells(file: ExperimentFile, cells: Sequence[Cell], permissions: Permissions = NO_PERMISSIONS) -> None:
    """Check each arm once, before any cell runs.

    Raises:
        UserError: names the arm whose cells cannot be made.
    """
    for cell in {cell.arm: cell for cell in reversed(cells)}.values():
        with _of_arm(file, cell.arm):
            config = config_of(cell.recipe)
            check_family(cell.recipe, config, cell.members)
            require_foreseen(cell.recipe, config, cell.members, permissions)


def accumulated_tokens(members: Sequence[ResolvedMember]) -> dict[str, int]:
    """Training tokens of the chain from the parent down to each member, by the member's name."""
    totals: dict[str, int] = {}
    for member in members:  # a seed stands before what is cut from it
        totals[member.name] = totals.get(member.seed, 0) + member.num_tokens
    return totals


def _cell(file: ExperimentFile, arm: str, seed: int, budget: int, settings: list[str]) -> Cell:
    recipe = _load(file, ("arms", arm), settings)
    with _of_arm(file, arm):
        return Cell(arm, seed, budget, recipe, resolve_family(recipe, config_of(recipe)))


@contextmanager
def _of_arm(file: ExperimentFile, arm: str) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise RecipeError(str(file.path), [f"{file.where('arms', arm)}: {error}"]) from error


def config_of(recipe: Recipe) -> Any:
    """The parent's config, read once for all cells with that parent."""
    return _config(recipe.model_copy(update={"distill": None, "members": [], "seed": 0}).model_dump_json())


@lru_cache(maxsize=8)
def _config(recipe: str) -> Any:
    return parent_config(Recipe.model_validate_json(recipe))


def _load(file: ExperimentFile, place: Place, overrides: list[str]) -> Recipe:
    """The recipe with overrides.

    Raises:
        RecipeError: the problems, each with the place in the experiment's file that causes it.
    """
    try:
        return load_recipe(file.form.recipe, overrides)
    except RecipeError as error:
        problems = []
        for problem in error.problems:
            source = "" if problem.startswith((error.source, "--set")) else f"{error.source}: "
            problems.append(f"{file.where(*place)}: {source}{problem}".replace("--set ", ""))
        raise RecipeError(str(file.path), problems) from error


def _arm_overrides(file: ExperimentFile, arm: str, num_members: int) -> list[str]:
    return expanded(file.form.arms[arm].set, num_members)


def _cell_overrides(file: ExperimentFile, recipe: Recipe, arm: str, seed: int, budget: int) -> list[str]:
    """The overrides that make a cell of an arm."""
    kinds: list[Any] = list(file.form.rows_of(arm))
    if recipe.ce_learning_rate != "auto":
        kinds = [{"ce": {"learning_rate": recipe.ce_learning_rate}} if kind == "ce" else kind for kind in kinds]
    baselines = write_yaml(kinds).strip()
    return [f"seed={seed}", f"distill.tokens={budget}", "finish=[]", "output=''", f"baselines={baselines}"]


def _budget_of(recipe: Recipe, file: ExperimentFile) -> int:
    """The recipe's distill.tokens, for an experiment without `tokens`.

    Raises:
        RecipeError: the recipe has none either.
    """
    if recipe.distill is None or recipe.distill.tokens is None:
        raise RecipeError(str(file.path), [f"{file.where('recipe')}: has no distill.tokens; give `tokens` here"])
    return recipe.distill.tokens


def _incomparable(file: ExperimentFile, plain: dict[str, Recipe]) -> list[str]:
    """Problems that keep arms from being compared."""
    form, problems = file.form, []
    reference = plain[form.reference_arm]
    for name, arm in form.arms.items():
        recipe = plain.get(arm.of)
        if recipe is not None and all(lacks_row(recipe, member, arm.row) for member in recipe.members):
            where = file.where("arms", name, "row")
            problems.append(
                f"{where}: the members of {arm.of} have no '{arm.row}'; remove the arm, or name another one"
            )
    for name, recipe in plain.items():
        where = file.where("arms", name)
        problems += [f"{where}: {problem}" for problem in _not_for_experiments(recipe)]
        problems += [f"{where}: {problem}" for problem in _fixed_rates(file, name, recipe)]
        for section in ("data", "parent"):
            keys = _different_keys(getattr(recipe, section), getattr(reference, section))
            if keys and section not in form.may_differ:
                problems.append(
                    f"{where}: differs from {form.reference_arm} in {section}.{f', {section}.'.join(keys)}; arms are "
                    f"compared on one parent and text. Remove it, or write may_differ: [{section}]"
                )
        names, reference_names = ([member.name for member in either.members] for either in (recipe, reference))
        if names != reference_names:
            problems.append(
                f"{where}: has the members {', '.join(names)}, {form.reference_arm} has {', '.join(reference_names)}; "
                "arms are compared size by size, so that they need the same"
            )
    return problems


def _not_for_experiments(recipe: Recipe) -> list[str]:
    """Problems with keys of a recipe whose results cannot be compared fairly, or that each cell would pay for again."""
    problems = []
    if not recipe.members:
        problems.append("the recipe has no members; they are the sizes that are compared")
    if recipe.parent.pretrain is not None or recipe.parent.fit is not None:
        problems.append(
            "the recipe trains its parent, and each seed would have another; run it once and give its folder"
        )
    if recipe.generate is not None:
        problems.append(
            "each seed would ask for a dataset of its own; `cascade generate` it once, give it as data.train"
        )
    if recipe.counts_examples:
        problems.append(f"task: {recipe.task}: experiments compare models of text, block by block")
    for member in recipe.members:
        if member.tokens is not None:
            problems.append(
                f"members.{member.name}.tokens: {member.tokens:,}: each member has the same budget; remove it"
            )
        if member.target is not None and member.target.decode_ms is not None:
            problems.append(
                f"members.{member.name}.target.decode_ms: is measured anew by each cell, whose shapes could differ; "
                "bound params instead"
            )
    return problems


def lacks_row(recipe: Recipe, member: Member, kind: str) -> bool:
    """Whether a member's start rules out this kind of baseline."""
    if kind == "cut":
        return member.start not in ("prune", "layers")
    return kind == "repaired" and (member.start != "prune" or recipe.prune.repair.method == "none")


def _fixed_rates(file: ExperimentFile, arm: str, recipe: Recipe) -> list[str]:
    if file.form.fixed_rates or recipe.distill is None:
        return []
    rates = {"distill.learning_rate": recipe.distill.learning_rate}
    if "ce" in file.form.rows_of(arm):
        rates["baselines.ce.learning_rate"] = recipe.ce_learning_rate
    return [
        f"{key}: {rate:g} is given, and a rate that suits one arm can be unfair to another; set {key}=auto for all "
        "arms, so that each one's is searched for, or write fixed_rates: true, and the tables say so"
        for key, rate in rates.items()
        if rate != "auto"
    ]


def _different_keys(first: Any, second: Any) -> list[str]:
    ours, theirs = first.model_dump(), second.model_dump()
    return [key for key in ours if ours[key] != theirs[key]]


def _without_effect(file: ExperimentFile, plain: dict[str, Recipe], common: list[str], num_members: int) -> list[str]:
    """Overrides of arms that leave the recipe as it is without them, and arms that are the same."""
    problems = []
    for name, recipe in plain.items():
        overrides = file.form.arms[name].set
        for number, text in enumerate(overrides):
            rest = expanded(overrides[:number] + overrides[number + 1 :], num_members)
            try:
                same = load_recipe(file.form.recipe, [*common, *rest]) == recipe
            except RecipeError:
                continue  # it is needed, for the others to be valid
            if same:
                whose = "every member has it" if text.startswith("members.*") else "the recipe says so"
                where = file.document.where(("arms", name, "set", number))
                problems.append(f"{where}: arms.{name}.set: {text} changes nothing: {whose} already; remove it")
    seen: dict[str, str] = {}
    for name, recipe in plain.items():
        key = f"{file.form.arms[name].tokens} {recipe.model_dump_json()}"
        if key in seen:
            problems.append(f"{file.where('arms', name)}: is the same as {seen[key]}; say with `set` what differs")
        seen.setdefault(key, name)
    for name, arm in file.form.arms.items():
        twin = next(
            (
                other_name
                for other_name, twin_arm in file.form.arms.items()
                if arm.is_row and twin_arm == arm and other_name != name
            ),
            "",
        )
        if twin and list(file.form.arms).index(twin) < list(file.form.arms).index(name):
            problems.append(f"{file.where('arms', name)}: is the same as {twin}; remove it")
    return problems


def _too_small(file: ExperimentFile, plain: dict[str, Recipe], budgets: list[int]) -> list[str]:
    problems = []
    for name, recipe in plain.items():
        batch = recipe.distill.batch_size if recipe.distill else 0
        step = batch * recipe.data.block_size
        for number, budget in enumerate(budgets):
            if budget < step:
                where = file.where("tokens", number) if file.form.tokens else file.where("recipe")
                problems.append(
                    f"{where}: {budget:,} tokens are less than one optimizer step of arm {name}: distill.batch_size "
                    f"{batch} x data.block_size {recipe.data.block_size} = "
                    f"{step:,}; give at least that"
                )
    return problems
