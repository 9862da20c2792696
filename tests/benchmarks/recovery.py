"""Speed and memory of one recovery step: plain torch, NVIDIA ModelOpt and this package side by side.

    python tests/benchmarks/recovery.py [--rounds 3] [--steps 8] [--json]

A Llama teacher (8 layers, hidden 384, MLP 1024, 6/3 heads, vocabulary 32,000, tied; 25.3M) and a student of 4 layers
and MLP 768 (17.6M), batch 2 x 512, AdamW, float32 on a CPU. Each contender in a process of its own, rounds alternating,
medians. cascade-sampled and cascade-hidden learn from what was kept of the teacher before: 38 draws a token, or bfloat16 hidden
states and the teacher's head. extra_memory_bytes is the peak above the loaded models; matmul_fraction counts 2 x teacher + 6 x student
parameters a token against the machine's measured float32 matrix products. With a GPU also the loss alone at hidden
4096 / 2048, vocabulary 128,256, 8192 tokens, bfloat16.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

SHAPE = {"hidden_size": 384, "num_attention_heads": 6, "num_key_value_heads": 3, "vocab_size": 32000,
         "tie_word_embeddings": True, "max_position_embeddings": 1024}  # fmt: skip
TEACHER = {"num_hidden_layers": 8, "intermediate_size": 1024}
STUDENT = {"num_hidden_layers": 4, "intermediate_size": 768}
BATCH, LENGTH = 2, 512
CONTENDERS = ("plain-torch", "modelopt", "ce-hf", "ce-cascade", "cascade-live", "cascade-sampled", "cascade-hidden")
NEEDS = {"modelopt": "modelopt"}


def models():
    """(teacher, student) with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    teacher = LlamaForCausalLM(LlamaConfig(**SHAPE, **TEACHER)).eval().requires_grad_(False)
    return teacher, LlamaForCausalLM(LlamaConfig(**SHAPE, **STUDENT)).train()


def batches(count: int):
    """Random token blocks [count x B, S]."""
    import torch

    return torch.randint(3, SHAPE["vocab_size"], (count * BATCH, LENGTH), generator=torch.Generator().manual_seed(0))


def plain_loop(student, step_loss, ids) -> list[float]:
    """Seconds of each step of the loop that everybody writes."""
    import torch

    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
    times = []
    for part in ids.split(BATCH):
        started = time.perf_counter()
        step_loss(part).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - started)
    return times


def plain_torch(teacher, student, ids) -> list[float]:
    """kl_div on whole logits."""
    import torch
    from torch.nn import functional as F

    def loss(part):
        with torch.no_grad():
            expected = teacher(input_ids=part, use_cache=False).logits.flatten(0, 1)
        # The last position of each block stays in: leaving it out would copy both models' logits.
        found = student(input_ids=part, use_cache=False).logits.flatten(0, 1)
        return F.kl_div(F.log_softmax(found, -1), F.softmax(expected, -1), reduction="batchmean")

    return plain_loop(student, loss, ids)


def ce_hf(teacher, student, ids) -> list[float]:
    """The student alone, transformers' own loss."""
    return plain_loop(student, lambda part: student(input_ids=part, labels=part, use_cache=False).loss, ids)


def kept(kind: str, teacher, ids):
    """What is kept of the teacher for these blocks, in a folder that goes with the process."""
    import tempfile

    from cascade.data.blocks import TokenBlocks
    from cascade.models.architecture.head import Head, head_of
    from cascade.teacher.targets.keys import open_windows
    from cascade.teacher.targets.label import label
    from cascade.teacher.targets.reader import CachedTargets
    from cascade.teacher.targets.record import Layout

    how = {"draws": 38} if kind == "sampled" else {"hidden_size": SHAPE["hidden_size"], "dtype": "bfloat16"}
    layout, blocks = Layout(kind, SHAPE["vocab_size"], **how), TokenBlocks(ids, ids, 3.0)
    folder = tempfile.TemporaryDirectory()
    windows = open_windows(folder.name, teacher, None, layout)
    label(windows, layout, teacher, blocks)
    head = Head(head_of(teacher).weight.detach().clone(), None) if kind == "hidden" else None
    targets = CachedTargets(windows, layout, blocks, head)
    targets.folder = folder  # removed with it
    return targets


def cascade(teacher, student, ids, targets=None) -> list[float]:
    """This package's loop."""
    from cascade.data.blocks import TokenBlocks
    from cascade.distillation.options import Execution, Hooks, Optimization
    from cascade.distillation.supervision import Supervision
    from cascade.distillation.trainer import distill

    times = [time.perf_counter()]
    distill(
        student,
        teacher,
        TokenBlocks(ids, ids, 3.0),
        num_tokens=ids.numel(),
        supervision=Supervision(targets=targets),
        optimization=Optimization(batch_size=BATCH, learning_rate=1e-4),
        execution=Execution(microbatch_size=BATCH),
        hooks=Hooks(on_step=lambda done, total: times.append(time.perf_counter())),
    )
    return [after - before for before, after in zip(times, times[1:], strict=False)]


def modelopt(teacher, student, ids) -> list[float]:
    """ModelOpt's distillation mode with its logits loss, in the same loop."""
    import modelopt.torch.distill as mtd

    class OfLogits(mtd.LogitsDistillationLoss):  # as its plugin for transformers does
        def forward(self, student_output, teacher_output):
            return super().forward(student_output.logits, teacher_output.logits)

    config = {"teacher_model": teacher, "criterion": OfLogits(), "loss_balancer": None}
    wrapped = mtd.convert(student, mode=[("kd_loss", config)])

    def loss(part):
        output = wrapped(input_ids=part, use_cache=False)
        return wrapped.compute_kd_loss(student_loss=None) if output is not None else None

    return plain_loop(wrapped, loss, ids)


def measure(contender: str, steps: int) -> dict[str, float]:
    """Median seconds of a step and the peak above the loaded models."""
    import torch

    teacher, student = models()
    ids = batches(steps + 2)
    alone = contender in ("ce-hf", "ce-cascade", "cascade-sampled", "cascade-hidden")
    targets = None
    if contender in ("cascade-sampled", "cascade-hidden"):
        targets = kept(contender.removeprefix("cascade-"), teacher, ids)
    if alone:
        teacher = None
    run = {"plain-torch": plain_torch, "ce-hf": ce_hf, "modelopt": modelopt}.get(contender)
    rate = matmul_rate()
    before = reset_peak()
    times = (run(teacher, student, ids) if run else cascade(teacher, student, ids, targets))[2:]
    peak = memory("VmHWM") - before
    seconds = statistics.median(times)
    flops = (0 if alone else 2 * count(TEACHER)) + 6 * count(STUDENT)
    tokens_per_s = BATCH * LENGTH / seconds
    return {
        "tokens_per_s": tokens_per_s,
        "extra_memory_bytes": peak,
        "matmul_fraction": tokens_per_s * flops / rate,
        "threads": torch.get_num_threads(),
    }


def count(shape: dict[str, int]) -> int:
    """Parameters of one of the two models."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return sum(p.numel() for p in LlamaForCausalLM(LlamaConfig(**SHAPE, **shape)).parameters())


def matmul_rate() -> float:
    """float32 FLOPs per second of a matrix product of 1024 x 1024 x 4096."""
    import torch

    left, right = torch.randn(1024, 1024), torch.randn(1024, 4096)
    times = []
    for _ in range(12):
        started = time.perf_counter()
        left @ right
        times.append(time.perf_counter() - started)
    return 2 * 1024 * 1024 * 4096 / statistics.median(times[2:])


def memory(field: str) -> int:
    """A field of this process's status in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def reset_peak() -> int:
    """Bytes in use; the peak counts from here."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def loss_on_gpu() -> dict[str, float] | None:
    """Forward and backward of the loss alone at Liger's shape; None without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    from cascade.distillation.losses.fused import fused_loss
    from cascade.distillation.options import Objective
    from cascade.models.architecture.head import Head

    def draw(*shape):
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) / 64

    student, teacher = draw(8192, 2048).requires_grad_(), draw(8192, 4096)
    weight, other = draw(128_256, 2048).requires_grad_(), draw(128_256, 4096)
    targets = torch.randint(0, 128_256, (8192,), device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(8):
        torch.cuda.synchronize()
        started = time.perf_counter()
        found = fused_loss(
            student, Head(weight, None), targets, Objective(), teacher_hidden=teacher, teacher_head=Head(other, None)
        )
        found.loss.backward()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
        student.grad = weight.grad = None
    return {
        "seconds": statistics.median(times[2:]),
        "extra_memory_bytes": torch.cuda.max_memory_allocated() - before,
    }


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        found = loss_on_gpu() if options.contender == "gpu" else measure(options.contender, options.steps)
        print(json.dumps(found))
        return
    missing = [name for name in options.contenders if name in NEEDS and find_spec(NEEDS[name]) is None]
    present = [name for name in options.contenders if name not in missing]
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in present}
    for _ in range(options.rounds):
        for name in present:
            seen[name].append(own_process(name, options.steps))
    rows = [
        {"name": name} | {key: statistics.median(one[key] for one in found) for key in found[0]}
        for name, found in seen.items()
    ]
    gpu = own_process("gpu", 0)
    conditions = {"device": platform.machine(), "threads": int(rows[0]["threads"]), "dtype": "float32",
                  "batch": [BATCH, LENGTH], "missing": missing}  # fmt: skip
    if options.json:
        print(json.dumps({"conditions": conditions, "rows": rows + ([{"name": "loss, GPU"} | gpu] if gpu else [])}))
        return
    print(conditions)
    print("| contender | tokens/s | against plain-torch | extra memory | of the matmul rate |")
    print("|---|---|---|---|---|")
    plain = next((row["tokens_per_s"] for row in rows if row["name"] == "plain-torch"), None)
    for row in rows:
        ratio = f"{row['tokens_per_s'] / plain:.2f}x" if plain else ""
        print(
            f"| {row['name']} | {row['tokens_per_s']:.0f} | {ratio} | {row['extra_memory_bytes'] / 1e6:.0f} MB | "
            f"{row['matmul_fraction']:.2f} |"
        )
    for name in missing:
        print(f"{name}: not installed (pip install -e '.[bench]'), not measured")
    print(
        f"loss alone, GPU: {gpu['seconds'] * 1e3:.1f} ms, {gpu['extra_memory_bytes'] / 1e9:.1f} GB"
        if gpu
        else "loss alone, GPU: not measured (no GPU here)"
    )


def own_process(contender: str, steps: int) -> dict[str, float]:
    """One contender's figures."""
    command = [sys.executable, __file__, "--contender", contender, "--steps", str(steps)]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    found: dict[str, float] = json.loads(output.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
