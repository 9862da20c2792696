"""A run that is killed, stopped, starved of disk or met by a second one loses nothing (F.. as in the list of faults)."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from fault_process import failing, fired, leftovers, results_of, weights_of

from cascade.runtime import failpoints, files
from cascade.runtime.errors import BusyError, DiskError, UserError
from cascade.store import commits, lock
from cascade.store.lock import locked

KEPT = ("--set", "distill.cache.kind=sampled", "--set", "distill.features.hidden=none")
BRIEF = ("--set", "baselines=[]", "--set", "evaluate.tasks=[]", "--set", "distill.save_every_minutes=0.0", *KEPT)
"""The smallest family with every kind of stage, its teacher's targets kept, a state after every step."""


@pytest.fixture(scope="module")
def recipe(recipe_folder):
    return recipe_folder / "tiny.yaml"


@pytest.fixture(scope="module")
def unbroken(zygote, recipe, tmp_path_factory):
    """The family as it is without any fault."""
    run = tmp_path_factory.mktemp("unbroken") / "run"
    status, output = zygote.run("run", recipe, "--output", run, *BRIEF, XDG_CACHE_HOME=str(run.parent / "cache"))
    assert status == 0, output
    return run


def until_done(zygote, recipe, run, fault, log, *, status, most, options=BRIEF, **environment):
    """Start the run again and again until nothing goes wrong; how often it went wrong."""
    environment = failing(fault, log) | {"XDG_CACHE_HOME": str(run.parent / "cache")} | environment
    for count in range(most):
        before = len(fired(log))
        found, output = zygote.run("run", recipe, "--output", run, *options, **environment)
        if found == 0:
            return count
        assert found == status, output
        assert len(fired(log)) == before + 1, output
    raise AssertionError(f"still not done after {most} starts: {fired(log)}")


def same_as(run, unbroken):
    assert weights_of(run) == weights_of(unbroken) and len(weights_of(run)) == 2
    assert results_of(run) == results_of(unbroken)
    assert leftovers(run) == []


EVERY_STAGE = ("data", "heldout", "evaluate", "statistics", "candidate", "prune", "repair", "label", "distill")
COMMIT = ("begun", "written", "synced", "manifest", "renamed", "committed")
PLACES = {
    *(f"{stage}/store.{moment}" for stage in EVERY_STAGE for moment in ("renamed",)),
    *(f"{stage}/store.{moment}" for stage in ("distill", "state", "report") for moment in COMMIT),
    *(f"label/shard.{moment}" for moment in ("begun", "synced", "renamed")),
    *(f"label/index.{moment}" for moment in ("begun", "synced", "renamed")),
    *(f"report/file.{moment}" for moment in ("begun", "synced", "renamed")),
    *("distill/distill.microbatch", "distill/distill.step", "distill/distill.loaded", "state/state.tensors"),
    *("report/unsealed", "unsealed", "distill/state.dropped", "event.begun", "file.begun", "file.synced"),
}


def test_F01_F05_F06_killed_at_every_kind_of_place_and_in_every_stage_also_while_resuming_the_family_is_the_same(
    zygote, recipe, unbroken, tmp_path
):
    run, log = tmp_path / "run", tmp_path / "log"
    fault = ",".join(f"{place}:kill@each" for place in sorted(PLACES))
    deaths = until_done(zygote, recipe, run, fault, log, status=-signal.SIGKILL, most=80)
    assert set(fired(log)) == PLACES and deaths == len(PLACES)
    same_as(run, unbroken)
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    finished = [(event["member"], event["stage"], event["key"]) for event in events if event["event"] == "finished"]
    assert len(finished) == len(set(finished))


@pytest.mark.nightly
def test_F01_killed_at_every_single_place_of_every_stage_the_family_is_the_same(zygote, recipe, tmp_path):
    options = ("--set", "distill.save_every_minutes=0.0", *KEPT)  # with baselines and tasks
    whole = tmp_path / "whole" / "run"
    cache = {"XDG_CACHE_HOME": str(whole.parent / "cache")}
    assert zygote.run("run", recipe, "--output", whole, *options, **cache)[0] == 0
    run, log = tmp_path / "run", tmp_path / "log"
    deaths = until_done(zygote, recipe, run, "*:kill@each", log, status=-9, most=400, options=options)
    assert deaths > 150 and {"task/begun", "baseline-ce/store.renamed", "heldout-ce/store.renamed"} < set(fired(log))
    same_as(run, whole)


@pytest.mark.nightly
def test_F02_killed_at_fifty_moments_that_nobody_chose_three_in_a_run_the_family_is_the_same(
    zygote, recipe, unbroken, tmp_path
):
    import random

    draw, deaths = random.Random(0), 0
    started = time.monotonic()
    assert zygote.run("run", recipe, "--output", tmp_path / "timed", *BRIEF, XDG_CACHE_HOME=str(tmp_path / "c"))[0] == 0
    whole = time.monotonic() - started
    for number in range(17):  # fifty-one deaths
        run = tmp_path / f"run-{number}"
        cache = {"XDG_CACHE_HOME": str(tmp_path / f"cache-{number}")}
        killed = 0
        while killed < 3:
            command = zygote.start("run", recipe, "--output", run, *BRIEF, **cache)
            pid, limit = command.pid, time.monotonic() + draw.uniform(0.02, 0.6) * whole
            while time.monotonic() < limit and not (command.folder / "status").exists():
                time.sleep(0.005)
            if not (command.folder / "status").exists():
                os.kill(pid, signal.SIGKILL)
            if command.wait() == -signal.SIGKILL:
                killed += 1
            else:  # it was through before: another run is begun, and its deaths are counted
                shutil.rmtree(run)
                killed = 0
        deaths += killed
        status, output = zygote.run("run", recipe, "--output", run, *BRIEF, **cache)
        assert status == 0, output
        same_as(run, unbroken)
        shutil.rmtree(run)
    assert deaths >= 50


@pytest.mark.parametrize(
    ("first", "status"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.nightly)]
)
def test_F03_the_first_signal_lets_a_training_save_its_state_and_the_run_goes_on_from_there(
    zygote, recipe, unbroken, tmp_path, first, status
):
    run, log = tmp_path / "run", tmp_path / "log"
    fault = failing("distill/distill.step:sleep=3@2", log) | {"XDG_CACHE_HOME": str(unbroken.parent / "cache")}
    options = [*BRIEF, "--set", "distill.save_every_minutes=60"]
    command = zygote.start("run", recipe, "--output", run, *options, **fault)
    command.until(lambda: fired(log))
    os.kill(command.pid, first)  # interrupts the sleep between the second step and the third
    assert command.wait(30) == status
    assert "once more stops at once" in command.output and "the same command goes on" in command.output
    states = [path.name for path in run.glob("stages/.partial-*distill*/step-*")]
    assert states == ["step-000000003"]
    assert (
        zygote.run("run", recipe, "--output", run, *BRIEF, **{"XDG_CACHE_HOME": str(unbroken.parent / "cache")})[0] == 0
    )
    same_as(run, unbroken)


def test_F03_the_second_signal_stops_at_once_and_nothing_finished_is_lost(zygote, recipe, unbroken, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    cache = {"XDG_CACHE_HOME": str(unbroken.parent / "cache")}
    fault = failing("distill/distill.microbatch:sleep=20", log) | cache
    command = zygote.start("run", recipe, "--output", run, *BRIEF, **fault)
    command.until(lambda: fired(log))
    finished = set(run.glob("stages/[!.]*"))
    os.kill(command.pid, signal.SIGINT)
    command.until(lambda: "once more stops at once" in command.output)
    os.kill(command.pid, signal.SIGINT)
    assert command.wait(10) == 130
    assert finished and finished == set(run.glob("stages/[!.]*")) and not list(run.glob("**/.staging-*"))
    assert zygote.run("run", recipe, "--output", run, *BRIEF, **cache)[0] == 0
    same_as(run, unbroken)


FULL = {
    *(f"{stage}/store.written" for stage in EVERY_STAGE),
    *("state/state.tensors", "label/shard.begun", "distill/file.begun", "lock/file.begun"),
    *("report/file.begun", "file.begun"),
}


@pytest.mark.parametrize("fault", ["enospc", pytest.param("edquot", marks=pytest.mark.nightly),
                                   pytest.param("erofs", marks=pytest.mark.nightly),
                                   pytest.param("eio", marks=pytest.mark.nightly)])  # fmt: skip
def test_F12_a_disk_that_is_full_at_any_write_costs_nothing_that_was_finished(
    zygote, recipe, unbroken, tmp_path, fault
):
    run, log = tmp_path / "run", tmp_path / "log"
    text = ",".join(f"{place}:{fault}@each" for place in sorted(FULL))
    assert until_done(zygote, recipe, run, text, log, status=75, most=24) == len(FULL)
    assert set(fired(log)) == FULL
    same_as(run, unbroken)


def test_F12_a_real_limit_on_files_ends_with_75_and_names_the_path_and_leaves_only_what_is_whole(
    zygote, recipe, unbroken, tmp_path
):
    run, cache = tmp_path / "run", {"XDG_CACHE_HOME": str(unbroken.parent / "cache")}
    status, output = zygote.run("run", recipe, "--output", run, *BRIEF, LIMIT_FILE_BYTES="200000", **cache)
    assert status == 75 and "cannot be written" in output and str(run) in output and "free there. Make room" in output
    folders = list(run.glob("stages/[!.]*/"))
    assert folders and all(commits.verify_folder(folder) == [] for folder in folders)
    assert not list(run.glob("**/.staging-*"))
    assert zygote.run("run", recipe, "--output", run, *BRIEF, **cache)[0] == 0
    same_as(run, unbroken)


def test_F12_what_cannot_fit_is_refused_before_anything_is_made(recipe_folder, tmp_path, monkeypatch):
    from cascade.pipeline.run import run_recipe
    from cascade.recipe.load import load_recipe

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    with pytest.raises(DiskError, match=r"the members big, small need 0\.\d+ GB of disk, 0\.00 GB are free"):
        run_recipe(load_recipe(recipe_folder / "tiny.yaml"), output=tmp_path / "run")
    assert not list((tmp_path / "run").glob("stages/*"))


def test_F13_logs_that_cannot_be_written_are_told_once_and_the_run_goes_on(zygote, recipe, unbroken, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    # Every line of the trainings' logs and of the events fails from the first on.
    fault = failing("distill/distill.log:enospc,event.begun:eio", log) | {
        "XDG_CACHE_HOME": str(unbroken.parent / "cache")
    }
    status, output = zygote.run("run", recipe, "--output", run, *BRIEF, **fault)
    assert status == 0 and set(fired(log)) == {"distill/distill.log", "event.begun"}
    assert output.count("the training goes on without its log") == 1 and "an event is not recorded" in output
    assert weights_of(run) == weights_of(unbroken)


def test_F25_a_second_run_is_refused_with_who_holds_the_directory_and_the_first_goes_on(
    zygote, recipe, unbroken, tmp_path
):
    run, log, cache = tmp_path / "run", tmp_path / "log", {"XDG_CACHE_HOME": str(unbroken.parent / "cache")}
    first = zygote.start("run", recipe, "--output", run, *BRIEF, **cache, **failing("data/store.begun:sleep=8", log))
    first.until(lambda: fired(log))
    status, output = zygote.run("run", recipe, "--output", run, *BRIEF, **cache)
    assert status == 73
    assert f"process {first.pid} on {socket.gethostname()}, since 20" in output and "another run is writing" in output
    assert first.wait() == 0
    same_as(run, unbroken)


def test_F25_of_two_runs_started_together_one_makes_the_family_and_the_other_is_refused(
    zygote, recipe, unbroken, tmp_path
):
    run, cache = tmp_path / "run", {"XDG_CACHE_HOME": str(unbroken.parent / "cache")}
    both = [zygote.start("run", recipe, "--output", run, *BRIEF, **cache) for _ in range(2)]
    assert sorted(command.wait() for command in both) == [0, 73]
    same_as(run, unbroken)


def test_F25_a_holder_on_another_machine_that_still_touches_the_lock_is_waited_for_and_a_dead_one_is_not(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(lock, "WAIT_SECONDS", 0.6)
    (tmp_path / lock.LOCK).write_text(json.dumps({"host": "elsewhere", "pid": 7, "started": "then", "command": "c"}))
    with locked(tmp_path):  # nobody touched it meanwhile
        assert json.loads((tmp_path / lock.LOCK).read_text())["host"] == socket.gethostname()
    (tmp_path / lock.LOCK).write_text(json.dumps({"host": "elsewhere", "pid": 7, "started": "then", "command": "c"}))
    beating = threading.Timer(0.2, lambda: os.utime(tmp_path / lock.LOCK))
    beating.start()
    with pytest.raises(BusyError, match="process 7 on elsewhere, since then: c"), locked(tmp_path):
        pass
    beating.join()


@pytest.mark.parametrize("ahead", [-7200, 7200])
def test_F25_clocks_that_differ_do_not_make_a_living_holder_a_dead_one(tmp_path, monkeypatch, ahead):
    """The other machine's clock is the file system's; ours goes wrong by two hours."""
    monkeypatch.setattr(lock, "WAIT_SECONDS", 1.0)
    own = time.time
    monkeypatch.setattr(time, "time", lambda: own() + ahead)
    (tmp_path / lock.LOCK).write_text(json.dumps({"host": "elsewhere", "pid": 7, "started": "then", "command": "c"}))
    beating = threading.Timer(0.3, lambda: os.utime(tmp_path / lock.LOCK))
    beating.start()
    with pytest.raises(BusyError, match="process 7 on elsewhere"), locked(tmp_path):
        pass
    beating.join()
    os.utime(tmp_path / lock.LOCK, (1, 1))
    started = time.monotonic()
    with locked(tmp_path):  # long dead: nobody is waited for
        assert time.monotonic() - started < 0.5


def test_F25_a_run_signs_off_and_touches_its_lock_while_it_lives(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.05)
    with locked(tmp_path):
        os.utime(tmp_path / lock.LOCK, (1, 1))
        limit = time.monotonic() + 5
        while os.stat(tmp_path / lock.LOCK).st_mtime == 1:
            assert time.monotonic() < limit
            time.sleep(0.02)
    assert (tmp_path / lock.LOCK).read_text() == ""


def test_F26_a_killed_holder_leaves_nothing_to_unlock(zygote, recipe, unbroken, tmp_path):
    run, log, cache = tmp_path / "run", tmp_path / "log", {"XDG_CACHE_HOME": str(unbroken.parent / "cache")}
    first = zygote.start("run", recipe, "--output", run, *BRIEF, **cache, **failing("data/store.begun:sleep=60", log))
    first.until(lambda: fired(log))
    os.kill(first.pid, signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    started = time.monotonic()
    with locked(run):
        assert time.monotonic() - started < 5


def test_F27_another_recipes_directory_is_refused_with_the_keys_that_differ_and_stays_as_it_is(
    zygote, recipe, unbroken
):
    before = {path: path.stat().st_mtime_ns for path in unbroken.rglob("*") if path.is_file()}
    status, output = zygote.run("run", recipe, "--output", unbroken, *BRIEF, "--set", "seed=5")
    assert status == 2 and "seed: 0 there, 5 now" in output and "nothing was touched" in output
    assert {path: path.stat().st_mtime_ns for path in unbroken.rglob("*") if path.is_file()} == before


def test_F39_a_directory_that_cannot_be_written_is_named_before_anything_is_computed(
    zygote, recipe, tmp_path, monkeypatch
):
    blocked = tmp_path / "file"
    blocked.write_text("")
    status, output = zygote.run("run", recipe, "--output", blocked / "run", *BRIEF)
    assert status == 2 and str(blocked) in output and "Traceback" not in output
    status, output = zygote.run("run", recipe, "--output", tmp_path / ("long" * 80), *BRIEF)
    assert status == 2 and "cannot be written to" in output and "Traceback" not in output
    monkeypatch.setattr(os, "mkdir", lambda *a, **k: (_ for _ in ()).throw(OSError(30, "Read-only file system")))
    with pytest.raises(UserError, match="Read-only file system; give an --output where this user may write"):
        with locked(tmp_path / "new"):
            pass


def test_F39_F34_odd_paths_umask_locale_time_zone_home_and_hash_seed_change_no_bit(recipe, unbroken, tmp_path):
    home = tmp_path / "hömé with späces 'and' \"quotes\""
    home.mkdir()
    run = home / "Ünï — run"
    environment = os.environ | {
        "HOME": str(home), "LC_ALL": "C", "TZ": "Asia/Kathmandu", "PYTHONHASHSEED": "123",
        "XDG_CACHE_HOME": str(home / "cache"), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "-c", "import os; os.umask(0o077); from cascade.cli.main import main; main()", "run",
               str(recipe), "--output", str(run), *BRIEF]  # fmt: skip
    done = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    same_as(run, unbroken)


class Recorder:
    """What is synced and renamed, in order."""

    def __init__(self, monkeypatch):
        self.done, fsync, rename, replace = [], os.fsync, os.rename, os.replace
        monkeypatch.setattr(
            os, "fsync", lambda number: (self.note("sync", os.readlink(f"/proc/self/fd/{number}")), fsync(number))[1]
        )
        monkeypatch.setattr(
            os, "rename", lambda a, b: (self.note("rename", os.fspath(a), os.fspath(b)), rename(a, b))[1]
        )
        monkeypatch.setattr(
            os, "replace", lambda a, b: (self.note("rename", os.fspath(a), os.fspath(b)), replace(a, b))[1]
        )

    def note(self, kind, *paths):
        self.done.append((kind, *paths))


def test_F40_every_file_and_folder_is_synced_before_the_rename_and_the_folder_above_after_it(tmp_path, monkeypatch):
    recorder = Recorder(monkeypatch)
    for content in ("one", "two"):  # the second replaces the first
        with commits.staged(tmp_path / "a" / "final", {"stage": "x"}) as staging:
            (staging / "sub" / "deep").mkdir(parents=True)
            (staging / "sub" / "deep" / "weights").write_text(content)
            (staging / "plan").write_text(content)
    files.write_atomically(tmp_path / "state.json", "{}")
    assert commits.verify_folder(tmp_path / "a" / "final") == []
    renames = [entry for entry in recorder.done if entry[0] == "rename"]
    assert len(renames) == 2 + 1 + 2 + 1  # two manifests, one old folder aside, two folders, one file
    for number, entry in enumerate(recorder.done):
        if entry[0] != "rename":
            continue
        source, target = entry[1], entry[2]
        synced = {one[1] for one in recorder.done[:number] if one[0] == "sync"}
        if ".staging-" in source and "MANIFEST" not in source:
            assert {f"{source}{name}" for name in ("", "/sub", "/sub/deep", "/sub/deep/weights", "/plan")} <= synced
            assert any(one.startswith(f"{source}/.MANIFEST") for one in synced)
        elif os.path.basename(source).startswith("."):
            assert source in synced
        if os.path.basename(target).startswith(".replaced-"):
            continue  # the rename that follows at once is synced with it
        after = recorder.done[number + 1 :]
        synced_at = after.index(("sync", os.path.dirname(target)))
        # Nothing else is renamed in that folder before this is on the disk.
        assert not any(
            one[0] == "rename" and os.path.dirname(one[2]) == os.path.dirname(target) for one in after[:synced_at]
        )
    assert ("sync", str(tmp_path)) in recorder.done  # the folder `a` is a new entry there


def test_F40_the_targets_of_a_teacher_are_synced_before_and_after_their_rename(tmp_path, monkeypatch):
    from cascade.teacher.targets import shards

    recorder = Recorder(monkeypatch)
    shards._write(tmp_path / "shard", b"content")
    kinds = [entry[0] for entry in recorder.done]
    assert kinds == ["sync", "rename", "sync"] and recorder.done[-1][1] == str(tmp_path)


def test_what_is_being_replaced_comes_back_after_a_death_between_two_renames(tmp_path, monkeypatch):
    with commits.staged(tmp_path / "stages" / "x", {}) as staging:
        (staging / "file").write_text("old")
    failpoints.arm({"CASCADE_FAILPOINT": "store.aside:raise", "CASCADE_ALLOW_FAILPOINTS": "1"})
    try:
        with pytest.raises(failpoints.InjectedError), commits.staged(tmp_path / "stages" / "x", {}) as staging:
            (staging / "file").write_text("new")
    finally:
        failpoints.arm({})
    assert not (tmp_path / "stages" / "x").exists()
    with locked(tmp_path):
        assert (tmp_path / "stages" / "x" / "file").read_text() == "old"
    assert commits.verify_folder(tmp_path / "stages" / "x") == [] and leftovers(tmp_path) == []


def test_a_disk_error_inside_a_stage_removes_the_staging_folder_and_says_what_was_written(tmp_path):
    with pytest.raises(DiskError, match=r"x: cannot be written: No space left on device\. 5 bytes were written before"):
        with commits.staged(tmp_path / "x", {}) as staging:
            (staging / "file").write_text("12345")
            raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_failpoints_are_refused_where_nothing_says_that_this_is_a_test_and_cost_nothing_when_unset(zygote, tmp_path):
    status, output = zygote.run("plan", tmp_path / "none.yaml", CASCADE_FAILPOINT="x:kill")
    assert status == 2 and "CASCADE_ALLOW_FAILPOINTS=1" in output
    for wrong in ("x", "x:dance", "x:kill@0", "x:sleep=long", ":kill"):
        with pytest.raises(UserError, match="is not NAME:ACTION"):
            failpoints.arm({"CASCADE_FAILPOINT": wrong, "CASCADE_ALLOW_FAILPOINTS": "1"})
    failpoints.arm({})
    assert failpoints.failpoint("anything") is False


def test_F06_a_run_from_a_stage_on_that_is_killed_goes_on_and_makes_nothing_twice(zygote, recipe, unbroken, tmp_path):
    run, cache = tmp_path / "run", {"XDG_CACHE_HOME": str(unbroken.parent / "cache")}
    shutil.copytree(unbroken, run)
    (run / "events.jsonl").unlink()
    command = ("run", recipe, "--output", run, *BRIEF, "--from", "distill")
    for number, place in enumerate(
        ("distill/distill.step:kill@2", "distill/distill.step:kill@6", "evaluate/store.renamed:kill")
    ):
        log = tmp_path / f"log-{number}"
        assert zygote.run(*command, **cache, **failing(place, log))[0] == -signal.SIGKILL and fired(log)
        assert (run / "stages" / "from.json").exists()
    assert zygote.run(*command, **cache)[0] == 0
    same_as(run, unbroken)
    assert not (run / "stages" / "from.json").exists()
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    finished = [(event["member"], event["stage"]) for event in events if event["event"] == "finished"]
    # Of the last death the record came too late, by the one stage whose folder was just renamed.
    assert sorted(finished) == sorted(
        (member, stage) for member in ("big", "small") for stage in ("distill", "evaluate")
    )
