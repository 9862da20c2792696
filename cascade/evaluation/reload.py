"""The reload gate: in a fresh process, with plain transformers, a checkpoint gives what was measured.

That is the same logits, the same greedy continuation, and of its tokenizer files the same ids, special tokens, chats.

The same process measures speed and peak memory, as only a process of its own can tell what one model needs.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GenerationConfig

from cascade.evaluation.reload_process import WRITTEN_TOKENS, tokenizer_facts, written
from cascade.models.architecture.model_class import image_shape, is_body, reads_images
from cascade.models.architecture.positions import usable_context
from cascade.models.checkpoint.quantised import is_rounded
from cascade.runtime.errors import RunError
from cascade.runtime.files import read_json

RELOAD_TOLERANCE = 1e-5
"""Largest difference, relative to the largest logit, that counts as the same logits in float32."""


class ReloadError(RunError):
    """A saved checkpoint does not give the logits of the model in memory."""


def write_reference(model: nn.Module, path: Path, *, folder: Path | None = None) -> None:
    """Logits of a model in memory on fixed random ids or pixels, for `check_reload` to compare with.

    `model` holds the values that were saved: rounded to the stored dtype. They are compared in float32 (those of packed
    weights as they come). With the `folder` of its checkpoint, of a model that writes also a greedy continuation, under
    the generation config that lies there.
    """
    config: Any = model.config
    generator = torch.Generator().manual_seed(0)
    if reads_images(config):
        inputs = {"pixel_values": torch.randn(2, *image_shape(config), generator=generator)}
    else:
        length = min(48, usable_context(config) or 48)
        inputs = {"input_ids": torch.randint(0, config.vocab_size, (2, length), generator=generator)}
    device = next(model.parameters()).device
    # Packed weights compute in the dtype that they are stored with.
    loaded: Any = model if is_rounded(config) else model.float()
    with torch.inference_mode():
        output = loaded(**{name: tensor.to(device) for name, tensor in inputs.items()})
        logits: Tensor = output.last_hidden_state if is_body(config) else output.logits
        tensors = inputs | {"logits": logits.float().cpu().contiguous()}
        if folder is not None and _continues(loaded, inputs):
            generation_config = GenerationConfig.from_pretrained(folder)
            tensors["generated"], tensors["margins"] = written(
                loaded, inputs["input_ids"][:1].to(device), generation_config
            )
    save_file(tensors, path)


def _continues(model: Any, inputs: dict[str, Tensor]) -> bool:
    """Whether the model generates text and has room for a continuation behind the fixed ids."""
    if "input_ids" not in inputs or not model.can_generate():
        return False
    context = usable_context(model.config)
    return not context or inputs["input_ids"].shape[1] + WRITTEN_TOKENS <= context


def check_reload(
    folder: Path,
    reference: Path | None = None,
    *,
    tokenizer: Any | None = None,
    prompt_tokens: int = 256,
    new_tokens: int = 32,
) -> dict[str, float]:
    """Load `folder` in a fresh process; returns the speed measured there and, given a reference, 'reload_difference'.

    Speeds are medians in tokens/s of a batch of one on the CPU (prefill alone for a model that does not write, neither
    for one that reads images); memory is the process's peak, in bytes. With the `tokenizer` that the checkpoint was
    trained with, that of the folder has to write texts and chats as it does.

    Raises:
        ReloadError: it does not load, its logits differ from the reference by more than RELOAD_TOLERANCE, it continues
            a text otherwise, or its tokenizer is another.
    """
    with tempfile.TemporaryDirectory() as temporary:
        paths = {name: str(Path(temporary) / name) for name in ("request", "answer", "errors")}
        tensors = {} if reference is None else load_file(reference)
        sizes = [prompt_tokens, new_tokens, torch.get_num_threads(), int(tokenizer is not None)]
        tensors["sizes"] = torch.tensor(sizes)
        save_file(tensors, paths["request"])
        status, answer = _ask({"folder": str(folder.resolve()), **paths}), Path(paths["answer"])
        if status != 0 or not answer.is_file():
            errors = Path(paths["errors"])
            error_text = errors.read_text(encoding="utf-8")[-3000:] if errors.exists() else ""
            raise ReloadError(f"{folder} does not load in a fresh process (exit status {status}):\n{error_text}")
        measured: dict[str, Any] = read_json(answer)
    difference = measured.get("reload_difference", 0.0)
    if not difference <= RELOAD_TOLERANCE:
        raise ReloadError(
            f"{folder}: reloaded logits differ by {difference:.2e} of the largest (at most {RELOAD_TOLERANCE:.0e})"
        )
    if "generated" in tensors:
        _require_continuation(folder, tensors, measured.pop("generated"))
    if tokenizer is not None:
        require_same_text(tokenizer_facts(tokenizer), measured.pop("tokenizer"), str(folder))
    return measured


def _require_continuation(folder: Path, tensors: dict[str, Tensor], continued: list[int]) -> None:
    expected, margins = tensors["generated"].tolist(), tensors["margins"].tolist()
    pairs = zip(expected, continued, margins, strict=False)
    different = next(
        (place for place, (token, continued_token, _) in enumerate(pairs) if token != continued_token), None
    )
    if different is None and len(expected) != len(continued):
        different = min(len(expected), len(continued))
    # Two tokens as likely as each other can change places by rounding.
    if different is not None and (different >= len(margins) or margins[different] > RELOAD_TOLERANCE):
        raise ReloadError(
            f"{folder}: reloaded, it continues a text otherwise: {continued} instead of {expected} (greedy, under its "
            "generation_config.json)"
        )


def require_same_text(expected: dict[str, Any], facts: dict[str, Any], place: str) -> None:
    """Refuse a tokenizer (its `tokenizer_facts`) that writes something otherwise than the expected.

    Raises:
        ReloadError: with the first text or setting that differs.
    """
    for name, value in expected.items():
        fact = facts.get(name)
        if value == fact:
            continue
        difference = f"{value!r} / {fact!r}"
        if isinstance(value, dict) and isinstance(fact, dict):
            keys = [key for key in value if value[key] != fact.get(key)]
            difference = f"{len(keys)} of {len(value)}, such as {keys[0]!r}: {value[keys[0]]} / {fact.get(keys[0])}"
        raise ReloadError(
            f"{place}: the tokenizer that transformers makes of its files is not the one it was trained with: "
            f"{name} (trained / read): {difference[:400]}"
        )


_process: subprocess.Popen[str] | None = None
_errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")


def start_fresh_process() -> subprocess.Popen[str]:
    """The process that loads checkpoints, started if there is none; it ends with this one.

    Its imports take seconds: who will check a reload later can start it before other work.
    """
    global _process
    if _process is None or _process.poll() is not None:
        _process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("reload_process.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=_errors,
            text=True,
        )
    return _process


def _ask(request: dict[str, str]) -> int:
    """Send a request to the fresh process and return its exit status.

    Raises:
        ReloadError: it ended itself.
    """
    process = start_fresh_process()
    if process.stdin is None or process.stdout is None:
        raise ValueError("the process has pipes")
    line = ""
    try:
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
    except BrokenPipeError:
        line = ""
    finally:
        if not line:  # interrupted, or dead: an answer that comes later must not be taken for the next one's
            process.kill()
            process.wait()
    if not line:
        _errors.seek(0)
        raise ReloadError(f"the process that reloads checkpoints has ended:\n{_errors.read()[-3000:]}")
    return int(json.loads(line)["status"])
