"""Progress of a run: family > member > stage, with the time left. Bars on a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from cascade.runtime.secrets import redact

OnStep = Callable[[int, int], None]


class RunProgress:
    """The progress of a run in estimated seconds of work, corrected by the time that finished work really took."""

    def __init__(self, console: Console, title: str, estimates: dict[tuple[str, str], float]):
        self.console, self.title, self.estimates = console, redact(title), estimates
        self.started = time.monotonic()
        self.done: dict[tuple[str, str], float] = {}
        """(member, stage) -> seconds that the finished stage took; 0 for a stage that was already there."""
        self.bars = Progress(
            TextColumn("{task.description:<34}"),
            BarColumn(bar_width=28),
            TextColumn("{task.percentage:>3.0f}%  {task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self.tasks: dict[str, TaskID] = {}

    def __enter__(self) -> "RunProgress":
        self.bars.start()
        self.tasks = {name: self.bars.add_task("", total=1.0, note="") for name in ("family", "member", "stage")}
        self._show(None, 0.0)
        return self

    def __exit__(self, *exception: object) -> None:
        self.bars.stop()

    def skip(self, member: str, stage: str, reason: str) -> None:
        """Note a stage that is not run, with the reason; the line is printed once."""
        if (member, stage) in self.done:
            return
        self.done[member, stage] = 0.0
        self._line(f"{member} > {stage}: {reason}")
        self._show((member, stage), 1.0)

    @contextmanager
    def stage(self, member: str, stage: str) -> Iterator[OnStep]:
        """Show a stage that runs inside; yields a callback for (steps done, steps in all)."""
        began, key = time.monotonic(), (member, stage)
        self._show(key, 0.0)
        yield lambda done, total: self._show(key, done / max(1, total))
        seconds = time.monotonic() - began
        self.done[key] = self.done.get(key, 0.0) + seconds  # a stage can be made several times, as candidates are
        left = self._seconds_left(None, 0.0)
        self._line(f"{member} > {stage}: {seconds:.1f} s (family: {_duration(left)} left)")
        self._show(key, 1.0)

    def _seconds_left(self, current: tuple[str, str] | None, fraction: float) -> float:
        """Estimated seconds of the stages to come, scaled by actual over estimated time of the finished ones."""
        ran = {key: seconds for key, seconds in self.done.items() if seconds > 0 and key in self.estimates}
        expected = sum(self.estimates[key] for key in ran)
        # The estimates count for 20 seconds of evidence, so that one odd small stage does not turn them over.
        scale = (sum(ran.values()) + 20) / (expected + 20)
        todo = sum(seconds for key, seconds in self.estimates.items() if key not in self.done and key != current)
        if current is not None and current not in self.done:
            todo += (1 - fraction) * self.estimates.get(current, 0.0)
        return scale * todo

    def _show(self, current: tuple[str, str] | None, fraction: float) -> None:
        if self.bars.disable or not self.tasks:
            return
        whole = sum(self.estimates.values()) or 1.0
        finished = sum(self.estimates.get(key, 0.0) for key in self.done)
        running = fraction * self.estimates.get(current, 0.0) if current and current not in self.done else 0.0
        left = _duration(self._seconds_left(current, fraction))
        self.bars.update(
            self.tasks["family"],
            description=self.title,
            completed=(finished + running) / whole,
            note=f"{left} left",
        )
        if current is not None:
            of_member = {key: seconds for key, seconds in self.estimates.items() if key[0] == current[0]}
            ended = sum(seconds for key, seconds in of_member.items() if key in self.done)
            self.bars.update(
                self.tasks["member"],
                description=redact(f"  {current[0]}"),
                completed=(ended + running) / (sum(of_member.values()) or 1.0),
            )
            self.bars.update(self.tasks["stage"], description=redact(f"    {current[1]}"), completed=fraction)

    def _line(self, text: str) -> None:
        elapsed = _duration(time.monotonic() - self.started)
        self.console.print(f"[{elapsed:>7}] {redact(text)}", markup=False, highlight=False, soft_wrap=True)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"
