"""Two processes do what one does, and go on after a death as if nothing had been."""

import json
import shutil
import socket
import subprocess
import sys
import time

import psutil
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

STARTED = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
DEFAULTS = {"tied": False, "state": None, "die_after": None, "num_steps": 10, "rate": 1e-2, "microbatch": 2}


def command_of(output, launcher, **options):
    output.mkdir(exist_ok=True)
    settings = DEFAULTS | options | {"output": str(output)}
    settings["state"] = settings["state"] and str(settings["state"])
    return [sys.executable, *launcher, str(ROOT / "tests" / "two_processes.py"), json.dumps(settings)]


def run(output, *, processes, check=True, **options):
    command = command_of(output, STARTED if processes == 2 else [], **options)
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT / "tests", timeout=300)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done.returncode


def distance(folder, other, name="weights"):
    """Relative L2 distance of all tensors together."""
    ours, theirs = (load_file(path / f"{name}.safetensors") for path in (folder, other))
    assert ours.keys() == theirs.keys()
    difference = sum((ours[key].double() - theirs[key].double()).square().sum() for key in ours)
    return float((difference / sum(theirs[key].double().square().sum() for key in theirs)).sqrt())


def curve(folder, key):
    return [entry[key] for entry in json.loads((folder / "curve.json").read_text())]


@pytest.mark.nightly
def test_F36_two_processes_train_as_one_does_with_a_tied_head_uneven_blocks_and_accumulation(tmp_path):
    options = {"tied": True, "num_steps": 20, "rate": 1e-3}
    for name, processes, microbatch in (("one", 1, 8), ("one-by-one", 1, 1), ("two", 2, 2)):
        run(tmp_path / name, processes=processes, microbatch=microbatch, **options)
    one, other, two = (tmp_path / name for name in ("one", "one-by-one", "two"))
    assert distance(two, one, "gradients") < 1e-6
    assert distance(two, one, "statistics") < 1e-6
    assert distance(two, one) < 1e-5
    assert distance(two, one) < 2 * distance(other, one)  # as far apart as one process is from itself
    for key in ("loss", "divergence", "cross_entropy", "hidden_loss", "relations_loss"):
        assert curve(two, key) == pytest.approx(curve(one, key), rel=1e-5)
    assert curve(two, "agreement") == pytest.approx(curve(one, "agreement"), rel=1e-9)
    assert curve(two, "grad_norm") == pytest.approx(curve(one, "grad_norm"), rel=1e-5)


@pytest.mark.nightly
def test_two_nodes_of_one_process_each_are_two_processes(tmp_path):
    run(tmp_path / "one", processes=1, num_steps=3, rate=1e-3)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = []
    for rank in range(2):
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "1", "--nnodes", "2", "--node-rank", str(rank),
                    "--master-addr", "127.0.0.1", "--master-port", str(port)]  # fmt: skip
        command = command_of(tmp_path / "nodes", launcher, num_steps=3, rate=1e-3)
        nodes.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT / "tests"))
    errors = [node.communicate(timeout=300)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], errors
    assert distance(tmp_path / "nodes", tmp_path / "one") < 1e-5


def test_F09_two_processes_that_died_go_on_to_the_same_bits_and_one_can_take_over(tmp_path):
    run(tmp_path / "whole", processes=2)
    state = tmp_path / "state"
    # Right after a look at the selection loss, which leaves gathered parameters behind.
    assert run(tmp_path / "dead", processes=2, state=state, die_after=5, check=False) != 0
    assert sorted(path.name for path in state.glob("step-*")) == ["step-000000004", "step-000000005"]
    shutil.copytree(state, tmp_path / "copy")
    run(tmp_path / "resumed", processes=2, state=state)
    run(tmp_path / "alone", processes=1, state=tmp_path / "copy")
    whole, resumed, alone = (
        load_file(tmp_path / name / "weights.safetensors") for name in ("whole", "resumed", "alone")
    )
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    for name in whole:
        assert (whole[name] - alone[name]).norm() / whole[name].norm() < 1e-4, name


@pytest.mark.nightly
def test_a_family_made_by_two_processes_is_that_of_one_but_for_rounding(recipe_folder, tiny_family, tmp_path):
    command = [sys.executable, *STARTED, "-m", "cascade", "run", str(recipe_folder / "tiny.yaml")]
    done = subprocess.run([*command, "--output", str(tmp_path / "run")], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("big", "small"):
        ours, theirs = (
            load_file(folder / "members" / name / "model.safetensors") for folder in (tmp_path / "run", tiny_family)
        )
        for key in theirs:
            assert (ours[key].float() - theirs[key].float()).norm() / theirs[key].float().norm() < 1e-2, key
    assert not list((tmp_path / "run").glob("**/.partial-*")) and not list((tmp_path / "run").glob("**/.staging-*"))


@pytest.mark.nightly
def test_a_family_that_two_processes_left_unfinished_is_gone_on_with_from_its_training_state(recipe_folder, tmp_path):
    folder = tmp_path / "run"
    options = ["--output", str(folder), "--only", "big", "--set", "distill.save_every_minutes=0.0"]
    options += ["--set", "distill.tokens=12_800"]
    command = [sys.executable, *STARTED, "-m", "cascade", "run", str(recipe_folder / "tiny.yaml"), *options]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not list(folder.glob("stages/.partial-big.distill-*/step-00000001*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    workers = psutil.Process(first.pid).children(recursive=True)  # torchrun gives them sessions of their own
    for process in (first, *workers):
        process.kill()
    first.wait()
    psutil.wait_procs(workers, timeout=60)
    states = sorted(folder.glob("stages/.partial-big.distill-*/step-*"))
    assert states, "it was to be killed while it trained"
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    broken = load_file(folder / "members" / "big" / "model.safetensors")
    command[command.index(str(folder))] = str(tmp_path / "whole")
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    whole = load_file(tmp_path / "whole" / "members" / "big" / "model.safetensors")
    assert all(torch.equal(broken[name], whole[name]) for name in whole)
    assert not list(folder.glob("**/.staging-*")) and not list(folder.glob("**/.partial-*"))
