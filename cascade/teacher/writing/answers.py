"""Answers as they came, one line each, appended and synced: what was paid for is never asked for again."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from cascade.teacher.writing.prompts import Prompt

logger = logging.getLogger(__name__)


HOLDS_KEY = "key"
"""The finish_reason of an answer that repeated the endpoint's key."""


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
    """As the server wrote it (see `endings`), 'refused' where the teacher would not answer (`text` says why), or
    HOLDS_KEY (no `text`)."""
    prompt_tokens: int
    answer_tokens: int
    logprobs: list[Any] | None = None
    reasoned: bool = False
    """Whether a server has told of reasoning beside the text."""


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

    Safe to append to from several threads. `on_added` is called with each answer once it is on the disk.
    """

    def __init__(self, path: Path, on_added: Callable[[Answer], None] | None = None) -> None:
        self.path, self.on_added = path, on_added
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
                elif line:
                    logger.warning("%s: a line is not as it was written; what it answered is asked for again", path)

    def add(self, answers: Sequence[Answer]) -> None:
        """Append, on disk before this returns."""
        lines = "".join(_line(answer) + "\n" for answer in answers)
        with self._lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            before, self._complete = "" if self._complete else "\n", False  # until it is known to be there
            with self.path.open("a", encoding="utf-8") as file:
                file.write(before + lines)
                file.flush()
                os.fsync(file.fileno())
            self._complete = True
            self.answers |= {answer.key: answer for answer in answers}
        if self.on_added is not None:
            for answer in answers:
                self.on_added(answer)


def damaged_lines(path: Path) -> list[int]:
    """Numbers, from 1, of the lines that are not as they were written (the last may be half of one)."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [number for number, line in enumerate(lines, start=1) if line and _read(line) is None]


def _line(answer: Answer) -> str:
    record = asdict(answer)
    return json.dumps(record | {"sha256": _digest(record)})


def _digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _read(line: str) -> Answer | None:
    try:
        record = json.loads(line)
        own = record.pop("sha256", None)  # none in lines of before there was one
        return Answer(**record) if own is None or own == _digest(record) else None
    except (ValueError, TypeError, AttributeError):
        return None
