"""Two processes do what one does, and go on after a death as if nothing had been."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

STARTED = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]


def run(output, *, processes, tied=False, state=None, die_after=None, check=True):
    output.mkdir(exist_ok=True)
    settings = {"output": str(output), "tied": tied, "state": state and str(state), "die_after": die_after}
    launcher = STARTED if processes == 2 else []
    command = [sys.executable, *launcher, str(ROOT / "tests" / "two_processes.py"), json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT / "tests", timeout=300)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done.returncode


def test_two_processes_train_as_one_does_with_a_tied_head(tmp_path):
    for processes in (1, 2):
        run(tmp_path / str(processes), processes=processes, tied=True)
    one, two = (load_file(tmp_path / name / "weights.safetensors") for name in "12")
    assert one.keys() == two.keys()
    for name in one:
        difference = (one[name] - two[name]).norm() / one[name].norm()
        assert difference < 1e-4, (name, float(difference))
    curves = [json.loads((tmp_path / name / "curve.json").read_text()) for name in "12"]
    for key in ("loss", "divergence", "cross_entropy", "agreement", "grad_norm"):
        assert [entry[key] for entry in curves[0]] == pytest.approx([entry[key] for entry in curves[1]], rel=1e-4)
    assert curves[0][-1]["selection_kl"] == pytest.approx(curves[1][-1]["selection_kl"], rel=1e-4)


def test_two_processes_that_died_go_on_to_the_same_bits_and_one_can_take_over(tmp_path):
    run(tmp_path / "whole", processes=2)
    state = tmp_path / "state"
    assert run(tmp_path / "dead", processes=2, state=state, die_after=6, check=False) != 0
    assert sorted(path.name for path in state.glob("step-*"))[-1] in ("step-000000005", "step-000000006")
    import shutil

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
    import os
    import signal
    import time

    folder = tmp_path / "run"
    options = ["--output", str(folder), "--only", "big", "--set", "distill.save_every_minutes=0.0"]
    options += ["--set", "distill.tokens=12_800"]
    command = [sys.executable, *STARTED, "-m", "cascade", "run", str(recipe_folder / "tiny.yaml"), *options]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 300
    while not list(folder.glob("stages/.partial-big.distill-*/step-00000001*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
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
