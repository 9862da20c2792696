"""How much of the parent's ability above chance a member keeps.

Shapes: N = items, U = distinct pairs of scores, R = resamples.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

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
        interval = retention_interval(*scores, chance, seed=seed, draws=draws)
        result.append(replace(metric, retention=(metric.value - chance) / above, retention_interval=interval))
    return result


def _above_chance(metric: Metric) -> float | None:
    """The score less its chance level; None where that is less than REQUIRED_SIGMAS standard errors, or unknown."""
    if metric.chance is None or not metric.stderr or metric.value is None:
        return None
    above = metric.value - metric.chance
    return above if above >= REQUIRED_SIGMAS * metric.stderr else None


def retention_interval(
    member: Sequence[float], parent: Sequence[float], chance: float, *, seed: int = 0, draws: int = 2000
) -> tuple[float, float] | None:
    """The 95% interval of the retention, by a paired bootstrap over N items; None without the same items of both.

    Resamples in which the parent is not above chance have no retention and are left out.
    """
    if not member or len(member) != len(parent):
        return None
    pairs_N2 = np.array([member, parent], dtype=np.float64).T
    member_R, parent_R = (_resampled_means(pairs_N2, seed=seed, draws=draws) - chance).T
    ratios = np.sort(member_R[parent_R > 0] / parent_R[parent_R > 0])
    if not len(ratios):
        return None
    return float(ratios[int(0.025 * len(ratios))]), float(ratios[int(0.975 * len(ratios)) - 1])


def _resampled_means(pairs_N2: NDArray[np.float64], *, seed: int, draws: int) -> NDArray[np.float64]:
    """Means [R, 2] over N pairs drawn with replacement, R times."""
    generator, num_items = np.random.default_rng(seed), len(pairs_N2)
    distinct_U2, counts_U = np.unique(pairs_N2, axis=0, return_counts=True)
    if len(distinct_U2) * 16 <= num_items:
        # Right and wrong make four pairs: to draw how often each comes up is to draw the items, in far fewer steps.
        counts_RU = generator.multinomial(num_items, counts_U / num_items, size=draws).astype(np.float64)
        means_R2: NDArray[np.float64] = counts_RU @ distinct_U2 / num_items
        return means_R2
    # A complex number holds a pair: one look-up for both scores.
    pairs_N = pairs_N2.copy().view(np.complex128)[:, 0]
    sums_R = np.array([pairs_N.take(generator.integers(num_items, size=num_items)).sum() for _ in range(draws)])
    return np.stack([sums_R.real, sums_R.imag], axis=1) / num_items


def _key(metric: Metric) -> str:
    return f"{metric.task}/{metric.metric}/{metric.filter}"
