"""Writes the frozen held-out text and the items of the package's own lm-eval tasks, from a seed.

    python -m cascade.evaluation.tasks_lm_eval.items

Source: the held-out modules of the Python standard library (PSF licence, `tasks/LICENSE-PSF.txt`). The files are
shipped; running this again under another Python version makes other items, and other figures.
"""

import ast
import gzip
import json
import random
import re
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cascade.data.stdlib import FROZEN_HELDOUT, split_of_module, stdlib_documents

TASK_FOLDER = Path(__file__).parents[1] / "tasks"
ITEMS_PER_TASK = 400
_CONTEXT_CHARACTERS = 260
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z_0-9]{2,}")
_OPERATORS = {
    "==": "=",
    "!=": "=!",
    " is not ": " not is ",
    " and ": " , ",
    " in ": " of ",
    "+=": "=+",
    " = ": " == ",
}


def main(seed: int = 0) -> None:
    """Write all files."""
    documents = [(path, text) for path, text in stdlib_documents() if split_of_module(path) == "heldout"]
    _write(FROZEN_HELDOUT, [{"path": path, "text": text} for path, text in documents])
    makers = {
        "python_next_line": next_line_items,
        "python_minimal_pairs": minimal_pair_items,
        "python_complete_line": complete_line_items,
    }
    for name, make in makers.items():
        items = list(make(documents, random.Random(f"{seed}:{name}")))
        random.Random(f"{seed}:{name}:order").shuffle(items)
        _write(TASK_FOLDER / f"{name}.jsonl.gz", _balanced(items))
    licence = Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt"
    shutil.copyfile(licence, TASK_FOLDER / "LICENSE-PSF.txt")


def next_line_items(documents: list[tuple[str, str]], draw: random.Random) -> Iterator[dict[str, Any]]:
    """Which of four lines of the same file comes next? Distractors have the true line's length within a half."""
    for path, text in documents:
        lines = text.splitlines()
        candidates = sorted({line for line in lines if _is_code(line)})
        for number in _code_lines(text):
            truth = lines[number]
            near = [
                line
                for line in candidates
                if line.strip() != truth.strip() and 2 / 3 <= len(line.strip()) / len(truth.strip()) <= 3 / 2
            ]
            context = _context(lines, number)
            near = [line for line in near if line not in context.splitlines()]
            if len(near) < 3:
                continue
            choices = [truth, *draw.sample(near, 3)]
            draw.shuffle(choices)
            yield {
                "kind": path.split("/")[0],
                "context": context,
                "choices": ["\n" + choice for choice in choices],
                "gold": choices.index(truth),
            }


def minimal_pair_items(documents: list[tuple[str, str]], draw: random.Random) -> Iterator[dict[str, Any]]:
    """An intact line against the same line with one plausible fault; both followed by the true next line."""
    for _, text in documents:
        lines = text.splitlines()
        for number in _code_lines(text):
            if number + 1 >= len(lines) or not lines[number + 1].strip():
                continue
            context = _context(lines, number)
            faults = dict(_faults(lines[number], context, draw))
            for kind in sorted(faults):
                after = "\n" + lines[number + 1]
                good, bad = "\n" + lines[number] + after, "\n" + faults[kind] + after
                yield {"kind": kind, "context": context, "good": good, "bad": bad}


def complete_line_items(documents: list[tuple[str, str]], draw: random.Random) -> Iterator[dict[str, Any]]:
    """The rest of a line, from the start of its last identifier, where that name already stood in the context."""
    for path, text in documents:
        lines = text.splitlines()
        for number in _code_lines(text):
            context = _context(lines, number)
            for match in reversed(list(_IDENTIFIER.finditer(lines[number]))):
                rest = lines[number][match.start() :]
                if len(rest) > 20 or match.start() < 8:
                    break
                if re.search(rf"\b{match[0]}\b", context) and not lines[number][match.start() - 1].isspace():
                    before = context + "\n" + lines[number][: match.start()]
                    yield {"kind": path.split("/")[0], "context": before, "target": rest}
                    break


def _faults(line: str, context: str, draw: random.Random) -> Iterator[tuple[str, str]]:
    """(kind of fault, faulty line) for each fault that the line allows."""
    names = [match for match in _IDENTIFIER.finditer(line) if not _is_keyword(match[0])]
    replacements = sorted(
        {name for name in _IDENTIFIER.findall(context) if not _is_keyword(name)} - {m[0] for m in names}
    )
    in_scope = [match for match in names if re.search(rf"\b{match[0]}\b", context)]
    if in_scope and replacements:
        match = draw.choice(in_scope)
        yield "wrong name", line[: match.start()] + draw.choice(replacements) + line[match.end() :]
    operators = [operator for operator in _OPERATORS if operator in line]
    if operators:
        operator = draw.choice(operators)
        yield "wrong operator", line.replace(operator, _OPERATORS[operator], 1)
    if line.endswith(":"):
        yield "missing colon", line[:-1]
    indent = len(line) - len(line.lstrip())
    if indent >= 4:
        yield "wrong indentation", draw.choice([line[4:], "    " + line])


def _code_lines(text: str) -> Iterator[int]:
    """Numbers (from 0) of lines where a statement starts, with enough lines before them."""
    lines = text.splitlines()
    starts = {node.lineno - 1 for node in ast.walk(ast.parse(text)) if isinstance(node, ast.stmt)}
    for number in sorted(starts):
        if number >= 6 and _is_code(lines[number]) and lines[number - 1].strip():
            yield number


def _is_code(line: str) -> bool:
    stripped = line.strip()
    return 12 <= len(stripped) <= 72 and not stripped.startswith(("#", '"', "'", "@")) and '"""' not in stripped


def _is_keyword(name: str) -> bool:
    import keyword

    return keyword.iskeyword(name) or name == "self"


def _context(lines: list[str], number: int) -> str:
    """Whole lines before `number`, about _CONTEXT_CHARACTERS of them."""
    start = number
    while start > 0 and sum(len(line) + 1 for line in lines[start - 1 : number]) <= _CONTEXT_CHARACTERS:
        start -= 1
    return "\n".join(lines[min(start, number - 1) : number])


def _balanced(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """ITEMS_PER_TASK items with the kinds (modules, faults) as even as they come, each context at most once."""
    by_kind: dict[str, list[dict[str, Any]]] = {}
    seen = set()
    for item in items:
        if item["context"] not in seen:
            seen.add(item["context"])
            by_kind.setdefault(item["kind"], []).append(item)
    chosen: list[dict[str, Any]] = []
    while len(chosen) < ITEMS_PER_TASK and any(by_kind.values()):
        chosen += [group.pop() for _, group in sorted(by_kind.items()) if group]
    return chosen[:ITEMS_PER_TASK]


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    # No time stamp in the gzip header: the same items are the same bytes.
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


if __name__ == "__main__":
    main()
