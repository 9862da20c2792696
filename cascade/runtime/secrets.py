"""Keys and tokens: recognised in what a user wrote, and hidden in everything that is printed or stored."""

import logging
import os
import re
import sys
import threading
import traceback
from types import TracebackType
from typing import Any
from urllib.parse import quote

_FORMS = re.compile(
    # Also after an escaped line break or a percent-encoded sign, whose last letter belongs to no word.
    r"(?:(?<![A-Za-z0-9])|(?<=\\[nrt])|(?<=%[0-9A-Fa-f]{2}))"
    r"(?:hf_[A-Za-z0-9]{20,}|sk-(?=[\w-]*\d)(?=[\w-]*[A-Z])[\w-]{20,}|sk-[a-z0-9]{32,}|sk-or-v1-[0-9a-f]{20,}"
    r"|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,}|glpat-[\w-]{15,}|(?:gsk|fw)_[A-Za-z0-9]{20,}"
    r"|(?:xai|csk)-[A-Za-z0-9]{20,}|nvapi-[\w-]{20,}|AKIA[0-9A-Z]{16}|AIza[0-9A-Za-z_-]{30,}"
    r"|xox[abpr]-[0-9A-Za-z-]{10,}|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,})"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----(?s:.*?)(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
)
_IN_ADDRESS = re.compile(r"(?<=://)(?:[^/\s@:]*:[^/\s]*|[^/\s@:]{16,})(?=@)")
_CARRIED = re.compile(
    r"(?i)(authorization['\"]?\s*[:=]\s*['\"]?(?:bearer|basic)\s+|x-amz-(?:signature|credential|security-token)=)[^\s'\"&]+"
)
_NAMES = re.compile(
    r"TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|SSHPASS|API_?KEY|(?:^|_)KEY$|CREDENTIAL|._PWD$|_PASS$|_PAT$|_AUTH$"
    r"|AUTH_CONFIG|CONNECTION_STRING|SSH_AUTH_SOCK",
    re.IGNORECASE,
)
_HARMLESS = re.compile(
    r"PATH|HOME|USER|LOGNAME|SHELL|TERM|TZ|LANG|LANGUAGE|LC_\w+|TMPDIR|TEMP|TMP|VIRTUAL_ENV|LD_LIBRARY_PATH|PYTHON\w+"
    r"|(?:OMP|MKL|OPENBLAS|CUDA|NVIDIA|TORCH|PYTORCH|HF|TRANSFORMERS|TOKENIZERS|XDG|TQDM|SSL|REQUESTS)_\w+|\w+_PROXY",
    re.IGNORECASE,
)
"""Names of environment variables that a process which runs foreign code may see."""
_SHORTEST = 8
"""Characters of the shortest value that counts as a key; a shorter value is more likely a word."""

_PLACEHOLDER_WORDS = frozenset(
    "a abc abc123 any anything api change changeme do does dummy empty example fake here insert is key local localhost "
    "lm matter me mock my needed no none not nothing null ollama optional placeholder replace required secret sk "
    "string studio test this token unused use used vllm whatever x your".split()
)
"""Words of which placeholders for a key consist, for servers that need none: sk-no-key-required, lm-studio."""

HIDDEN = "[hidden]"

_known: set[str] = set()
"""Keys that this process uses, for `redact`; every printed line, log record and traceback of the process needs them."""


def remember(key: str) -> None:
    """Let `redact` hide a key that this process uses, whatever its form and its variable's name; placeholders stay."""
    if is_key(key):
        _known.add(key)


def is_key(value: str) -> bool:
    """Whether a value can be a key; short values and placeholders such as `none` are words that any text may hold."""
    return len(value) >= _SHORTEST and not is_placeholder(value)


def is_placeholder(value: str) -> bool:
    """Whether a value consists of words that stand for no key."""
    return all(word in _PLACEHOLDER_WORDS for word in re.split(r"[\W_]+", value.lower()))


def is_secret_name(name: str) -> bool:
    """Whether an environment variable of this name is likely to hold a key."""
    return _NAMES.search(name) is not None


def looks_secret(text: str) -> bool:
    """Whether a text holds what looks like a key, or a user and password in an address."""
    return any(form.search(text) is not None for form in (_FORMS, _IN_ADDRESS, _CARRIED))


def redact(text: str) -> str:
    """The text with keys hidden: keys of known forms, keys in addresses, and the values of this process's keys."""
    keys = {value for name, value in os.environ.items() if is_secret_name(name) and is_key(value)}
    keys |= _known
    keys |= {quote(key, safe="") for key in keys}
    for key in sorted(keys, key=len, reverse=True):
        text = text.replace(key, HIDDEN)
    text = _CARRIED.sub(lambda match: match.group(1) + HIDDEN, text)
    return _IN_ADDRESS.sub(HIDDEN, _FORMS.sub(HIDDEN, text))


def redact_all(value: Any) -> Any:
    """A value of JSON's types with every text in it redacted; dictionaries and lists are walked through."""
    if isinstance(value, dict):
        return {name: redact_all(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [redact_all(part) for part in value]
    return redact(value) if isinstance(value, str) else value


class Redacting(logging.Formatter):
    """A logging formatter that redacts records and their tracebacks."""

    def format(self, record: logging.LogRecord) -> str:
        """The formatted record, redacted."""
        return redact(super().format(record))


def redact_tracebacks() -> None:
    """Print the traceback of an uncaught error, of any thread, without keys."""

    def print_redacted(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        print(redact("".join(traceback.format_exception(kind, error, trace))), file=sys.stderr, end="")

    sys.excepthook = print_redacted
    threading.excepthook = lambda hook: print_redacted(
        hook.exc_type, hook.exc_value or hook.exc_type(), hook.exc_traceback
    )


def without_secrets(environment: dict[str, str]) -> dict[str, Any]:
    """The harmless part of an environment, for a process that runs foreign code."""
    harmless = {name: value for name, value in environment.items() if _HARMLESS.fullmatch(name)}
    harmless = {name: value for name, value in harmless.items() if not is_secret_name(name) and value not in _known}
    return {name: value for name, value in harmless.items() if not looks_secret(value)}
