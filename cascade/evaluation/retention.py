"""How much of the parent's ability above chance a member keeps."""

import random
from typing import Any

REQUIRED_SIGMAS = 5.0
"""A parent nearer to chance than this many standard errors shows nothing that could be retained."""


def with_retention(
    metrics: list[dict[str, Any]],
    parent_metrics: list[dict[str, Any]],
    items: dict[str, list[float]],
    parent_items: dict[str, list[float]],
    *,
    seed: int = 0,
    draws: int = 2000,
) -> list[dict[str, Any]]:
    """The metrics with `retention` = (member - chance) / (parent - chance) and its 95% interval filled in.

    Only for scores of single items that have a chance level, and only where the parent is at least
    REQUIRED_SIGMAS standard errors above it; the interval is a paired bootstrap over items. Losses are compared
    by difference, never by ratio, and keep null.
    """
    parents = {_key(metric): metric for metric in parent_metrics}
    result = []
    for metric in metrics:
        key = _key(metric)
        parent = parents.get(key)
        if parent is None or not is_above_chance(parent):
            result.append(metric)
            continue
        chance = parent["chance"]
        interval = _paired_interval(items.get(key, []), parent_items.get(key, []), chance, seed=seed, draws=draws)
        retention = (metric["value"] - chance) / (parent["value"] - chance)
        result.append(metric | {"retention": retention, "retention_interval": interval})
    return result


def is_above_chance(metric: dict[str, Any]) -> bool:
    """Whether a score with a chance level is at least REQUIRED_SIGMAS standard errors above it."""
    if metric["chance"] is None or not metric["stderr"] or metric["value"] is None:
        return False
    return bool(metric["value"] - metric["chance"] >= REQUIRED_SIGMAS * metric["stderr"])


def _paired_interval(
    member: list[float], parent: list[float], chance: float, *, seed: int, draws: int
) -> list[float] | None:
    if not member or len(member) != len(parent):
        return None
    draw, count = random.Random(seed), len(member)
    pairs = list(zip(member, parent, strict=True))
    ratios = []
    for _ in range(draws):
        sample = draw.choices(pairs, k=count)
        above = sum(score for _, score in sample) / count - chance
        if above > 0:
            ratios.append((sum(score for score, _ in sample) / count - chance) / above)
    ratios.sort()
    return [ratios[int(0.025 * len(ratios))], ratios[int(0.975 * len(ratios)) - 1]] if ratios else None


def _key(metric: dict[str, Any]) -> str:
    return f"{metric['task']}/{metric['metric']}/{metric['filter']}"
