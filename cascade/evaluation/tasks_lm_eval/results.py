"""lm-eval's results as metrics of family.json: a value, its standard error, what guessing would score."""

import math
from dataclasses import dataclass, field
from typing import Any

from cascade.report.records import Metric


@dataclass(frozen=True)
class TaskResults:
    """What lm-eval measured."""

    metrics: list[Metric]
    """One per task, metric and filter."""
    items: dict[str, list[float]]
    """'task/metric/filter' -> the score of each item in order, for paired comparisons."""
    raw: dict[str, Any]
    """lm-eval's own result, without the samples."""
    failed: dict[str, str] = field(default_factory=dict)
    """Task -> why it could not be done; the others were."""


def results_of(raw: dict[str, Any], limit: int | None) -> TaskResults:
    """What `lm_eval.simple_evaluate` returned, whose samples are taken out."""
    samples = raw.pop("samples")
    metrics, items = [], {}
    for task, values in raw["results"].items():
        for key in list(values):
            metric, _, filter_name = key.partition(",")
            if not filter_name or metric.endswith("_stderr"):
                continue
            scores = _item_scores(samples.get(task, []), metric, filter_name)
            if scores and not math.isclose(sum(scores) / len(scores), values[key], rel_tol=1e-6, abs_tol=1e-9):
                scores = []  # the metric is no mean of its items' numbers (perplexity, for one)
            items[f"{task}/{metric}/{filter_name}"] = scores
            metrics.append(_metric(raw, task, metric, filter_name, scores, samples.get(task, []), limit))
    return TaskResults(metrics, items, raw)


def _metric(
    raw: dict[str, Any],
    task: str,
    metric: str,
    filter_name: str,
    scores: list[float],
    samples: list[Any],
    limit: Any,
) -> Metric:
    values = raw["results"][task]
    return Metric(
        task=task,
        metric=metric,
        filter=filter_name,
        value=_number(values[f"{metric},{filter_name}"]),
        stderr=_standard_error(scores) if scores else _number(values.get(f"{metric}_stderr,{filter_name}")),
        n=raw["n-samples"].get(task, {}).get("effective"),
        higher_is_better=raw.get("higher_is_better", {}).get(task, {}).get(metric),
        chance=_chance(raw["configs"].get(task, {}), metric, samples),
        num_fewshot=raw.get("n-shot", {}).get(task),
        limit=limit,
    )


def _chance(config: dict[str, Any], metric: str, samples: list[Any]) -> float | None:
    """What guessing scores: one over the number of choices, 0 for an exact match; unknown for other metrics."""
    if metric.startswith("acc"):
        if config.get("output_type") == "multiple_choice" and samples:
            return sum(1 / max(1, len(sample["filtered_resps"])) for sample in samples) / len(samples)
        return 0.0
    return 0.0 if metric.startswith("exact_match") else None


def _item_scores(samples: list[Any], metric: str, filter_name: str) -> list[float]:
    """One number per item where the metric is a mean of such, else nothing."""
    chosen = [sample for sample in samples if sample.get("filter", filter_name) == filter_name]
    values = [sample.get(metric) for sample in sorted(chosen, key=lambda sample: int(sample["doc_id"]))]
    if all(isinstance(value, int | float) for value in values):
        return [float(value) for value in values]
    return []


def _standard_error(scores: list[float]) -> float | None:
    count = len(scores)
    if count < 2:
        return None
    mean = sum(scores) / count
    return float((sum((score - mean) ** 2 for score in scores) / (count * (count - 1))) ** 0.5)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and value == value else None
