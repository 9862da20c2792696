"""Prints the shell commands of a Markdown file's ```bash blocks, in order; CI runs them."""

import re
import sys
from pathlib import Path


def commands(text: str) -> str:
    return "\n".join(block.strip() for block in re.findall(r"^```bash\n(.*?)^```", text, flags=re.S | re.M))


if __name__ == "__main__":
    print(commands(Path(sys.argv[1]).read_text()))
