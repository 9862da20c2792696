"""Faults that take their time: processes that stop and go on, ranks that die, many runs in one process."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from fault_process import failing, fired, leftovers, results_of, weights_of
from safetensors.torch import load_file

pytestmark = pytest.mark.nightly

BRIEF = ("--set", "baselines=[]", "--set", "evaluate.tasks=[]", "--set", "distill.save_every_minutes=0.0",
         "--set", "distill.features.hidden=none", "--set", "distill.cache=none")  # fmt: skip


@pytest.fixture(scope="module")
def recipe(recipe_folder):
    return recipe_folder / "tiny.yaml"


def two(zygote, recipe, run, faults=({}, {}), *options):
    """Both processes of a run on this machine."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    together = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": "2"}
    return [
        zygote.start(
            "run", recipe, "--output", run, *BRIEF, *options, **together, RANK=str(n), LOCAL_RANK=str(n), **faults[n]
        )
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
from cascade.pipeline.run import run_recipe
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


OTHERS = {
    # A parent that is trained here, a shape that is searched for, a rate, a random start, production text, a copy.
    "searched": (
        """\
name: searched
parent:
  pretrain: {{config: {{model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2,
             num_attention_heads: 4, num_key_value_heads: 2, head_dim: 8}}, tokens: 1024, tokenizer: {{vocab_size: 300}}, block_size: 32}}
data: {{source: files, train: {0}/train.jsonl.gz, calibration: {0}/calibration.jsonl.gz, selection: {0}/selection.jsonl.gz,
       heldout: {0}/heldout.jsonl.gz, production: {0}/heldout.jsonl.gz, block_size: 32}}
members:
  - {{name: cut, target: {{params: 0.8}}}}
  - {{name: new, config: {{model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1,
      num_attention_heads: 2, num_key_value_heads: 1, head_dim: 8}}}}
calibration: {{num_blocks: 4}}
prune: {{search: {{candidates: 3, finalists: 2, tokens: 128}}, repair: {{num_blocks: 4}}}}
distill: {{tokens: 256, learning_rate: auto, batch_size: 4, microbatch_size: 4, selection_blocks: 2, cache: none}}
evaluate: {{tasks: [], heldout_blocks: 4}}
finish: [{{quantise: int8, members: [cut]}}]
""",
        ("pretrain", "init", "candidate", "finalist", "rate", "drift", "quantise", "evaluate-quantised"),
    ),
    "classes": (
        """\
name: classes
task: image_classification
parent:
  fit: {{config: {{model_type: vit, image_size: 8, patch_size: 2, num_channels: 1, hidden_size: 16, intermediate_size: 32,
        num_hidden_layers: 1, num_attention_heads: 2}}, examples: 128}}
data: {{source: digits, train_examples: 50, unlabelled: rest}}
members: [{{name: small, config: {{model_type: vit, patch_size: 2, hidden_size: 8, intermediate_size: 16,
            num_hidden_layers: 1, num_attention_heads: 2}}}}]
distill: {{examples: 128, batch_size: 16, microbatch_size: 16, learning_rate: 1e-3}}
""",
        ("fit",),
    ),
    "written": (
        """\
name: written
parent: {1}
generate: {{stdlib: true, num_prompts: 150, answers: 1, max_new_tokens: 4, batch_size: 50}}
data: {{source: generated, block_size: 16}}
members: [{{name: half, target: {{dims: {{num_hidden_layers: 1}}}}, init: layers}}]
distill: {{teacher: text, tokens: 128, learning_rate: 1e-3, batch_size: 4, microbatch_size: 4, selection_blocks: 2}}
evaluate: {{tasks: [], heldout_blocks: 2}}
""",
        ("generate",),
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_F01_killed_at_every_place_of_stages_that_only_some_recipes_have_the_family_is_the_same(
    zygote, recipe_folder, tiny_parent, tmp_path, name
):
    text, stages = OTHERS[name]
    (tmp_path / "r.yaml").write_text(text.format(recipe_folder, tiny_parent))
    whole, run, log = tmp_path / "whole", tmp_path / "run", tmp_path / "log"
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    status, output = zygote.run("run", tmp_path / "r.yaml", "--output", whole, **cache)
    assert status == 0, output
    fault = failing(",".join(f"{stage}/*:kill@each" for stage in stages), log) | cache
    for deaths in range(150):
        status, output = zygote.run("run", tmp_path / "r.yaml", "--output", run, **fault)
        if status == 0:
            break
        assert status == -signal.SIGKILL and len(fired(log)) == deaths + 1, output
    assert status == 0 and {place.partition("/")[0] for place in fired(log)} == set(stages)
    moments = ("begun", "written", "synced", "manifest", "renamed")  # after that it is not made again
    assert {f"{stage}/store.{moment}" for stage in stages for moment in moments} <= set(fired(log))
    assert weights_of(run) == weights_of(whole) and results_of(run) == results_of(whole) and leftovers(run) == []


@pytest.mark.nightly
@pytest.mark.parametrize("rank", [0, 1])
def test_F19_where_one_of_two_processes_meets_a_nan_both_stop_before_the_step_or_both_leave_it_out(
    zygote, recipe, unbroken_pair, tmp_path, rank
):
    run, log, faults = tmp_path / "run", tmp_path / "log", [{}, {}]
    faults[rank] = failing("*distill.loss:nan@3", log)
    commands = two(zygote, recipe, run, faults)
    assert [command.wait() for command in commands] == [65, 65] and fired(log)
    assert "stopped before the optimizer step" in commands[0].output
    assert [command.wait() for command in two(zygote, recipe, run)] == [0, 0]  # the cause is gone
    assert weights_of(run) == weights_of(unbroken_pair)
    log.unlink()
    skipping = two(zygote, recipe, tmp_path / "skipping", faults, "--set", "distill.on_nan=skip")
    assert [command.wait() for command in skipping] == [0, 0] and fired(log)
    (lines,) = [path.read_text() for path in (tmp_path / "skipping").glob("stages/big.distill-*/log.jsonl")]
    assert lines.count('"skipped"') == 1
    for path in (tmp_path / "skipping").glob("members/*/model.safetensors"):
        assert all(value.isfinite().all() for value in load_file(path).values())


@pytest.mark.nightly
def test_F21_where_one_of_two_processes_runs_out_of_memory_the_next_start_of_both_goes_on_with_less(
    zygote, recipe, unbroken_pair, tmp_path
):
    run, log = tmp_path / "run", tmp_path / "log"
    commands = two(zygote, recipe, run, [{}, failing("*distill.microbatch:oom@3", log)])
    # One process alone cannot take its step again: the others are in the middle of theirs.
    assert commands[1].wait() == 1 and commands[0].wait(60) != 0 and fired(log)
    assert "on process 1; run the same command again: it goes on with 2, the same batches" in commands[1].output
    assert [command.wait() for command in two(zygote, recipe, run)] == [0, 0]
    (lines,) = [path.read_text() for path in run.glob("stages/big.distill-*/log.jsonl")]
    sizes = [json.loads(line)["microbatch_size"] for line in lines.splitlines()]
    assert sizes == [4, 4, 2, 2]
    for name in ("big", "small"):
        ours, theirs = (load_file(one / "members" / name / "model.safetensors") for one in (run, unbroken_pair))
        for key, value in theirs.items():
            assert (ours[key].float() - value.float()).norm() <= 0.02 * value.float().norm()  # stored in bfloat16
