"""The reload gate: a checkpoint must load in a fresh process with plain transformers and give the same logits.

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

from cascade.errors import RunError
from cascade.models.architecture import image_shape, is_body, reads_images
from cascade.models.quantised import is_rounded

RELOAD_TOLERANCE = 1e-5
"""Largest difference, relative to the largest logit, that counts as the same logits in float32."""


class ReloadError(RunError):
    """A saved checkpoint does not give the logits of the model in memory."""


def write_reference(model: nn.Module, path: Path) -> None:
    """Logits of a model in memory on fixed random ids or pixels, for `check_reload` to compare with.

    `model` holds the values that were saved: rounded to the stored dtype. They are compared in float32 (those of packed
    weights as they come).
    """
    config: Any = model.config
    generator = torch.Generator().manual_seed(0)
    if reads_images(config):
        inputs = {"pixel_values": torch.randn(2, *image_shape(config), generator=generator)}
    else:
        length = min(48, getattr(config, "max_position_embeddings", None) or 48)
        inputs = {"input_ids": torch.randint(0, config.vocab_size, (2, length), generator=generator)}
    device = next(model.parameters()).device
    with torch.inference_mode():
        # Packed weights compute in the dtype that they are stored with.
        loaded: Any = model if is_rounded(config) else model.float()
        found = loaded(**{name: value.to(device) for name, value in inputs.items()})
        logits: Tensor = found.last_hidden_state if is_body(config) else found.logits
    save_file(inputs | {"logits": logits.float().cpu().contiguous()}, path)


def check_reload(
    folder: Path, reference: Path | None = None, *, prompt_tokens: int = 256, new_tokens: int = 32
) -> dict[str, float]:
    """Load `folder` in a fresh process; returns the speed measured there and, given a reference, 'reload_difference'.

    Speeds are medians in tokens/s of a batch of one on the CPU (prefill alone for a model that does not write, neither
    for one that reads images); memory is the process's peak, in bytes.

    Raises:
        ReloadError: it does not load, or its logits differ from the reference by more than RELOAD_TOLERANCE.
    """
    with tempfile.TemporaryDirectory() as temporary:
        paths = {name: str(Path(temporary) / name) for name in ("request", "answer", "errors")}
        tensors = {} if reference is None else load_file(reference)
        tensors["sizes"] = torch.tensor([prompt_tokens, new_tokens, torch.get_num_threads()])
        save_file(tensors, paths["request"])
        status, answer = _ask({"folder": str(folder.resolve()), **paths}), Path(paths["answer"])
        if status != 0 or not answer.is_file():
            errors = Path(paths["errors"])
            said = errors.read_text(encoding="utf-8")[-3000:] if errors.exists() else ""
            raise ReloadError(f"{folder} does not load in a fresh process (exit status {status}):\n{said}")
        measured: dict[str, float] = json.loads(answer.read_text(encoding="utf-8"))
    difference = measured.get("reload_difference", 0.0)
    if not difference <= RELOAD_TOLERANCE:
        raise ReloadError(
            f"{folder}: reloaded logits differ by {difference:.2e} of the largest (at most {RELOAD_TOLERANCE:.0e})"
        )
    return measured


_process: subprocess.Popen[str] | None = None
_errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")


def start_fresh_process() -> subprocess.Popen[str]:
    """The process that loads checkpoints, started if there is none; it ends with this one.

    Its imports take seconds: who will check a reload later can start it before other work.
    """
    global _process
    if _process is None or _process.poll() is not None:
        _process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("fresh.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=_errors,
            text=True,
        )
    return _process


def _ask(request: dict[str, str]) -> int:
    """Exit status of what the process did.

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
