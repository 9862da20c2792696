"""The process of a task that brings code of its own: loads the checkpoint, measures, writes the numbers down.

Started by `task_code.py`. It knows which model and which task from its standard input, and no keys.
"""

import json
import sys
from pathlib import Path

from cascade.evaluation.evaluate import default_device
from cascade.evaluation.tasks_lm_eval.harness import measure_code_task
from cascade.evaluation.tasks_lm_eval.task_options import HarnessOptions
from cascade.models.checkpoint.load import ModelSource, load_model, load_tokenizer
from cascade.store.strict_json import write_json


def main() -> None:
    """One task."""
    request = json.load(sys.stdin)
    source = ModelSource(Path(request["folder"]), request["reference"], request["gguf_file"])
    model, tokenizer = load_model(source).to(default_device()), load_tokenizer(source)
    options = HarnessOptions(**request["options"])
    result = measure_code_task(model, tokenizer, Path(request["path"]), options)
    write_json(Path(request["answer"]), result)


if __name__ == "__main__":
    main()
