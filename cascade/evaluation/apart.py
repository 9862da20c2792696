"""The process of a task that brings code of its own: loads the checkpoint, measures, writes the numbers down.

Started by `task_code.py`. It knows which model and which task from its standard input, and no keys.
"""

import json
import sys
from pathlib import Path

from cascade.evaluation.evaluate import default_device
from cascade.evaluation.harness import measure_code_task
from cascade.models.checkpoint import ModelSource, load_model, load_tokenizer
from cascade.plain_json import write_json


def main() -> None:
    """One task."""
    asked = json.load(sys.stdin)
    source = ModelSource(Path(asked["folder"]), asked["reference"], asked["gguf_file"])
    found = measure_code_task(
        load_model(source).to(default_device()), load_tokenizer(source), Path(asked["path"]), asked["options"]
    )
    write_json(Path(asked["answer"]), found)


if __name__ == "__main__":
    main()
