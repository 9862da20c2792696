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
    AutoTokenizer,
    GenerationConfig,
)
from transformers.models.llama import modeling_llama  # noqa: F401 - most of what any architecture imports

_AUTO: dict[str, Any] = {
    "ForSequenceClassification": AutoModelForSequenceClassification,
    "ForImageClassification": AutoModelForImageClassification,
    "ForMaskedLM": AutoModelForMaskedLM,
}


WRITTEN_TOKENS = 8
"""Tokens of the greedy continuation that the reload gate compares."""

_TEXTS = (
    "",
    " ",
    "a",
    "Once upon a time, there was a little girl named Lily.",
    "  two spaces  before,  between and  after  ",
    "line\nbreaks\n\n\tand\ttabs\r\n",
    "def add(a, b):\n    return a + b  # 12345 67.89\n",
    "Ünïcödé, ﬁne: café, Straße, İstanbul, ½",
    "日本語のテキスト、中文文本和한국어",
    "Привет, мир! שלום مرحبا नमस्ते",
    "emoji 🙂👩‍👩‍👧‍👦🏳️‍🌈 and zero\u200bwidth",
    "UPPER lower MiXeD iPhone ALLCAPS",
    "don't can't it's we'll I'd you're",
    "https://example.org/a_b-c?d=e&f=%20#g",
    "<s> </s> <unk> [CLS] [SEP] [MASK] <|endoftext|> <bos> <eos> <pad>",
    '{"key": [1, 2.5, null], "other": {"x": true}}',
    "____----====....!!!!????",
    "x" * 200,
)
_CHAT = (
    {"role": "user", "content": "What is two and two?"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": " And three? "},
)


def tokenizer_facts(tokenizer: Any) -> dict[str, Any]:
    """Ids, special tokens, padding and chats of a tokenizer as a JSON value: equal for tokenizers that agree."""
    special = {name: getattr(tokenizer, f"{name}_token_id", None) for name in _SPECIAL}
    return {
        "ids": {text: _list(tokenizer(text, verbose=False)["input_ids"]) for text in _TEXTS},
        "ids without special tokens": {
            text: _list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) for text in _TEXTS
        },
        "text of ids": {text: _decoded(tokenizer, text) for text in _TEXTS},
        "special tokens": special,
        "number of tokens": len(tokenizer),
        "padding side": tokenizer.padding_side,
        "truncation side": tokenizer.truncation_side,
        "chat template": _rendered(tokenizer),
    }


_SPECIAL = ("bos", "eos", "pad", "unk", "sep", "cls", "mask")


def _list(ids: Any) -> list[int]:
    return [int(number) for number in ids]


def _decoded(tokenizer: Any, text: str) -> str:
    return str(tokenizer.decode(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]))


def _rendered(tokenizer: Any) -> list[str]:
    """A conversation as the chat template writes it, opened for an answer and not; its refusal where it refuses."""
    if not tokenizer.chat_template:
        return []
    texts = []
    for opened in (True, False):
        try:
            text = tokenizer.apply_chat_template(list(_CHAT), tokenize=False, add_generation_prompt=opened)
        except Exception as error:  # a template's own word, compared like any other
            text = f"refused: {error}"
        texts.append(str(text))
    return texts


def written(model: Any, input_ids: Tensor, generation_config: GenerationConfig) -> tuple[Tensor, Tensor]:
    """(greedy continuation [N], how far each token's logit is above the next, relative to the largest logit [N])."""
    generation = model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        generation_config=generation_config,
        do_sample=False,
        num_beams=1,
        max_new_tokens=WRITTEN_TOKENS,
        output_logits=True,
        return_dict_in_generate=True,
    )
    logits = torch.cat(generation.logits).float()
    best = logits.topk(2).values
    scale = logits.abs().masked_fill(~logits.isfinite(), 0).amax(-1).clamp_min(1e-30)
    return generation.sequences[0, input_ids.shape[1] :].cpu(), ((best[:, 0] - best[:, 1]) / scale).cpu()


def measure(folder: str, request: str, answer: str) -> None:
    """Load a checkpoint, run it on the request's inputs, time it, and write the figures to `answer`."""
    tensors = load_file(request)
    prompt_tokens, new_tokens, threads = (int(number) for number in tensors["sizes"][:3])
    torch.set_num_threads(threads)
    model = _load(folder)
    result: dict[str, Any] = {}
    if tensors["sizes"][3]:
        result["tokenizer"] = tokenizer_facts(AutoTokenizer.from_pretrained(folder))
    with torch.inference_mode():
        if "generated" in tensors:
            continued, _ = written(model, tensors["input_ids"][:1], model.generation_config)
            result["generated"] = continued.tolist()
        if "logits" in tensors:
            inputs = {name: tensors[name] for name in ("input_ids", "pixel_values") if name in tensors}
            output = model(**inputs)
            logits = output.logits if hasattr(output, "logits") else output.last_hidden_state
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
    """The model, loaded by the Auto class of its kind as users load it."""
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
    """Peak memory of this process. On Linux getrusage would start a child at its parent's peak, so it is not used."""
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


def _attempt(request: dict[str, str]) -> int:
    """Exit status of one request: 0, or 1 with the traceback in the request's file of errors."""
    with Path(request["errors"]).open("w", encoding="utf-8") as errors:
        sys.stderr = errors
        try:
            measure(request["folder"], request["request"], request["answer"])
        except BaseException:
            traceback.print_exc(file=errors)
            return 1
    return 0


def _serve() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        if not hasattr(os, "fork"):  # then this process is good for one checkpoint
            print(json.dumps({"status": _attempt(request)}), flush=True)
            return
        child = os.fork()
        if child == 0:
            os._exit(_attempt(request))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(json.dumps({"status": status}), flush=True)


if __name__ == "__main__":
    _serve()
