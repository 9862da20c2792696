"""What tests/teacher/test_cache_run.py starts under torchrun: a labelling by two processes, and a training from it."""

import json
import sys
from pathlib import Path

import torch
from conftest import distill_with, make_blocks, make_model
from safetensors.torch import save_file

from cascade.distillation import sharding
from cascade.models.architecture.head import Head, head_of
from cascade.runtime import ranks
from cascade.teacher.targets.label import label
from cascade.teacher.targets.reader import CachedTargets

sys.path.insert(0, str(Path(__file__).parent / "teacher"))
from test_cache import KINDS, opened  # noqa: E402


def main(output: Path, kind: str) -> None:
    """Labels into output/cache; the first process writes the weights of the trained student."""
    ranks.join()
    layout, blocks, whole = KINDS[kind], make_blocks(13), make_model(seed=1)
    weight = head_of(whole).weight.detach().clone()
    windows = opened(output / "cache", layout, whole)
    teacher = sharding.shard(whole)
    done = label(windows, layout, teacher, blocks)
    targets = CachedTargets(windows, layout, blocks, Head(weight, None))
    student = make_model(seed=2)
    distill_with(student, teacher, blocks, num_tokens=8 * 16 * 4, batch_size=8, microbatch_size=2, targets=targets)
    weights = {name: value.clone().contiguous() for name, value in sharding.whole_weights(student)}
    if ranks.rank() == 0:
        save_file(weights, output / "weights.safetensors")
        (output / "done.json").write_text(json.dumps({"made": done.made, "windows": done.windows}))
    ranks.leave()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2])
