"""Which keys go with which task."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_TOKENS = ("language", "masked_language")
"""Tasks whose text is read in blocks of tokens."""
_EXAMPLES = ("text_classification", "image_classification", "embedding")
"""Tasks whose texts or images are read one by one."""


@dataclass(frozen=True)
class Rule:
    """A key that some tasks have no use for."""

    tasks: tuple[str, ...]
    key: str
    """The dotted path to it in a recipe."""
    refused: tuple[Any, ...] = ()
    """The values that are refused, of a list the entries; where there are none, every value that is not empty."""
    accepted: tuple[Any, ...] = ()
    """The only values that are not refused."""
    place: str = ""
    """How messages call it, where that is not by its key."""

    def broken_by(self, recipe: Any) -> str:
        """What of a recipe breaks the rule, for a message; '' if nothing does."""
        value = recipe
        for name in self.key.split("."):
            value = getattr(value, name, None)
        if self.refused:
            entries = value if isinstance(value, list) else [value]
            used = [entry for entry in entries if entry in self.refused]
            return f"{self.place or self.key}: {used[0]}" if used else ""
        broken = value is not None and value not in self.accepted if self.accepted else bool(value)
        return (self.place or self.key) if broken else ""


_RULES = (
    Rule(("masked_language",), "evaluate.tasks"),
    Rule(("masked_language",), "generate"),
    Rule(("masked_language",), "data.messages_field"),
    Rule(("masked_language",), "data.document_masks"),
    Rule(("masked_language",), "prune.search"),
    Rule(("masked_language",), "distill.on_policy"),
    Rule(("embedding",), "parent.pretrain"),
    Rule(("embedding",), "parent.fit"),
    Rule(("embedding",), "data.unlabelled"),
    Rule(("embedding",), "baseline_kinds", refused=("ce",), place="baselines"),
    Rule(("embedding",), "distill.cross_entropy_weight"),
    Rule(("embedding",), "distill.loss", accepted=("forward_kl",)),
    Rule(("embedding",), "distill.temperature", accepted=(1,)),
    Rule(_TOKENS, "parent.fit"),
    Rule(_TOKENS, "data.unlabelled"),
    Rule(_TOKENS, "data.train_examples"),
    Rule(_TOKENS, "data.source", refused=("digits",)),
    Rule(_EXAMPLES, "data.production"),
    Rule(_EXAMPLES, "parent.pretrain"),
    Rule(_EXAMPLES, "generate"),
    Rule(_EXAMPLES, "data.messages_field"),
    Rule(_EXAMPLES, "data.streaming"),
    Rule(_EXAMPLES, "data.weights"),
    Rule(_EXAMPLES, "data.document_masks"),
    Rule(_EXAMPLES, "data.source", refused=("stdlib",)),
    Rule(("text_classification", "embedding"), "data.source", refused=("digits",)),
    Rule(_EXAMPLES, "evaluate.tasks"),
    Rule(_EXAMPLES, "prune.search"),
    Rule(_EXAMPLES, "prune.neurons", refused=("taylor", "hessian")),
    Rule(_EXAMPLES, "prune.layers", refused=("removal_loss", "contiguous_loss")),
    Rule(_EXAMPLES, "distill.on_policy"),
    Rule(_EXAMPLES, "distill.teacher", accepted=("parent",), place="distill.teacher: text"),
)

_IMAGE_RULES = (
    Rule(("image_classification",), "finish"),
    Rule(("image_classification",), "distill.features.hidden", accepted=("auto", "none"), place="distill.features"),
    Rule(("image_classification",), "distill.features.embedding", accepted=("none",), place="distill.features"),
    Rule(("image_classification",), "distill.features.relations", place="distill.features"),
    Rule(("image_classification",), "distill.compile"),
)


def require_task(recipe: Any) -> None:
    """Refuse keys of a Recipe that its task has no use for.

    Raises:
        ValueError: a key is given that the task has no use for, or one that it needs is missing.
    """
    _require_budgets(recipe)
    _apply(_RULES, recipe)
    fit = recipe.parent.fit
    if recipe.task == "text_classification" and fit is not None and fit.config:
        raise ValueError("parent.fit.config: a text classifier made from nothing has no tokenizer; give parent.model")
    cut = [member.name for member in recipe.members if member.target is not None]
    if recipe.task == "image_classification" and cut:
        raise ValueError(f"members: {cut[0]}: image models are not cut; give `config` or `student` instead of `target`")
    _apply(_IMAGE_RULES, recipe)


def _apply(rules: Sequence[Rule], recipe: Any) -> None:
    """Refuse the first key of a recipe that breaks one of the rules for its task."""
    for rule in rules:
        place = rule.broken_by(recipe) if recipe.task in rule.tasks else ""
        if place:
            raise ValueError(f"{place} does not go with task: {recipe.task}; remove it")


def _require_budgets(recipe: Any) -> None:
    """Refuse budgets in tokens where the task counts examples, and the other way round."""
    budget, unused = ("examples", "tokens") if recipe.counts_examples else ("tokens", "examples")
    sections = [("distill", recipe.distill), *((f"members: {member.name}", member) for member in recipe.members)]
    sections += [(f"finish.{number}", entry) for number, entry in enumerate(recipe.finish)]
    for name, section in sections:
        if section is not None and getattr(section, unused) is not None:
            raise ValueError(f"{name}.{unused}: task {recipe.task} counts {budget}; give `{budget}`")
    if recipe.distill is not None and getattr(recipe.distill, budget) is None:
        raise ValueError(f"distill.{budget} is missing")


def require_teacher(recipe: Any) -> None:
    """Refuse what a teacher outside this run (an endpoint, or a text's writer) cannot do.

    Raises:
        ValueError: the recipe needs it from that teacher.
    """
    distill, generate = recipe.distill, recipe.generate
    if distill is None or distill.teacher == "parent":
        return
    place = f"distill.teacher: {distill.teacher}"
    features = distill.features
    if features.hidden not in ("auto", "none") or features.embedding != "none" or features.relations:
        raise ValueError(f"{place}: only the parent's inside can be seen; remove distill.features")
    if distill.on_policy is not None:
        raise ValueError(f"{place}: the parent does not judge; remove on_policy")
    if distill.teacher == "text":
        if "ce" in recipe.baseline_kinds:
            raise ValueError(f"{place}: there is no other loss; remove baseline ce")
        return
    if generate is None or generate.endpoint is None or generate.endpoint.top_logprobs is None:
        raise ValueError(f"{place}: it needs generate.endpoint.top_logprobs")
    if distill.loss != "forward_kl" or distill.temperature != 1:
        raise ValueError(f"{place}: the likeliest tokens' probabilities allow forward_kl at temperature 1 only")


def require_finish(recipe: Any) -> None:
    """Refuse copies of unknown members, two copies of one name, and a copy's training that `distill` does not describe.

    Raises:
        ValueError: names the first such entry of `finish`.
    """
    names = ["parent", *(member.name for member in recipe.members)]
    copies: set[str] = set()
    for number, entry in enumerate(recipe.finish):
        unknown = [name for name in entry.members if name not in names]
        if unknown:
            raise ValueError(f"finish.{number}.members: unknown '{unknown[0]}'; the recipe has: {', '.join(names)}")
        for name in entry.members or names:
            copy = f"{name}-{entry.suffix}"
            if copy in copies:
                raise ValueError(f"finish.{number}: the name {copy} stands twice")
            copies.add(copy)
        if entry.budget and recipe.distill is None:
            raise ValueError(f"finish.{number}: a quantisation-aware training needs a `distill` section")
        if entry.budget and recipe.distill.teacher != "parent":
            raise ValueError(f"finish.{number}: quantisation-aware, the parent teaches; remove its budget")
