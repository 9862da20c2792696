"""The reload gate: a checkpoint must load in a fresh process with plain transformers and give the same logits.

The same process measures speed and peak memory, as only a process of its own can tell what one model needs.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cascade.errors import RunError

RELOAD_TOLERANCE = 1e-5
"""Largest difference, relative to the largest logit, that counts as the same logits in float32."""


class ReloadError(RunError):
    """A saved checkpoint does not give the logits of the model in memory."""


def write_reference(model: nn.Module, path: Path) -> None:
    """Logits of a model in memory on fixed random ids, for `check_reload` to compare with.

    `model` holds the values that were saved: rounded to the stored dtype. They are compared in float32.
    """
    config: Any = model.config
    ids = torch.randint(0, config.vocab_size, (2, 48), generator=torch.Generator().manual_seed(0))
    device = next(model.parameters()).device
    with torch.inference_mode():
        logits: Tensor = model.float()(input_ids=ids.to(device), use_cache=False).logits
    save_file({"ids": ids, "logits": logits.float().cpu().contiguous()}, path)


def check_reload(
    folder: Path, reference: Path | None = None, *, prompt_tokens: int = 256, new_tokens: int = 32
) -> dict[str, float]:
    """Load `folder` in a fresh process; returns the speed measured there and, given a reference, 'reload_difference'.

    Speeds are medians in tokens/s of a batch of one on the CPU; memory is the process's peak, in bytes.

    Raises:
        ReloadError: it does not load, or its logits differ from the reference by more than RELOAD_TOLERANCE.
    """
    with tempfile.TemporaryDirectory() as temporary:
        request, answer = Path(temporary) / "request.safetensors", Path(temporary) / "answer.json"
        tensors = {} if reference is None else load_file(reference)
        tensors["sizes"] = torch.tensor([prompt_tokens, new_tokens, torch.get_num_threads()])
        save_file(tensors, request)
        command = [sys.executable, "-m", "cascade.evaluation.reload", str(folder), str(request), str(answer)]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        if finished.returncode != 0 or not answer.is_file():
            raise ReloadError(f"{folder} does not load in a fresh process:\n{finished.stderr[-3000:]}")
        measured: dict[str, float] = json.loads(answer.read_text())
    difference = measured.get("reload_difference", 0.0)
    if not difference <= RELOAD_TOLERANCE:
        raise ReloadError(
            f"{folder}: reloaded logits differ by {difference:.2e} of the largest (at most {RELOAD_TOLERANCE:.0e})"
        )
    return measured


def _measure(folder: str, request: str, answer: str) -> None:
    from transformers import AutoModelForCausalLM

    tensors = load_file(request)
    prompt_tokens, new_tokens, threads = (int(number) for number in tensors["sizes"])
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder).float().eval()
    result: dict[str, float] = {}
    with torch.inference_mode():
        if "ids" in tensors:
            logits = model(input_ids=tensors["ids"], use_cache=False).logits
            result["reload_difference"] = float(
                (logits - tensors["logits"]).abs().max() / tensors["logits"].abs().max()
            )
        limit = getattr(model.config, "max_position_embeddings", None) or prompt_tokens + new_tokens
        prompt_tokens = min(prompt_tokens, limit - new_tokens)
        prompt = torch.zeros(1, prompt_tokens, dtype=torch.int64) + 1
        result["prefill_tokens_per_s"] = prompt_tokens / _median_seconds(lambda: model(input_ids=prompt))
        result["decode_tokens_per_s"] = new_tokens / _median_seconds(lambda: _decode(model, prompt, new_tokens))
    result["peak_memory_bytes"] = _peak_memory_bytes()
    Path(answer).write_text(json.dumps(result))


def _peak_memory_bytes() -> int:
    """This process's peak. On Linux not from getrusage, which starts a child at its parent's own peak."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _decode(model: Any, prompt: Tensor, new_tokens: int) -> None:
    cache, token = model(input_ids=prompt[:, :1], use_cache=True).past_key_values, prompt[:, :1]
    for _ in range(new_tokens):
        output = model(input_ids=token, past_key_values=cache, use_cache=True)
        cache, token = output.past_key_values, output.logits[:, -1:].argmax(-1)


def _median_seconds(action: Callable[[], Any], *, rounds: int = 3) -> float:
    action()
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


if __name__ == "__main__":
    _measure(*sys.argv[1:4])
