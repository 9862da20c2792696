"""What may be said of a path before it is opened, by the rules of every system, and which files an entry stands for."""

import os
from glob import glob, has_magic
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath

from cascade.errors import UserError


def inside(name: str) -> bool:
    """Whether a relative path stays in the folder that it counts from."""
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    leads = posix.is_absolute() or windows.drive or windows.root or ".." in (*posix.parts, *windows.parts)
    return bool(name) and not leads and not any(sign in name for sign in "\0\\")


ROWS, TABLE, TEXT = "JSON", "Parquet", "text"

KINDS = {".jsonl": ROWS, ".json": ROWS, ".parquet": TABLE, ".txt": TEXT, ".md": TEXT, ".py": TEXT}
"""What files of data hold, by suffix; a suffix of compression may follow."""


def kind_of(name: str) -> str:
    """What a file of data holds, by its name; '' where the name does not say."""
    known = [suffix for suffix in PurePath(name).suffixes if suffix in KINDS]
    return KINDS[known[-1]] if known else ""


def files_of(entry: str, place: str) -> list[str]:
    """The files that an entry of a recipe stands for, sorted: the file itself, a folder's files, those of a pattern.

    Of a folder, with the folders below it, the files whose kind is known and whose names begin with neither '.' nor
    '_'.

    Raises:
        UserError: there is none, or a folder's files are of several kinds; `place` names the recipe's key.
    """
    path = _expanded(entry, place)
    if path.is_file():
        return [str(path)]
    if path.is_dir():
        files = [name for name in _below(path) if kind_of(name)]
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


def lead_to(entry: str) -> list[str]:
    """Every file that an entry might be read from; none where there is nothing of that name."""
    path = Path(entry).expanduser()
    if path.is_dir():
        return _below(path)
    return glob(entry, recursive=True) if has_magic(entry) and not path.exists() else [entry]


def ignored_files(entry: str) -> list[str]:
    """Files of a folder that `files_of` passes over because their kind is not known."""
    path = Path(entry).expanduser()
    return [name for name in _below(path) if not kind_of(name)] if path.is_dir() else []


_KNOWN = f"{', '.join(KINDS)} (also .gz)"


def _expanded(entry: str, place: str) -> Path:
    try:
        return Path(entry).expanduser()
    except RuntimeError as error:
        raise UserError(f"{place}: {entry}: {error}") from error


def _below(folder: Path) -> list[str]:
    found = []
    for above, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith((".", "_"))]
        found += [os.path.join(above, name) for name in names if not name.startswith((".", "_"))]
    return sorted(name for name in found if Path(name).is_file())
