"""Prints the shell commands of a Markdown file's ```bash blocks, in order; CI runs them."""

import re
import sys
from pathlib import Path


def commands(text: str) -> str:
    lines = "\n".join(re.findall(r"^```bash\n(.*?)^```", text, flags=re.S | re.M)).splitlines()
    return "\n".join(line for line in lines if line.strip())


if __name__ == "__main__":
    # `a && b` that fails at a does not stop a shell by itself, not even under set -e.
    for line in commands(Path(sys.argv[1]).read_text()).splitlines():
        print(f"{{ {line}; }} || exit 1")
