"""Bars on a terminal and plain lines elsewhere: what they name, in which order, and how much time they say is left."""

import io
import re
from types import SimpleNamespace

import pytest
from rich.console import Console

from cascade.runtime import progress as progress_module
from cascade.runtime.progress import RunProgress

ESTIMATES = {
    ("parent", "data"): 10.0,
    ("parent", "evaluate"): 30.0,
    ("big", "prune"): 20.0,
    ("big", "distill"): 200.0,
    ("small", "distill"): 100.0,
}


class Clock:
    """A clock that stands still until it is set on."""

    def __init__(self):
        self.seconds = 1000.0

    def monotonic(self):
        return self.seconds


@pytest.fixture
def clock(monkeypatch):
    standing = Clock()
    monkeypatch.setattr(progress_module, "time", SimpleNamespace(monotonic=standing.monotonic))
    return standing


def run_progress(*, terminal=True, title="family", estimates=ESTIMATES):
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=120, color_system=None)
    return RunProgress(console, title, dict(estimates)), output


def seconds_left(progress):
    """What the family's bar says, in seconds."""
    note = progress.bars.tasks[0].fields["note"]
    hours, minutes, seconds = re.fullmatch(r"(?:(\d+)h)?(\d+)m(?:(\d+)s)? left", note).groups(default="0")
    return 3600 * int(hours) + 60 * int(minutes) + int(seconds)


def shares(progress):
    """Filled part of the bars of family, member and stage."""
    return [round(bar.completed / bar.total, 6) for bar in progress.bars.tasks]


def test_before_anything_has_run_all_of_the_estimates_is_left(clock):
    progress, _ = run_progress()
    with progress:
        assert seconds_left(progress) == 360 and shares(progress) == [0, 0, 0]


def test_the_time_left_falls_with_every_step_and_ends_at_nothing(clock):
    progress, _ = run_progress()
    left = []
    with progress:
        for (member, stage), seconds in ESTIMATES.items():
            with progress.stage(member, stage) as on_step:
                for step in range(1, 5):
                    clock.seconds += seconds / 4  # as long as was estimated
                    on_step(step, 4)
                    left.append(seconds_left(progress))
        assert shares(progress) == [1, 1, 1]
    assert left == sorted(left, reverse=True) and len(set(left)) == len(left)
    assert left[-1] == 0
    assert left[3] == 350 and left[7] == 320  # nothing of the estimates but what has run


def test_the_bar_of_a_family_is_filled_by_estimates_and_those_of_member_and_stage_by_their_own(clock):
    progress, _ = run_progress()
    with progress:
        progress.skip("parent", "data", "there")
        progress.skip("parent", "evaluate", "there")
        with progress.stage("big", "prune"):
            clock.seconds += 20
        with progress.stage("big", "distill") as on_step:
            on_step(1, 4)
            assert shares(progress) == pytest.approx([(60 + 50) / 360, (20 + 50) / 220, 0.25], abs=1e-6)


def test_a_stage_that_is_taken_over_says_nothing_of_this_machines_speed(clock):
    progress, _ = run_progress()
    with progress:
        progress.skip("parent", "data", "already done")
        progress.skip("parent", "evaluate", "already done")
        assert seconds_left(progress) == 320  # only what is to come, at the estimated speed
        with progress.stage("big", "prune"):
            clock.seconds += 40
        # One stage that took 40 s for 20, against 20 s of trust in the estimates: (40 + 20) / (20 + 20).
        assert seconds_left(progress) == 1.5 * 300


def test_slow_stages_make_the_time_left_longer_and_quick_ones_shorter(clock):
    left = {}
    for seconds in (5, 10, 20):
        progress, _ = run_progress()
        with progress:
            with progress.stage("parent", "data"):
                clock.seconds += seconds
            left[seconds] = seconds_left(progress)
    assert left[5] < left[10] == 350 < left[20]


def test_a_stage_without_an_estimate_changes_nothing_of_the_time_left(clock):
    progress, _ = run_progress()
    with progress:
        with progress.stage("big", "candidate"):
            clock.seconds += 500
        assert seconds_left(progress) == 360 and shares(progress)[0] == 0


def test_a_stage_that_is_made_several_times_counts_once_in_the_family_and_with_all_its_time(clock):
    progress, _ = run_progress()
    with progress:
        for _ in range(2):
            with progress.stage("big", "prune"):
                clock.seconds += 20
        assert shares(progress)[0] == pytest.approx(20 / 360, abs=1e-6)
        assert seconds_left(progress) == 1.5 * 340  # 40 s for an estimate of 20


def test_a_run_without_estimates_has_bars_and_no_division_by_nothing(clock):
    progress, _ = run_progress(estimates={})
    with progress:
        with progress.stage("big", "prune") as on_step:
            on_step(0, 0)
        assert seconds_left(progress) == 0


def test_bars_name_family_member_and_stage_in_this_order(clock):
    progress, output = run_progress(title="tiny family")
    with progress:
        with progress.stage("big", "distill") as on_step:
            on_step(1, 2)
            assert [bar.description.strip() for bar in progress.bars.tasks] == ["tiny family", "big", "distill"]
            assert [len(bar.description) - len(bar.description.lstrip()) for bar in progress.bars.tasks] == [0, 2, 4]
            progress.bars.refresh()
    shown = output.getvalue()
    assert shown.index("tiny family") < shown.index("  big") < shown.index("    distill")
    assert " 50%" in shown and "left" in shown


@pytest.mark.parametrize("terminal", [True, False])
def test_lines_say_when_which_stage_of_which_member_ended_in_the_order_in_which_it_did(clock, terminal):
    progress, output = run_progress(terminal=terminal)
    with progress:
        progress.skip("parent", "data", "already done with the same inputs and settings")
        with progress.stage("parent", "evaluate"):
            clock.seconds += 30
        clock.seconds += 45
        with progress.stage("big", "prune"):
            clock.seconds += 20.25
    lines = re.findall(r"\[ *\w+\] [^\n\x1b]*(?:left\)|settings)", output.getvalue())
    assert lines == [
        "[  0m00s] parent > data: already done with the same inputs and settings",
        "[  0m30s] parent > evaluate: 30.0 s (family: 5m20s left)",
        "[  1m35s] big > prune: 20.2 s (family: 5m01s left)",
    ]


def test_a_stage_that_is_skipped_twice_is_said_once(clock):
    progress, output = run_progress(terminal=False)
    with progress:
        for _ in range(3):
            progress.skip("big", "statistics", "already done")
        with progress.stage("big", "prune"):
            pass
        progress.skip("big", "prune", "already done")
    assert output.getvalue().count("statistics") == 1 and output.getvalue().count("prune") == 1


def test_there_is_no_bar_where_nobody_looks_at_a_terminal(clock):
    progress, output = run_progress(terminal=False)
    with progress:
        with progress.stage("big", "distill") as on_step:
            for step in range(100):
                on_step(step, 100)
        progress.bars.refresh()
    assert output.getvalue() == "[  0m00s] big > distill: 0.0 s (family: 2m40s left)\n"
    assert "\x1b" not in output.getvalue() and "━" not in output.getvalue()


def test_a_long_line_is_not_broken_where_it_is_read_by_a_program(clock):
    progress, output = run_progress(terminal=False)
    reason = "taken over from " + "a/long/path/" * 30
    with progress:
        progress.skip("big", "distill", reason)
    assert output.getvalue() == f"[  0m00s] big > distill: {reason}\n"


def test_brackets_in_a_line_are_no_markup(clock):
    progress, output = run_progress(terminal=False)
    with progress:
        progress.skip("big", "distill", "[red]not red[/red] [link=file:///etc]x[/link]")
    assert "[red]not red[/red] [link=file:///etc]x[/link]" in output.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_a_stage_that_fails_is_not_said_to_have_ended(clock, terminal):
    progress, output = run_progress(terminal=terminal)
    with pytest.raises(RuntimeError), progress, progress.stage("big", "distill") as on_step:
        on_step(1, 2)
        raise RuntimeError("broken")
    assert "big > distill" not in output.getvalue() and ("big", "distill") not in progress.done


SECRET = "hf_" + "a1B2c3D4e5" * 3


@pytest.mark.parametrize("terminal", [True, False])
def test_neither_lines_nor_bars_show_a_key(clock, terminal, monkeypatch):
    monkeypatch.setenv("OTHER_TOKEN", "value-of-a-token-7")
    progress, output = run_progress(terminal=terminal, title=f"family {SECRET}")
    with progress:
        progress.skip("parent", "data", f"taken over from https://user:{SECRET}@host/x and value-of-a-token-7")
        with progress.stage("big", f"distill {SECRET}"):
            progress.bars.refresh()
    assert SECRET not in output.getvalue() and "value-of-a-token-7" not in output.getvalue()
    assert "[hidden]" in output.getvalue()
