"""The errors that a user can cause or has to know of; each is printed as one message, without a traceback.

Exit codes: 2 a recipe or arguments that cannot be used, 73 a directory that another run is writing to; 1 a stage that
could not be done, 65 numbers that are not finite or a loss that climbs, 75 a disk that takes no more (try again); 130
and 143 after Ctrl-C and SIGTERM.
"""

import errno


class UserError(Exception):
    """A user's input cannot be used; the message says where, what was given, what is accepted, what to do."""

    exit_code = 2


class RecipeError(UserError):
    """All problems of a recipe at once, one a line, each with its place in the file."""

    def __init__(self, source: str, problems: list[str]):
        self.source = source
        self.problems = problems
        super().__init__(f"{source}\n" + "\n".join(f"  {problem}" for problem in problems))


class BusyError(UserError):
    """Another run is writing to the directory."""

    exit_code = 73


class RunError(Exception):
    """A stage could not be made, although nothing that the user wrote is wrong."""

    exit_code = 1


class TrainingError(RunError):
    """Training stopped before it could do harm."""


class NotFiniteError(TrainingError):
    """A loss or gradient is not finite."""

    exit_code = 65


class DivergedError(TrainingError):
    """A loss has climbed and stays high."""

    exit_code = 65


class DiskError(RunError):
    """A disk takes no more: full, over its quota, read-only, failing."""

    exit_code = 75


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM came; the argument is the signal's number."""

    @property
    def exit_code(self) -> int:
        """The exit code by the shell's convention: 128 and the signal's number."""
        return 128 + int(self.args[0])


_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG}
_DISK_WORDS = ("No space left on device", "quota exceeded", "File too large", "Read-only file system")


def is_disk_error(error: BaseException) -> bool:
    """Whether an error says that a disk takes no more, in whichever library's words."""
    if isinstance(error, UserError | RunError):  # told already, as what they are
        return False
    number = getattr(error, "errno", None)
    return number in _DISK or (number is None and any(word in str(error) for word in _DISK_WORDS))
