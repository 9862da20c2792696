"""One metric of the held-out split, as family.json has it."""

from cascade.report.records import Metric


def heldout_metric(name: str, value: float, stderr: float | None, count: int, *, higher: bool) -> Metric:
    """A metric without chance level and retention; `count` tokens or examples."""
    return Metric(task="heldout", metric=name, value=value, stderr=stderr, n=count, higher_is_better=higher)
