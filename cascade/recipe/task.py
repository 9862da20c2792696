"""Which keys go with which task."""

from typing import Any


def require_task(recipe: Any) -> None:
    """Refuse keys of a Recipe that its task has no use for.

    Raises:
        ValueError: one of them is given, or one is missing.
    """
    distill, data, parent = recipe.distill, recipe.data, recipe.parent
    budget = "examples" if recipe.counts_examples else "tokens"
    other = "tokens" if recipe.counts_examples else "examples"
    counting = [("distill", distill), *((f"members: {one.name}", one) for one in recipe.members)]
    for name, section in [*counting, *((f"finish.{number}", one) for number, one in enumerate(recipe.finish))]:
        if section is not None and getattr(section, other) is not None:
            raise ValueError(f"{name}.{other}: task {recipe.task} counts {budget}; give `{budget}`")
    if distill is not None and getattr(distill, budget) is None:
        raise ValueError(f"distill.{budget} is missing")
    if recipe.task == "masked_language":
        wrong = {
            "evaluate.tasks": recipe.evaluate.tasks,
            "generate": recipe.generate,
            "data.messages_field": data.messages_field,
            "data.document_masks": data.document_masks,
            "prune.search": recipe.prune.search,
            "distill.on_policy": distill is not None and distill.on_policy,
        }
        _refuse(wrong, recipe.task)
    if recipe.task == "embedding":
        wrong = {
            "parent.pretrain": parent.pretrain,
            "parent.fit": parent.fit,
            "data.unlabelled": data.unlabelled,
            "baselines: ce": "ce" in recipe.baseline_kinds,
            "distill.cross_entropy_weight": distill is not None and distill.cross_entropy_weight,
            "distill.loss": distill is not None and distill.loss != "forward_kl",
            "distill.temperature": distill is not None and distill.temperature != 1,
        }
        _refuse(wrong, recipe.task)
    if not recipe.counts_examples:
        wrong = {
            "parent.fit": parent.fit,
            "data.unlabelled": data.unlabelled,
            "data.train_examples": data.train_examples,
            "data.source: digits": data.source == "digits",
        }
        _refuse(wrong, recipe.task)
        return
    wrong = {
        "data.production": data.production,
        "parent.pretrain": parent.pretrain,
        "generate": recipe.generate,
        "data.messages_field": data.messages_field,
        "data.streaming": data.streaming,
        "data.weights": data.weights,
        "data.document_masks": data.document_masks,
        "data.source: stdlib": data.source == "stdlib",
        "data.source: digits": data.source == "digits" and recipe.task != "image_classification",
        "evaluate.tasks": recipe.evaluate.tasks,
        "prune.search": recipe.prune.search,
        f"prune.neurons: {recipe.prune.neurons}": recipe.prune.neurons in ("taylor", "hessian"),
        f"prune.layers: {recipe.prune.layers}": recipe.prune.layers in ("removal_loss", "contiguous_loss"),
        "distill.on_policy": distill is not None and distill.on_policy,
        "distill.teacher: text": distill is not None and distill.teacher != "parent",
    }
    _refuse(wrong, recipe.task)
    if recipe.task == "text_classification" and parent.fit is not None and parent.fit.config:
        raise ValueError("parent.fit.config: a text classifier made from nothing has no tokenizer; give parent.model")
    if recipe.task == "image_classification":
        asked = distill is not None and (
            distill.features.hidden not in ("auto", "none")
            or distill.features.embedding != "none"
            or distill.features.relations
        )
        cut = [one.name for one in recipe.members if one.target is not None]
        if cut:
            raise ValueError(
                f"members: {cut[0]}: image models are not cut; give `config` or `student` instead of `target`"
            )
        _refuse(
            {
                "finish": recipe.finish,
                "distill.features": asked,
                "distill.compile": distill is not None and distill.compile,
            },
            recipe.task,
        )


def require_teacher(recipe: Any) -> None:
    """Refuse what a teacher that is not here cannot do.

    Raises:
        ValueError: it is asked for.
    """
    distill, generate = recipe.distill, recipe.generate
    if distill is None or distill.teacher == "parent":
        return
    place = f"distill.teacher: {distill.teacher}"
    own = distill.features
    if own.hidden not in ("auto", "none") or own.embedding != "none" or own.relations:
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
    """Refuse copies of what is not there, twice the same, or with a training that nothing says how to do.

    Raises:
        ValueError: one of them is asked for.
    """
    names = ["parent", *(member.name for member in recipe.members)]
    made: set[str] = set()
    for number, entry in enumerate(recipe.finish):
        unknown = [name for name in entry.members if name not in names]
        if unknown:
            raise ValueError(f"finish.{number}.members: unknown '{unknown[0]}'; the recipe has: {', '.join(names)}")
        for name in entry.members or names:
            copy = f"{name}-{entry.suffix}"
            if copy in made:
                raise ValueError(f"finish.{number}: the name {copy} stands twice")
            made.add(copy)
        if entry.budget and recipe.distill is None:
            raise ValueError(f"finish.{number}: a quantisation-aware training needs a `distill` section")
        if entry.budget and recipe.distill.teacher != "parent":
            raise ValueError(f"finish.{number}: quantisation-aware, the parent teaches; remove its budget")


def _refuse(wrong: dict[str, Any], task: str) -> None:
    given = [name for name, value in wrong.items() if value]
    if given:
        raise ValueError(f"{given[0]} does not go with task: {task}; remove it")
