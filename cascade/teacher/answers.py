"""Answers as they came, one line each, appended and synced: what was paid for is never asked for again."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from cascade.teacher.prompts import Prompt


@dataclass(frozen=True)
class Request:
    """One answer to ask for."""

    prompt: Prompt
    number: int
    """Of the answers to this prompt, from 0."""
    key: str
    """What the answer depends on, as a digest: the prompt, its number, who is asked, and how it samples."""

    @property
    def seed(self) -> int:
        """Of the answer's sampling."""
        return int(self.key[:8], 16) >> 1


@dataclass(frozen=True)
class Answer:
    """What came back."""

    key: str
    text: str
    finish_reason: str
    """'stop', 'length', or 'refused' where the teacher would not answer (then `text` says why)."""
    prompt_tokens: int
    answer_tokens: int
    logprobs: list[Any] | None = None


def requests_of(prompts: Sequence[Prompt], answers: int, settings: dict[str, Any]) -> list[Request]:
    """Every answer to ask for, in order; `settings` is all that changes an answer."""
    how = json.dumps(settings, sort_keys=True)
    found = []
    for prompt in prompts:
        for number in range(answers):
            digest = hashlib.sha256(f"{how}\n{json.dumps(prompt.messages)}\n{number}".encode()).hexdigest()
            found.append(Request(prompt, number, digest[:32]))
    return found


class AnswerLog:
    """An append-only file of answers by key. A line that a death left half-written is passed over.

    Safe to append to from several threads.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answers: dict[str, Answer] = {}
        self._lock = Lock()
        self._complete = True
        if path.exists():
            text = path.read_text(encoding="utf-8", errors="replace")
            self._complete = not text or text.endswith("\n")
            for line in text.splitlines():
                answer = _read(line)
                if answer is not None:
                    self.answers[answer.key] = answer

    def add(self, answers: Sequence[Answer]) -> None:
        """Append, on disk before this returns."""
        lines = "".join(json.dumps(asdict(answer)) + "\n" for answer in answers)
        with self._lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            before, self._complete = "" if self._complete else "\n", False  # until it is known to be there
            with self.path.open("a", encoding="utf-8") as file:
                file.write(before + lines)
                file.flush()
                os.fsync(file.fileno())
            self._complete = True
            self.answers |= {answer.key: answer for answer in answers}


def _read(line: str) -> Answer | None:
    try:
        return Answer(**json.loads(line))
    except (ValueError, TypeError):
        return None
