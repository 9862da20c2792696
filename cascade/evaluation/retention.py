"""How much of the parent's ability above chance a member keeps."""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from cascade.report.records import Metric

REQUIRED_SIGMAS = 5.0
"""A parent nearer to chance than this many standard errors shows nothing that could be retained."""


def with_retention(
    metrics: Iterable[Metric],
    parent_metrics: Iterable[Metric],
    items: Mapping[str, Sequence[float]],
    parent_items: Mapping[str, Sequence[float]],
    *,
    seed: int = 0,
    draws: int = 2000,
) -> list[Metric]:
    """The metrics with `retention` = (member - chance) / (parent - chance) and its 95% interval filled in.

    Only for scores of single items that have a chance level, and only where the parent is at least
    REQUIRED_SIGMAS standard errors above it; the interval is a paired bootstrap over items. Losses are compared
    by difference, never by ratio, and keep None.
    """
    parents = {_key(metric): metric for metric in parent_metrics}
    result = []
    for metric in metrics:
        key = _key(metric)
        parent = parents.get(key)
        above = None if parent is None else _above_chance(parent)
        if metric.value is None or parent is None or parent.chance is None or above is None:
            result.append(metric)
            continue
        scores, chance = (items.get(key, []), parent_items.get(key, [])), parent.chance
        interval = _paired_interval(*scores, chance, seed=seed, draws=draws)
        result.append(replace(metric, retention=(metric.value - chance) / above, retention_interval=interval))
    return result


def _above_chance(metric: Metric) -> float | None:
    """The score less its chance level; None where that is less than REQUIRED_SIGMAS standard errors, or unknown."""
    if metric.chance is None or not metric.stderr or metric.value is None:
        return None
    above = metric.value - metric.chance
    return above if above >= REQUIRED_SIGMAS * metric.stderr else None


def _paired_interval(
    member: Sequence[float], parent: Sequence[float], chance: float, *, seed: int, draws: int
) -> tuple[float, float] | None:
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
    return (ratios[int(0.025 * len(ratios))], ratios[int(0.975 * len(ratios)) - 1]) if ratios else None


def _key(metric: Metric) -> str:
    return f"{metric.task}/{metric.metric}/{metric.filter}"
