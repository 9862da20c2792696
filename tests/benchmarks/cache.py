"""What keeping a teacher's targets costs and saves: labelling, reading, and the noise that a sample adds to the gradient.

    python tests/benchmarks/cache.py speed [--model NAME --text FILE] [--rounds 3] [--json]
    python tests/benchmarks/cache.py noise [--model NAME --text FILE] [--batch-tokens 1024] [--json]
    python tests/benchmarks/cache.py bytes [--model NAME --text FILE] [--blocks 400] [--json]

speed: the teacher's body and chunked head with nothing kept against labelling of each kind, and reading against training from
what was read; each contender in a process of its own, rounds alternating, medians. NAME is a built-in, a folder or a GGUF file;
without it, the random Llama of 25.3M parameters and vocabulary 32,000 that recovery.py uses.

noise: at the start, middle and end of a recovery (the student is the teacher without a third of its layers, trained meanwhile),
over full-parameter gradients of steps of --batch-tokens: the variance of the minibatch gradient (between steps), the variance that
a sample adds to it, the angle between the sample's gradient and the exact one, for several numbers of draws and for the likeliest
ids at as many bytes as those; and how far the mean over many samples is from the exact gradient, in units of its own noise.

bytes: what a run reads of a cache whose shards are not in the system's memory when it makes sure that a training of a twentieth
of the cache's blocks, in random order, lacks nothing, and then trains: bytes of records that were checksummed, and bytes that
came from the disk (pages of the cache's files that are in memory afterwards), beside those of the records that it needs.
"""

import argparse
import gzip
import json
import math
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

KINDS = ("nothing", "sampled", "top_k", "hidden")
STUDENT_SHARE = 2 / 3


def blocks_of(options, tokenizer, vocabulary, count):
    """Blocks of the text; of random ids without one."""
    import torch

    from cascade.data.blocks import TokenBlocks
    from cascade.data.packing import pack_documents

    if not options.text:
        ids = torch.randint(3, vocabulary, (count, options.block_size), generator=torch.Generator().manual_seed(0))
        return TokenBlocks(ids, ids, 3.0)
    if options.text == "stdlib":
        from cascade.data.sources import TextData, read_documents

        texts = read_documents(TextData("stdlib", {}), "train")
    else:
        with gzip.open(options.text, "rt") as file:
            texts = [json.loads(line)["text"] for line, _ in zip(file, range(20_000), strict=False)]
    return pack_documents(texts, tokenizer, block_size=options.block_size, max_blocks=count)


def loaded(options):
    """(teacher, tokenizer)"""
    if options.model:
        from cascade.models.checkpoint.load import load_model, load_tokenizer, resolve_model

        source = resolve_model(options.model)
        return load_model(source).requires_grad_(False), load_tokenizer(source)
    sys.path.insert(0, str(Path(__file__).parent))
    import recovery

    return recovery.models()[0], None


def opened(folder, teacher, layout):
    from cascade.teacher.targets.keys import open_windows

    return open_windows(folder, teacher, None, layout)


def layout_of(kind, config, draws=38):
    from cascade.teacher.targets.record import Layout

    how = {
        "sampled": {"draws": draws},
        "top_k": {"top_k": 16},
        "hidden": {"hidden_size": config.hidden_size, "dtype": "bfloat16"},
    }
    return Layout(kind, config.vocab_size, **how[kind])


def measure_labelling(options, kind):
    """tokens/s of labelling `kind`; 'nothing': the body, and the head chunk by chunk, thrown away."""
    import torch

    from cascade.distillation.losses.fused import chunk_rule, raw_logits
    from cascade.models.architecture.head import head_of, last_hidden
    from cascade.teacher.targets.label import label

    teacher, tokenizer = loaded(options)
    blocks = blocks_of(options, tokenizer, teacher.config.vocab_size, options.blocks)
    group = max(1, 2048 // options.block_size)

    @torch.no_grad()
    def nothing():
        buffers = [torch.empty(0)]
        for rows in torch.arange(len(blocks)).split(group):
            hidden = last_hidden(teacher, input_ids=blocks.input_ids[rows], use_cache=False)[:, :-1]
            head = head_of(teacher)
            for one in hidden:
                for part in one.split(chunk_rule(len(one), len(head.weight), one.device)):
                    raw_logits(part, head, buffers, 0)

    times = []
    for _ in range(2):  # the first also warms up
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            if kind == "nothing":
                nothing()
            else:
                layout = layout_of(kind, teacher.config)
                label(opened(folder, teacher, layout), layout, teacher, blocks)
            times.append(time.perf_counter() - started)
    return {"tokens_per_s": len(blocks) * options.block_size / times[-1]}


def measure_reading(options, kind):
    """tokens/s of reading `kind` in steps of 8 blocks in random order, and of training a student from it."""
    import torch

    from cascade.distillation.supervision import Supervision
    from cascade.distillation.trainer import distill
    from cascade.models.architecture.head import Head, head_of
    from cascade.teacher.targets.label import label
    from cascade.teacher.targets.reader import CachedTargets

    teacher, tokenizer = loaded(options)
    blocks = blocks_of(options, tokenizer, teacher.config.vocab_size, options.blocks)
    layout = layout_of(kind, teacher.config)
    with tempfile.TemporaryDirectory() as folder:
        windows = opened(folder, teacher, layout)
        label(windows, layout, teacher, blocks)
        head = Head(head_of(teacher).weight.detach(), None) if kind == "hidden" else None
        targets = CachedTargets(windows, layout, blocks, head)
        order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0))
        for _ in range(2):
            started = time.perf_counter()
            for rows in order.split(8):
                targets.read(rows)
            read = time.perf_counter() - started
        student = without_layers(teacher)
        metrics = distill(
            student,
            None,
            blocks,
            num_tokens=len(blocks) * options.block_size // 2,
            supervision=Supervision(targets=targets),
        )
        held = sum(len(windows.read(key)) for key in windows.keys()) / (len(windows) * (options.block_size - 1))
    rate = len(blocks) * options.block_size / read
    return {
        "tokens_per_s": rate,
        "training_tokens_per_s": metrics.num_tokens / metrics.seconds,
        "times_training": rate / (metrics.num_tokens / metrics.seconds),
        "bytes_per_token": held,
    }


def measure_bytes(options, kind):
    """Bytes of a cache, of the records that a training of a twentieth of it needs, and those that are read for it."""
    import torch

    from cascade.models.architecture.head import Head, head_of
    from cascade.pipeline.kept_targets import TeacherCache
    from cascade.teacher.targets import shards
    from cascade.teacher.targets.keys import window_keys
    from cascade.teacher.targets.label import label

    shards.MAX_SHARD_BYTES = 1 << 20
    teacher, tokenizer = loaded(options)
    blocks = blocks_of(options, tokenizer, teacher.config.vocab_size, options.blocks)
    layout, checksum, checked = layout_of(kind, teacher.config), shards._checksum, []
    with tempfile.TemporaryDirectory(dir=options.folder or None) as folder:
        windows = opened(folder, teacher, layout)
        label(windows, layout, teacher, blocks)
        rows = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0))[: len(blocks) // 20]
        needed = sum(len(windows.read(key)) for key in window_keys(blocks.rows(rows)))
        root, cache = windows.root, windows.folder
        del windows
        files = list(cache.iterdir())
        for file in files:
            forget(file)

        def counted(root, key, record):
            checked.append(len(record))
            return checksum(root, key, record)

        shards._checksum = counted
        windows = shards.Windows(cache, root).refresh()
        targets = TeacherCache(windows, layout, "").targets(teacher, blocks, rows.sort().values)
        if kind == "hidden":
            targets.head = Head(head_of(teacher).weight.detach(), None)
        for step in rows.split(8):
            targets.read(step)
        return {
            "cache_bytes": sum(file.stat().st_size for file in files),
            "needed_bytes": needed,
            "checksummed_bytes": sum(checked),
            "bytes_from_disk": sum(in_memory(file) for file in files),
        }


def forget(path):
    """Drop a file's pages from the system's memory."""
    import os

    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def in_memory(path):
    """Bytes of a file that are in the system's memory."""
    command = ["fincore", "--bytes", "--noheadings", "--output", "RES", str(path)]
    return int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout or 0)


def without_layers(teacher):
    """A trainable copy with two thirds of the layers, the middle ones left out."""
    import copy

    import torch

    student = copy.deepcopy(teacher).requires_grad_(True)
    layers = student.model.layers
    kept = max(1, round(len(layers) * STUDENT_SHARE))
    first = kept // 2
    student.model.layers = torch.nn.ModuleList([*layers[:first], *layers[len(layers) - (kept - first) :]])
    for place, layer in enumerate(student.model.layers):
        layer.self_attn.layer_idx = place
    student.config.num_hidden_layers = kept
    return student.train()


def gradient(student, batch, teacher=None):
    """All parameters' gradients of a step's mean loss, as one vector."""
    import torch

    from cascade.distillation.losses.batch import FORWARD_KL, batch_losses

    parts = [batch_losses(student, teacher, one, FORWARD_KL, keep=False).fused.loss for one in batch.split(8)]
    weights = [weight for weight in student.parameters() if weight.requires_grad]
    total = 0
    for part in parts:
        found = torch.autograd.grad(part, weights, retain_graph=False, allow_unused=True)
        total = total + torch.cat([one.flatten() for one in found if one is not None])
    return total / batch.num_counted()


def angle(one, other):
    """Degrees between two vectors; summed in float64, as float32 sums of 10^8 products are not good enough."""
    dots = [0.0, 0.0, 0.0]
    for a, b in zip(one.split(1 << 20), other.split(1 << 20), strict=True):
        a, b = a.double(), b.double()
        dots = [dots[0] + float(a @ b), dots[1] + float(a @ a), dots[2] + float(b @ b)]
    return math.degrees(math.acos(max(-1.0, min(1.0, dots[0] / math.sqrt(dots[1] * dots[2])))))


def measure_noise(options):
    """The table of noise, at three places of a recovery."""
    from dataclasses import replace

    import torch

    from cascade.distillation.options import Optimization
    from cascade.distillation.trainer import distill
    from cascade.teacher.targets.label import label
    from cascade.teacher.targets.reader import CachedTargets

    teacher, tokenizer = loaded(options)
    steps = options.steps
    size = max(1, options.batch_tokens // options.block_size)
    blocks = blocks_of(options, tokenizer, teacher.config.vocab_size, size * steps + options.train_blocks)
    student, done = without_layers(teacher), 0
    forms = [("sampled", draws) for draws in (12, 25, 38, 50)] + [("top_k", 0)]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        own = blocks.rows(torch.arange(size * steps))
        readers = {}
        for kind, draws in forms[:-1]:
            layout = layout_of(kind, teacher.config, draws)
            windows = opened(folder, teacher, layout)
            label(windows, layout, teacher, own)
            readers[kind, draws] = CachedTargets(windows, layout, own), bytes_per_token(windows, options)
        wanted = readers["sampled", 38][1]
        # The likeliest ids at as many bytes: 2 a log-probability, the statistics as they are there.
        k = next(
            k for k in range(64, 0, -1) if k * (2 + (2 + math.log2(teacher.config.vocab_size / k)) / 8) + 4 <= wanted
        )
        layout = replace(layout_of("top_k", teacher.config), top_k=k)
        windows = opened(folder, teacher, layout)
        label(windows, layout, teacher, own)
        readers["top_k", 0] = CachedTargets(windows, layout, own), bytes_per_token(windows, options)
        for place, until in (("start", 0), ("middle", 0.5), ("end", 1.0)):
            tokens = round(options.train_blocks * options.block_size * until) - done
            if tokens > 0:
                train = blocks.rows(torch.arange(size * steps, len(blocks)))
                position = done // options.block_size
                distill(
                    student,
                    teacher,
                    train,
                    num_tokens=tokens,
                    optimization=Optimization(learning_rate=options.learning_rate, first_position=position),
                )
                done += tokens
            student.eval()
            batches = [torch.arange(step * size, (step + 1) * size) for step in range(steps)]
            exact = [gradient(student, own.rows(one), teacher) for one in batches]
            mean = sum(exact) / steps
            minibatch = sum(float((one - mean).square().sum()) for one in exact) / (steps - 1)
            for form in forms:
                reader, held = readers[form]
                added, angles, together = 0.0, [], torch.zeros_like(mean)
                for one, true in zip(batches, exact, strict=True):
                    found = gradient(student, replace(own.rows(one), known=reader.of(one)))
                    angles.append(angle(true, found))
                    added += float((found - true).square().sum()) / steps
                    # The mean error over all steps: noise shrinks with their number, bias does not.
                    together += (found - true) / steps
                noise = math.sqrt(added / steps)
                rows.append(
                    {
                        "place": place,
                        "targets": f"{form[0]} {form[1] or k}",
                        "bytes_per_token": held,
                        "of_minibatch_variance": added / minibatch,
                        "angle_degrees": statistics.median(angles),
                        "mean_error_of_noise": float(together.norm()) / noise,
                        "angle_of_all_steps": angle(mean, mean + together),
                    }
                )
    return rows


def bytes_per_token(windows, options):
    """As they lie in the shards, without tables."""
    return sum(len(windows.read(key)) for key in windows.keys()) / (len(windows) * (options.block_size - 1))


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "noise", "bytes"))
    parser.add_argument("--model", default="")
    parser.add_argument("--text", default="", help="a JSONL.gz file with a field `text`, or stdlib; random ids without")
    parser.add_argument("--block-size", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=48, help="speed: blocks to label and read")
    parser.add_argument("--folder", default="", help="bytes: where the cache lies meanwhile; a real disk")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-tokens", type=int, default=1024, help="noise: of a step")
    parser.add_argument("--steps", type=int, default=8, help="noise: steps whose gradients are taken")
    parser.add_argument("--train-blocks", type=int, default=64, help="noise: of the recovery")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        what, kind = options.contender.split(":")
        print(json.dumps((measure_labelling if what == "label" else measure_reading)(options, kind)))
        return
    conditions = {"device": platform.machine(), "dtype": "float32", "model": options.model or "random, 25.3M, 32,000",
                  "text": options.text or "random ids", "block_size": options.block_size}  # fmt: skip
    if options.what == "noise":
        rows = measure_noise(options)
    elif options.what == "bytes":
        rows = [{"name": kind} | measure_bytes(options, kind) for kind in KINDS[1:]]
    else:
        names = [f"label:{kind}" for kind in KINDS] + [f"read:{kind}" for kind in KINDS[1:]]
        seen = {name: [] for name in names}
        for _ in range(options.rounds):
            for name in names:
                command = [sys.executable, *sys.argv, "--contender", name]
                output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
                seen[name].append(json.loads(output.splitlines()[-1]))
        rows = [
            {"name": name} | {key: statistics.median(one[key] for one in found) for key in found[0]}
            for name, found in seen.items()
        ]
        for row in rows:
            if row["name"].startswith("label:"):
                row["of_nothing_kept"] = row["tokens_per_s"] / rows[0]["tokens_per_s"]
    if options.json:
        print(json.dumps({"conditions": conditions, "rows": rows}))
        return
    print(conditions)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for row in rows:
        cells = [row.get(key, "") for key in columns]
        print("| " + " | ".join(f"{one:.4g}" if isinstance(one, float) else str(one) for one in cells) + " |")


if __name__ == "__main__":
    main()
