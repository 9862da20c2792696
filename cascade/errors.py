"""The errors that a user can cause: told in one message, without a traceback, with exit code 2."""


class UserError(Exception):
    """Something the user gave cannot be used: the message says where, what, what is accepted, what to do."""


class RecipeError(UserError):
    """All that is wrong with a recipe, at once, each line with its place in the file."""

    def __init__(self, source: str, problems: list[str]):
        self.source = source
        self.problems = problems
        super().__init__(f"{source}\n" + "\n".join(f"  {problem}" for problem in problems))


class RunError(Exception):
    """A stage could not be done though nothing that the user wrote is wrong: told without a traceback, exit code 1."""


class TrainingError(RunError):
    """Training stopped before it could do harm."""


class NotFiniteError(TrainingError):
    """A loss or gradient is not finite."""
