"""The log of a teacher's answers, one line each, appended and synced: no answer is paid for twice."""

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
    """One answer that a teacher is to give."""

    prompt: Prompt
    number: int
    """The number of this answer among those to its prompt, from 0."""
    key: str
    """Digest of what the answer depends on: the prompt, the answer's number, the teacher and its sampling."""

    @property
    def seed(self) -> int:
        """Seed of the answer's sampling."""
        return int(self.key[:8], 16) >> 1


@dataclass(frozen=True)
class Answer:
    """A teacher's answer to a request."""

    key: str
    text: str
    finish_reason: str
    """As the server wrote it (see `endings`), 'refused' where the teacher would not answer (`text` says why), or
    HOLDS_KEY (no `text`)."""
    prompt_tokens: int
    answer_tokens: int
    logprobs: list[Any] | None = None
    reasoned: bool = False
    """Whether the server has reported reasoning beside the text."""


def requests_of(prompts: Sequence[Prompt], answers: int, settings: dict[str, Any]) -> list[Request]:
    """A request for every answer, in order; `settings` holds everything that changes an answer."""
    how = json.dumps(settings, sort_keys=True)
    requests = []
    for prompt in prompts:
        for number in range(answers):
            digest = hashlib.sha256(f"{how}\n{json.dumps(prompt.messages)}\n{number}".encode()).hexdigest()
            requests.append(Request(prompt, number, digest[:32]))
    return requests


class AnswerLog:
    """An append-only file of answers by key. A line that a killed process left half-written is skipped.

    Several threads may append. `on_added` is called with each answer once it is on the disk.
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
        """Append answers; they are on the disk before this returns."""
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
    """Numbers, from 1, of the lines that are not as they were written (the last may be half a line)."""
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
        sha256 = record.pop("sha256", None)  # lines of earlier versions have none
        return Answer(**record) if sha256 is None or sha256 == _digest(record) else None
    except (ValueError, TypeError, AttributeError):
        return None
