"""Checks of a path before it is opened, by the rules of every system, and the files that an entry stands for."""

import os
import re
from collections.abc import Sequence
from glob import glob, has_magic
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath

from cascade.runtime.errors import UserError


def inside(name: str) -> bool:
    """Whether a relative path stays in the folder that it starts from, on every system."""
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    leads = posix.is_absolute() or windows.drive or windows.root or ".." in (*posix.parts, *windows.parts)
    return bool(name) and not leads and not any(sign in name for sign in "\0\\")


ROWS, TABLE, TEXT = "JSON", "Parquet", "text"

KINDS = {".jsonl": ROWS, ".json": ROWS, ".parquet": TABLE, ".txt": TEXT, ".md": TEXT, ".py": TEXT}
"""Suffix -> what a file of data with it holds; a suffix of compression may follow."""

_PACKED = (".gz", ".bz2", ".xz")

_UNREAD = ".zst"
"""Compression that many datasets use, and that the standard library does not read."""

_ABOUT = re.compile(r"(readme|licen[cs]e|notice|changelog)([._-].*)?", re.IGNORECASE)
"""Names of texts about a folder, which are no data."""


def kind_of(name: str) -> str:
    """What a file of data holds by its suffix; '' where the suffix is unknown, as that of a.jsonl.bak."""
    path = PurePath(name)
    return KINDS.get(PurePath(path.stem).suffix if path.suffix in _PACKED else path.suffix, "")


def require_kind(name: str, place: str) -> None:
    """Refuse a file of data whose kind its name does not tell.

    Raises:
        UserError: its name ends in no known suffix; `place` names the recipe's key.
    """
    if PurePath(name).suffix == _UNREAD:
        raise UserError(f"{place}: {name}: zst is not read; gz, bz2 and xz are")
    if not kind_of(name):
        raise UserError(f"{place}: {name}: unknown kind of file: its name has to end in one of {_KNOWN}")


def files_of(entry: str, place: str) -> list[str]:
    """The files that an entry of a recipe stands for, sorted: the file itself, a folder's files, those of a pattern.

    Of a folder, with the folders below it, also linked ones, the files whose kind is known and whose names begin with
    neither '.' nor '_', and of texts those that are not about the folder, as README.md is.

    Raises:
        UserError: the entry stands for no file, or for files of several kinds; `place` names the recipe's key.
    """
    if not entry.strip():
        raise UserError(f"{place}: an empty path; name a file, a folder or a pattern")
    path = _expanded(entry, place)
    if path.is_file():
        return [str(path)]
    if path.is_dir():
        below = _below(path)
        unread = next((name for name in below if name.endswith(_UNREAD) and kind_of(name.removesuffix(_UNREAD))), None)
        if unread is not None:
            require_kind(unread, place)
        files = [name for name in below if _is_data(name)]
        if not files:
            raise UserError(f"{place}: {entry}: no file of data in this folder; known kinds: {_KNOWN}")
        kinds = {kind: [name for name in files if kind_of(name) == kind] for kind in sorted(set(map(kind_of, files)))}
        if len(kinds) > 1:
            counts = ", ".join(f"{len(names)} of {kind} ({Path(names[0]).name})" for kind, names in kinds.items())
            raise UserError(
                f"{place}: {entry}: files of several kinds are in this folder: {counts}; say with a pattern which are "
                f"meant, such as {path / '*.jsonl'}"
            )
        return files
    if not has_magic(entry):
        raise UserError(f"{place}: {entry}: no such file")
    files = sorted(name for name in glob(str(path), recursive=True) if Path(name).is_file())
    if not files:
        raise UserError(f"{place}: {entry}: no such file: nothing is of this pattern")
    return files


def distinct_files(entries: Sequence[str], place: str) -> list[str]:
    """The files that several entries of a recipe stand for, in the order of the entries.

    Raises:
        UserError: an entry stands for no file (see `files_of`), or a file is there twice, by whatever names.
    """
    first: dict[str, tuple[str, str]] = {}
    for entry in entries:
        for file in files_of(entry, place):
            real = os.path.realpath(file)
            if real in first:
                before, name = first[real]
                entries_of_file = f"{before} and {entry}" if before != entry else f"{entry} twice"
                links = f" ({name} and {file} are one file)" if name != file else ""
                raise UserError(
                    f"{place}: {file} is named by {entries_of_file}{links}, and would be read twice; name it once, and "
                    "with data.weights if it is to count more"
                )
            first[real] = (entry, file)
    return [file for _, file in first.values()]


def lead_to(entry: str) -> list[str]:
    """Every file that an entry might be read from; empty where nothing has that name."""
    if not entry.strip():
        return []
    path = Path(entry).expanduser()
    if path.is_dir():
        return _below(path)
    return glob(entry, recursive=True) if has_magic(entry) and not path.exists() else [entry]


def ignored_files(entry: str) -> list[str]:
    """Files of a folder that `files_of` passes over: of no known kind, or about the folder."""
    path = Path(entry).expanduser()
    return [name for name in _below(path) if not _is_data(name)] if entry and path.is_dir() else []


_KNOWN = f"{', '.join(KINDS)} (also with {', '.join(_PACKED)} behind it)"


def _is_data(name: str) -> bool:
    kind = kind_of(name)
    return bool(kind) and not (kind == TEXT and _ABOUT.fullmatch(PurePath(name).name))


def _expanded(entry: str, place: str) -> Path:
    try:
        return Path(entry).expanduser()
    except RuntimeError as error:
        raise UserError(f"{place}: {entry}: {error}") from error


def _below(folder: Path) -> list[str]:
    """Files below a folder, also through links, each real folder once; names with a leading . or _ are passed over."""
    paths, visited = [], {os.path.realpath(folder)}
    for above, folders, names in os.walk(folder, followlinks=True):
        real_paths = {name: os.path.realpath(os.path.join(above, name)) for name in sorted(folders)}
        folders[:] = []
        for name, real in real_paths.items():
            if real not in visited and not name.startswith((".", "_")):
                visited.add(real)
                folders.append(name)
        paths += [os.path.join(above, name) for name in names if not name.startswith((".", "_"))]
    return sorted(name for name in paths if Path(name).is_file())
