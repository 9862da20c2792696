"""What names one state of a repository on the hub, for good."""

import re

COMMIT = re.compile(r"[0-9a-f]{40}")
"""A commit; branches and tags can move."""
