"""A teacher behind a real server, `transformers serve`, with the built-in model."""

import os
import shutil
import socket
import subprocess
import sys
import time

import httpx2
import pytest
import torch
from test_logprobs import TEMPLATE

from cascade.models.checkpoint.load import BUILTIN_FOLDER, load_model, load_tokenizer, resolve_model
from cascade.recipe.generate import Endpoint
from cascade.runtime.errors import UserError
from cascade.teacher.writing.answers import AnswerLog, requests_of
from cascade.teacher.writing.endpoint import ask
from cascade.teacher.writing.prompts import prompts_of
from cascade.teacher.writing.spending import Spending

for name in ("fastapi", "uvicorn", "openai"):
    pytest.importorskip(name, reason=f"transformers serve needs {name}: pip install transformers[serving]")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(url, the served model's folder)."""
    folder = tmp_path_factory.mktemp("serve") / "pico"
    shutil.copytree(BUILTIN_FOLDER / "pico-python", folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = "import sys; from transformers.cli.transformers import main; sys.exit(main())"
    arguments = ["serve", str(folder), "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    log = (folder.parent / "log.txt").open("w")
    process = subprocess.Popen(
        [sys.executable, "-c", command, *arguments], stdout=log, stderr=log, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    try:
        for _ in range(600):
            try:
                httpx2.get(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except httpx2.TransportError:
                assert process.poll() is None, (folder.parent / "log.txt").read_text()[-2000:]
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1", str(folder)
    finally:
        process.terminate()
        process.wait(20)
        log.close()


QUESTIONS = ["def mean(values):\n", "import os\n", "for key, value in"]


def answers(server, folder, api, **settings):
    url, model = server
    endpoint = Endpoint(url=url, model=model, api=api, concurrency=2, timeout_seconds=60.0, **settings)
    requests = requests_of(prompts_of(QUESTIONS), 1, {})
    log = AnswerLog(folder / "answers.jsonl")
    refused = ask(
        endpoint, requests, log, Spending(folder / "s.json", endpoint), sampling={"temperature": 0.0, "max_tokens": 12}
    )
    assert refused == []
    return [log.answers[request.key] for request in requests]


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_greedy_answers_of_a_real_server_are_the_models_own(server, tmp_path, api):
    source = resolve_model(server[1])
    model, tokenizer = load_model(source), load_tokenizer(source)
    for question, answer in zip(QUESTIONS, answers(server, tmp_path, api), strict=True):
        text = f"<|user|>{question}<|endoftext|><|assistant|>" if api == "chat" else question
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            written = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        assert answer.text == tokenizer.decode(written, skip_special_tokens=True)
        assert (answer.prompt_tokens, answer.answer_tokens) == (ids.shape[1], len(written))


def test_a_real_server_that_ignores_the_wish_for_log_probabilities_is_found_out(server, tmp_path):
    with pytest.raises(UserError, match="the answers come without log-probabilities"):
        answers(server, tmp_path, "chat", top_logprobs=5)
