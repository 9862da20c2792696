"""python tests/tools/same_results.py BEFORE AFTER [--short] [--only NAME ...]: do two checkouts make the same families?

Seven families are made by each checkout, each in a process and an empty folder of its own: the quickstart, one member of
stories, digits, quantise, a chat family, one learning from an endpoint's answers, and one with a kept teacher. Compared
are the sha256 of every members/*/*.safetensors, the names of all stage folders (their keys say what they depend on) and
family.json without its times. `--short` makes them smaller, for a first look; stories
needs the folder `shared` beside the checkouts. Exit code 1 where anything differs.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

TIMES = ("seconds", "prefill_tokens_per_s", "decode_tokens_per_s", "peak_memory_bytes", "money")
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CHAT = """\
name: chat
parent: {parent}
data: {{source: files, train: {chats}, messages_field: messages, block_size: 64}}
members:
  - {{name: half, target: {{params: 0.5}}}}
distill: {{tokens: 8000, batch_size: 4, microbatch_size: 4}}
evaluate: {{heldout_blocks: 8}}
"""
FAMILIES: dict[str, tuple[str, list[str]]] = {
    "quickstart": ("recipes/quickstart.yaml", []),
    "stories": (
        "recipes/stories.yaml",
        ["members=[{name: stories-60, target: {params: 0.6}}]", "distill.tokens=50_000"],
    ),
    "digits": ("recipes/digits.yaml", []),
    "quantise": ("recipes/quantise.yaml", []),
    "chat": ("{work}/chat.yaml", []),
    "black-box": (
        "recipes/black_box.yaml",
        [
            "parent={work}/parent",
            "generate.endpoint.url={url}",
            "generate.endpoint.model=big",
            "generate.prompts={work}/prompts.jsonl",
            "generate.filters={duplicates: exact}",
            "data.block_size=32",
            "distill={teacher: text, tokens: 8000, learning_rate: 3e-3, batch_size: 4, microbatch_size: 4}",
            "evaluate.heldout_blocks=8",
        ],
    ),
    "cached": ("recipes/quickstart.yaml", ["distill.features.hidden=none", "distill.cache=sampled"]),
}
SHORT: dict[str, list[str]] = {
    "quickstart": ["distill.tokens=10_000", "evaluate.limit=20", "evaluate.heldout_blocks=16"],
    "stories": ["distill.tokens=10_000", "evaluate.limit=20", "evaluate.heldout_blocks=16"],
    "digits": ["parent.fit.examples=2000", "distill.examples=1000"],
    "quantise": [
        "distill.tokens=10_000",
        "finish=[{quantise: int8}, {quantise: int4}, {quantise: int4, tokens: 5000}]",
        "evaluate.limit=20",
        "evaluate.heldout_blocks=16",
    ],
    "cached": [
        "members=[{name: pico-50, target: {params: 0.5}}]",
        "distill.tokens=10_000",
        "evaluate.limit=20",
        "evaluate.heldout_blocks=16",
    ],
}


def main() -> None:
    """Make, compare, tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--only", nargs="*", default=list(FAMILIES), choices=list(FAMILIES), metavar="NAME")
    parser.add_argument(
        "--keep", type=Path, help="a folder for the runs; those of BEFORE that are there are gone on with"
    )
    options = parser.parse_args()
    work = options.keep or Path(tempfile.mkdtemp(prefix="same-results-"))
    work.mkdir(parents=True, exist_ok=True)
    differing = 0
    before, after, kind = options.before.resolve(), options.after.resolve(), "short" if options.short else "whole"
    for name in options.only:
        earlier, later = work / f"{name}-{kind}-{head_of(before)}", work / f"{name}-{kind}-after"
        shutil.rmtree(later, ignore_errors=True)
        for checkout, output in ((before, earlier), (after, later)):
            make_family(checkout, name, output, work, short=options.short)
        results, later_results = results_of(earlier), results_of(later)
        added = added_stages(results["stages"], later_results["stages"])
        for folder in added:
            del later_results["stages"][folder]
        differences = differences_of(results, later_results)
        differing += bool(differences)
        more = f", new kinds of stage: {', '.join(added)}" if added else ""
        print(f"{name}: {'the same' if not differences else 'differs'} ({results['summary']}{more})", flush=True)
        for line in differences[:20]:
            print(f"  {line}", flush=True)
    if options.keep is None:
        shutil.rmtree(work)
    sys.exit(1 if differing else 0)


def head_of(checkout: Path) -> str:
    """The commit of a checkout, shortened."""
    command = ["git", "-C", str(checkout), "rev-parse", "--short=12", "HEAD"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def make_family(checkout: Path, name: str, output: Path, work: Path, *, short: bool) -> None:
    """Have a checkout's code make a family, or go on with it."""
    from endpoint_server import chat_answer, serving

    def respond(body: dict[str, Any], number: int) -> tuple[int, dict[str, str], dict[str, Any]]:
        return 200, {}, chat_answer("it is " + body["messages"][-1]["content"] + " " + "so " * (body["seed"] % 3))

    write_inputs(checkout, work)
    recipe, overrides = FAMILIES[name]
    overrides = [*overrides, *(SHORT.get(name, []) if short else [])]
    with serving(respond, port=ENDPOINT_PORT) as (url, _):
        values = {"work": work, "url": url}
        places = [recipe, *overrides]
        for key, value in values.items():
            places = [place.replace(f"{{{key}}}", str(value)) for place in places]
        command = [sys.executable, "-m", "cascade", "run", places[0], "--output", str(output)]
        command += [part for override in places[1:] for part in ("--set", override)]
        environment = os.environ | {
            "PYTHONPATH": str(checkout),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "OPENAI_API_KEY": "sk-loopback",
            "XDG_CACHE_HOME": str(output.with_name(output.name + "-cache")),
        }
        done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name}: {checkout} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")


ENDPOINT_PORT = 47113
"""The same for both checkouts, as the address is part of the dataset's provenance."""


def write_inputs(checkout: Path, work: Path) -> None:
    """A parent with a chat template, chats and prompts, for the families that need them."""
    if (work / "parent").exists():
        return
    parent = work / "parent"
    shutil.copytree(checkout / "cascade" / "models" / "builtin" / "pico-python", parent)
    (parent / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    prompts = [f"{word} {number}" for word in ("the", "def", "class", "return") for number in range(60)]
    (work / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    turns = [
        [
            {"role": "user", "content": f"add {number} and {number + 2}"},
            {"role": "assistant", "content": f"{2 * number + 2} it is"},
        ]
        for number in range(1200)
    ]
    (work / "chats.jsonl").write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns))
    (work / "chat.yaml").write_text(CHAT.format(parent=parent, chats=work / "chats.jsonl"))


def results_of(run: Path) -> dict[str, Any]:
    """What is compared of a run directory."""
    weights = {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(run.glob("members/**/*.safetensors"))
    }
    stages = sorted(path.name for path in (run / "stages").iterdir() if path.is_dir() and not path.name.startswith("."))
    family = without_times(json.loads((run / "family.json").read_text(encoding="utf-8")))
    return {
        "weights": weights,
        "stages": {name: name for name in stages},
        "family": family,
        "summary": f"{len(weights)} weight files, {len(stages)} stages, {len(family['rows'])} rows",
    }


def added_stages(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """Folders of stages of kinds that the earlier checkout did not have: an addition, and no difference."""
    kinds = {name.rpartition("-")[0] for name in before}
    return [name for name in after if name.rpartition("-")[0] not in kinds]


def without_times(value: Any) -> Any:
    """A JSON value without what a clock or the machine's memory gave."""
    if isinstance(value, dict):
        return {key: without_times(part) for key, part in value.items() if key not in TIMES}
    return [without_times(part) for part in value] if isinstance(value, list) else value


def differences_of(before: Any, after: Any, place: str = "") -> list[str]:
    """A line for each leaf that differs."""
    if isinstance(before, dict) and isinstance(after, dict):
        lines = []
        for key in [*before, *(key for key in after if key not in before)]:
            if key == "summary" and not place:
                continue
            lines += differences_of(before.get(key, "absent"), after.get(key, "absent"), f"{place}/{key}")
        return lines
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = enumerate(zip(before, after, strict=True))
        return [line for number, (old, new) in pairs for line in differences_of(old, new, f"{place}/{number}")]
    return [] if before == after else [f"{place}: {str(before)[:150]} before, {str(after)[:150]} after"]


if __name__ == "__main__":
    main()
