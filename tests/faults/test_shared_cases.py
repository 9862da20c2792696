"""Small inputs that fail or mislead elsewhere: each gives what is right for it, by the commands a user would type."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SHARED

CASES = ROOT.parent / "shared" / "cases"

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(not CASES.is_dir(), reason="the shared cases are not beside this checkout"),
]

# case -> ((command, exit code, what is said), ...); what is said is looked for in all that the command prints.
SAID = {
    "03": (("plan recipe.yaml", 0, "half"), ("run recipe.yaml", 0, "half")),
    "04": (("plan recipe.yaml", 0, r"\[\["), ("run recipe.yaml", 0, "half")),
    "07": (("run recipe.yaml", 0, "half"), ("run text.yaml --output text", 0, "half"), ("run prompts.yaml --output prompts", 0, "half")),
    "08": (("plan recipe.yaml", 0, "cut at paragraphs: train"), ("run recipe.yaml", 0, "half")),
    "09": (("plan folder.yaml", 0, "4 files"), ("run folder.yaml", 0, "half"), ("run pattern.yaml --output pattern", 0, "half")),
    "10": (
        ("plan recipe.yaml", 2, r"train\.jsonl:1: the label -1.*unlabelled"),
        ("plan unlabelled.yaml", 2, r"test-unlabelled\.jsonl:1: the label -1"),
    ),
    "11": (("plan recipe.yaml", 0, "2 classes: 0, 1"), ("run recipe.yaml", 0, "half")),
    "13": (
        ("plan longest.yaml", 2, "66 is longer than the parent's context of 64 tokens"),
        ("plan fits.yaml", 0, "half"),
        ("run fits.yaml", 0, "half"),
    ),
    "14": (("run recipe.yaml", 0, "half"),),
    "16": (("plan recipe.yaml", 2, "adapter_"), ("run recipe.yaml", 2, "adapter_")),
    "17": (
        ("plan bigger.yaml", 0, "over 512 token ids that both have"),
        ("run bigger.yaml --set distill.cache=sampled", 0, "bigger"),
        ("run bigger.yaml --set distill.cache=hidden --output hidden", 0, "bigger"),
        ("run smaller.yaml --set distill.cache=sampled --output smaller", 0, "smaller"),
    ),
    "18": (("run recipe.yaml", 0, "half"),),
    "19": (("plan recipe.yaml", 0, r"chat\.jsonl:51: .*alternate"), ("run recipe.yaml", 0, "half")),
    "20": (
        ("run null.yaml --output null", 0, ":41"),
        ("run missing.yaml --output missing", 0, ":41"),
        ("run empty.yaml --output empty", 0, ":41"),
    ),
    "24": (
        ("plan recipe.yaml", 2, "float16"),
        ("run recipe.yaml", 2, "float16 cannot hold"),
        ("run activations.yaml --output b", 2, "computes values of up to"),
    ),
    "25": (
        ("plan recipe.yaml", 2, "num_hidden_layers: 3, the weights have 5 layers"),
        ("run recipe.yaml", 2, "num_hidden_layers: 3, the weights have 5 layers"),
    ),
    "27": (
        ("run some.yaml", 2, r"some\.jsonl:8"),
        ("run some.yaml --set data.streaming=true --output s", 2, r"some\.jsonl:8"),
        ("run all.yaml --output a", 2, r"all\.jsonl:1"),
    ),
    "32": (("plan more.yaml", 0, "s "), ("run more.yaml", 0, "s "), ("run fewer.yaml --output f", 0, "s ")),
    "34": (
        ("prune ./model --dim intermediate_size=168 --data text.jsonl --block-size 64 --output m", 2, "model.safetensors"),
        ("prune ./model --dim intermediate_size=168 --data text.jsonl --block-size 64 --offload --no-repair --output o", 2,
         "model.safetensors"),
    ),
    "37": (("run recipe.yaml", 0, "half"),),
}  # fmt: skip


def made(number, folder):
    (case,) = CASES.glob(f"{number}-*")
    copy = Path(shutil.copytree(case, folder / "case", copy_function=shutil.copyfile))
    environment = os.environ | {"SHARED": str(SHARED), "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, str(copy / "make.py"), str(folder / "work")], check=True, env=environment)
    return folder / "work", environment


def said_by(command, folder, environment):
    arguments = [sys.executable, "-m", "cascade", *command.split()]
    finished = subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    return finished.returncode, finished.stdout + finished.stderr


@pytest.mark.parametrize("number", sorted(SAID))
def test_a_case_gives_what_its_row_says(number, tmp_path):
    folder, environment = made(number, tmp_path)
    for command, code, said in SAID[number]:
        returned, output = said_by(command, folder, environment)
        assert returned == code and "Traceback" not in output, f"{command}\n{output[-3000:]}"
        assert re.search(said, output, flags=re.S), f"{command}\n{output[-3000:]}"
    check = CHECKS.get(number)
    if check is not None:
        check(folder)


def _member(folder):
    return folder / "runs" / "trial" / "members" / "half"


def _is_no_larger(folder):
    sizes = [(place / "model.safetensors").stat().st_size for place in (_member(folder), folder / "model")]
    assert sizes[0] < sizes[1]
    assert json.loads((_member(folder) / "config.json").read_text())["dtype"] == "float16"


def _says_the_base(folder):
    config = json.loads((_member(folder) / "config.json").read_text())
    assert config["rope_theta"] == 500_000 and config["torch_dtype"]
    assert "transformers 4." in (_member(folder) / "README.md").read_text()


def _reads_text_as_it_was_trained(folder):
    record = json.loads(next((folder / "runs" / "trial" / "stages").glob("parent.framing-*/framing.json")).read_text())
    assert record["begin_token"] == "documents" and record["end_token"] == "none"


def _has_no_mark(folder):
    from cascade.data.blocks import load_blocks
    from cascade.models.checkpoint.load import load_tokenizer, resolve_model

    tokenizer = load_tokenizer(resolve_model(str(folder / "model")))
    for stage in [*folder.glob("**/stages/parent.data-*/train.safetensors")]:
        text = tokenizer.decode(load_blocks(stage).input_ids.flatten())
        assert "\ufeff" not in text and "\r" not in text


CHECKS = {"07": _has_no_mark, "14": _is_no_larger, "18": _says_the_base, "37": _reads_text_as_it_was_trained}


def test_a_reasoning_model_and_odd_gateways_stop_early_with_the_remedy(tmp_path):
    folder, environment = made("28", tmp_path)
    server = subprocess.Popen([sys.executable, str(tmp_path / "case" / "server.py")], env=environment)
    try:
        _wait_for(8791)
        for name, code, said in (
            ("silent", 1, "5 .*in a row.*reason"),
            ("inline", 1, "filters.thoughts"),
            ("refuses", 2, "max_completion_tokens: 64"),
            ("errors", 1, "an error instead of an answer"),
        ):
            returned, output = said_by(f"generate {name}.yaml --output {name}", folder, environment)
            assert returned in (code, 1, 2) and "Traceback" not in output, output[-3000:]
            assert re.search(said, output, flags=re.S), output[-3000:]
    finally:
        server.terminate()
        server.wait()


def _wait_for(port):
    import socket
    import time

    for _ in range(100):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise AssertionError("the case's server did not start")


def test_every_case_is_here():
    numbers = {path.name.partition("-")[0] for path in CASES.iterdir() if path.is_dir()}
    assert numbers == {*SAID, "28"}
