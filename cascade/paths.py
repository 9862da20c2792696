"""What may be said of a path before it is looked at: by the rules of every system, as a file may come from any."""

from pathlib import PurePosixPath, PureWindowsPath


def inside(name: str) -> bool:
    """Whether a relative path stays in the folder that it counts from."""
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    leads = posix.is_absolute() or windows.drive or windows.root or ".." in (*posix.parts, *windows.parts)
    return bool(name) and not leads and not any(sign in name for sign in "\0\\")
