"""What a command may do because its user said so; a recipe, which may come from a stranger, can allow nothing."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Permissions:
    """The permissions of one command, handed down to what needs them."""

    task_code: bool = False
    """Tasks may run Python functions of their own, in a process without keys in its environment."""
    private_networks: bool = False
    """Endpoints may be on private networks."""


NO_PERMISSIONS = Permissions()
