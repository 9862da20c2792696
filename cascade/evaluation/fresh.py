"""A process that knows torch and transformers and nothing of ours: each checkpoint is loaded in a fork of it.

Started by `reload.py` as a script. Importing the two takes most of a reload's time, so it is done once; what is loaded
is gone with its fork. A line of JSON on standard input asks (folder, request, answer, errors: paths), a line on
standard output says when that is done. It ends with its input.
"""

import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)
from transformers.models.llama import modeling_llama  # noqa: F401 - most of what any architecture imports

_AUTO: dict[str, Any] = {
    "ForSequenceClassification": AutoModelForSequenceClassification,
    "ForImageClassification": AutoModelForImageClassification,
    "ForMaskedLM": AutoModelForMaskedLM,
}


def measure(folder: str, request: str, answer: str) -> None:
    """Load, compare with the request's logits where there are any, time; write what was found."""
    tensors = load_file(request)
    prompt_tokens, new_tokens, threads = (int(number) for number in tensors["sizes"])
    torch.set_num_threads(threads)
    model = _load(folder)
    result: dict[str, float] = {}
    with torch.inference_mode():
        if "logits" in tensors:
            inputs = {name: tensors[name] for name in ("input_ids", "pixel_values") if name in tensors}
            found = model(**inputs)
            logits = found.logits if hasattr(found, "logits") else found.last_hidden_state
            result["reload_difference"] = float(
                (logits - tensors["logits"]).abs().max() / tensors["logits"].abs().max()
            )
        if model.main_input_name == "input_ids":
            limit = getattr(model.config, "max_position_embeddings", None) or prompt_tokens + new_tokens
            writes = model.can_generate()
            prompt_tokens = min(prompt_tokens, max(1, limit - new_tokens) if writes else limit)
            prompt = torch.zeros(1, prompt_tokens, dtype=torch.int64) + 1
            result["prefill_tokens_per_s"] = prompt_tokens / _median_seconds(lambda: model(input_ids=prompt))
            if writes:
                result["decode_tokens_per_s"] = new_tokens / _median_seconds(lambda: _decode(model, prompt, new_tokens))
    result["peak_memory_bytes"] = _peak_memory_bytes()
    Path(answer).write_text(json.dumps(result), encoding="utf-8")


def _load(folder: str) -> Any:
    """As its users will: by the Auto class of its kind."""
    config = AutoConfig.from_pretrained(folder)
    kind = (config.architectures or [""])[0]
    if type(config) in MODEL_MAPPING and kind == getattr(MODEL_MAPPING[type(config)], "__name__", ""):
        auto = AutoModel
    else:
        auto = next((auto for name, auto in _AUTO.items() if kind.endswith(name)), AutoModelForCausalLM)
    model = auto.from_pretrained(folder).eval()
    # Packed weights compute in the dtype that they are stored with.
    return model if getattr(model.config, "quantization_config", None) else model.float()


def _peak_memory_bytes() -> int:
    """This process's peak. On Linux not from getrusage, which starts a child at its parent's own peak."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines())
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


def _attempt(asked: dict[str, str]) -> int:
    """Exit status of one request; what went wrong goes into its file of errors."""
    with Path(asked["errors"]).open("w", encoding="utf-8") as errors:
        sys.stderr = errors
        try:
            measure(asked["folder"], asked["request"], asked["answer"])
        except BaseException:
            traceback.print_exc(file=errors)
            return 1
    return 0


def _serve() -> None:
    for line in sys.stdin:
        asked = json.loads(line)
        if not hasattr(os, "fork"):  # then this process is good for one checkpoint
            print(json.dumps({"status": _attempt(asked)}), flush=True)
            return
        child = os.fork()
        if child == 0:
            os._exit(_attempt(asked))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(json.dumps({"status": status}), flush=True)


if __name__ == "__main__":
    _serve()
