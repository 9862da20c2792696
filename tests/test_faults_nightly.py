"""Faults that take their time: processes that stop and go on, ranks that die, many runs in one process."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from faults import failing, fired, leftovers, results_of, weights_of

pytestmark = pytest.mark.nightly

BRIEF = ("--set", "baselines=[]", "--set", "evaluate.tasks=[]", "--set", "distill.save_every_minutes=0.0",
         "--set", "distill.features.hidden=none", "--set", "distill.cache=none")  # fmt: skip


@pytest.fixture(scope="module")
def recipe(recipe_folder):
    return recipe_folder / "tiny.yaml"


def two(zygote, recipe, run, faults=({}, {})):
    """Both processes of a run on this machine."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    together = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": "2"}
    return [
        zygote.start("run", recipe, "--output", run, *BRIEF, **together, RANK=str(n), LOCAL_RANK=str(n), **faults[n])
        for n in range(2)
    ]


@pytest.fixture(scope="module")
def unbroken_pair(zygote, recipe, tmp_path_factory):
    run = tmp_path_factory.mktemp("pair") / "run"
    assert [command.wait() for command in two(zygote, recipe, run)] == [0, 0]
    return run


@pytest.mark.nightly
@pytest.mark.parametrize("dies", [0, 1])
def test_F10_where_one_of_two_processes_is_killed_the_other_leaves_within_a_minute_and_nothing_is_lost(
    zygote, recipe, unbroken_pair, tmp_path, dies
):
    run, log = tmp_path / "run", tmp_path / "log"
    faults = [{}, {}]
    faults[dies] = failing("distill/distill.step:kill@2" if dies == 0 else "*distill.step:kill@2", log)
    commands = two(zygote, recipe, run, faults)
    assert commands[dies].wait() == -signal.SIGKILL and fired(log)
    started = time.monotonic()
    assert commands[1 - dies].wait(60) != 0, commands[1 - dies].output
    assert time.monotonic() - started < 60
    assert [command.wait() for command in two(zygote, recipe, run)] == [0, 0]
    assert weights_of(run) == weights_of(unbroken_pair) and results_of(run) == results_of(unbroken_pair)
    assert leftovers(run) == []


@pytest.mark.nightly
@pytest.mark.parametrize("how", ["exit", "raise"])
def test_F11_where_the_writing_process_fails_inside_a_save_all_end_and_the_state_before_it_stays(
    zygote, recipe, unbroken_pair, tmp_path, how
):
    run, log = tmp_path / "run", tmp_path / "log"
    commands = two(zygote, recipe, run, [failing(f"state/state.tensors:{how}@3", log), {}])
    assert commands[0].wait() in (1, 17) and commands[1].wait(60) != 0 and fired(log)
    states = sorted(path.name for path in run.glob("stages/.partial-*/step-*"))
    assert states == ["step-000000001", "step-000000002"]
    assert [command.wait() for command in two(zygote, recipe, run)] == [0, 0]
    assert weights_of(run) == weights_of(unbroken_pair)


@pytest.mark.nightly
def test_F04_a_process_that_is_stopped_for_a_while_goes_on_to_the_same_bits(zygote, recipe, tmp_path):
    runs = [tmp_path / "run", tmp_path / "other"]
    assert zygote.run("run", recipe, "--output", runs[1], *BRIEF)[0] == 0
    log = tmp_path / "log"
    command = zygote.start("run", recipe, "--output", runs[0], *BRIEF, **failing("distill/distill.step:sleep=1@2", log))
    command.until(lambda: fired(log))
    os.kill(command.pid, signal.SIGSTOP)
    time.sleep(30)
    os.kill(command.pid, signal.SIGCONT)
    assert command.wait() == 0
    assert weights_of(runs[0]) == weights_of(runs[1])


SOAK = """
import os, resource, shutil, sys, time
from pathlib import Path
from cascade.recipe.load import load_recipe
from cascade.run import run_recipe
from rich.console import Console

recipe, folder = sys.argv[1], Path(sys.argv[2])

def now():
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(lines["VmRSS"].split()[0]), len(os.listdir("/proc/self/fd")), len(os.listdir(os.environ["TMPDIR"]))

seen = []
for number in range(22):
    sets = ["baselines=[]", "evaluate.tasks=[]", "evaluate.heldout_blocks=2", "distill.tokens=256", f"seed={number}"]
    run = run_recipe(load_recipe(recipe, sets), output=folder / "run", console=Console(quiet=True))
    stages = len(list((run / "stages").glob("[!.]*/")))
    files = sum(path.is_file() for path in run.rglob("*"))
    shutil.rmtree(run)
    seen.append((*now(), stages, files))
    print(number, seen[-1], flush=True)
print("stages", sum(one[3] for one in seen))
first, last = seen[6], seen[-1]
assert last[0] < 1.10 * first[0], "memory"
assert last[1] <= first[1] + 1, "descriptors"
assert last[2] <= first[2] + 2, "temporary files"
assert len({one[4] for one in seen}) <= 2, "files"
assert sum(one[3] for one in seen) >= 200
"""


@pytest.mark.nightly
def test_F42_over_two_hundred_stages_memory_files_and_descriptors_do_not_grow(recipe, tmp_path):
    own = tmp_path / "temporary"
    own.mkdir()
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1", "TMPDIR": str(own)}
    done = subprocess.run([sys.executable, "-c", SOAK, str(recipe), str(tmp_path)], env=environment, text=True,
                          capture_output=True, timeout=1800)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
