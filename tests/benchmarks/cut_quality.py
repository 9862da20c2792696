"""How good is the cut: scores, rotation, repair and searched shape side by side, before and after short recoveries.

    python tests/benchmarks/cut_quality.py --model builtin:pico-python [--results rows.jsonl] [--json]
    python tests/benchmarks/cut_quality.py --model PATH/stories260K --data PATH/tinystories [--block-size 256]

Each row cuts the parent to a share of its parameters, all methods to the same shape (rotation unties the embeddings, so
its own; the search looks among shapes for both), and reports held-out loss and KL to the parent in nats per token: as cut, and after recovery on each of the
token budgets. Choices (repair, searched shape) are made on selection text. With --results, finished rows are kept and
a stopped run goes on.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

METHODS = ("magnitude", "minitron", "pca", "searched")


def main() -> None:
    """One process per row; prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", help="stdlib, or a folder with train.jsonl.gz and valid.jsonl.gz")
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.75, 0.5, 0.25])
    parser.add_argument("--budgets", type=int, nargs="*", default=[25_000, 100_000])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--calibration-blocks", type=int, default=64)
    parser.add_argument("--heldout-blocks", type=int, default=128)
    parser.add_argument("--microbatch-size", type=int, default=8)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--row", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.data is None and options.model != "builtin:pico-python":
        parser.error("--data is missing: figures of a model depend on the text")
    options.data = options.data or "stdlib"
    if options.row:
        print(json.dumps(measure(options, options.row[0], float(options.row[1]), options.row[2] == "repaired")))
        return
    rows = [json.loads(line) for line in options.results.read_text().splitlines()] if has(options.results) else []
    known = {(row["model"], row["share"], row["method"], row["repaired"]) for row in rows}
    for share in options.shares:
        for method in options.methods:
            for repaired in (False, True) if method != "searched" else (True,):
                if (options.model, share, method, repaired) in known:
                    continue
                command = [sys.executable, __file__, *sys.argv[1:], "--row", method, str(share)]
                command.append("repaired" if repaired else "sliced")
                output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
                rows.append(json.loads(output.splitlines()[-1]))
                if options.results:
                    with options.results.open("a") as file:
                        file.write(json.dumps(rows[-1]) + "\n")
    rows = [row for row in rows if row["model"] == options.model]
    conditions = {
        "device": platform.machine(),
        "dtype": "float32",
        "block_size": options.block_size,
        "text": options.data,
    }
    if options.json:
        print(json.dumps({"conditions": conditions, "rows": rows}))
        return
    budgets = [0, *options.budgets]
    print(f"{options.model}, held-out loss / KL to the parent after 0 and N tokens of recovery; {conditions}")
    print("| share | method | repaired | shape | " + " | ".join(f"{budget:,} tokens" for budget in budgets) + " |")
    print("|---|---|---|---|" + "---|" * len(budgets))
    for row in rows:
        cells = [f"{row['loss'][str(b)]:.3f} / {row['kl'][str(b)]:.3f}" for b in budgets if str(b) in row["loss"]]
        shape = "x".join(map(str, row["shape"]))
        print(f"| {row['share']:.0%} | {row['method']} | {row['repaired']} | {shape} | " + " | ".join(cells) + " |")


def has(path: Path | None) -> bool:
    """Whether there are earlier results."""
    return path is not None and path.exists()


def measure(options: argparse.Namespace, method: str, share: float, repaired: bool) -> dict:
    """One row."""
    import copy

    import torch

    from cascade.data.packing import pack_documents
    from cascade.data.sources import TextData, read_documents
    from cascade.distillation.losses.batch import selection_losses
    from cascade.distillation.options import Execution, Optimization
    from cascade.distillation.trainer import distill
    from cascade.evaluation.heldout import heldout_blocks, heldout_report
    from cascade.models.architecture.axes import probe_axes
    from cascade.models.checkpoint.load import load_model, load_tokenizer, resolve_model
    from cascade.pruning.choose import plan_pruning
    from cascade.pruning.cut import prune
    from cascade.pruning.importance.scores import score_importance
    from cascade.pruning.importance.statistics import collect_statistics
    from cascade.pruning.repair.refit import Repair, repair
    from cascade.pruning.rotation import untied
    from cascade.pruning.size.shape import diverse_shapes, solve_shape
    from cascade.pruning.size.target import Target

    source = resolve_model(options.model)
    teacher, tokenizer = load_model(source), load_tokenizer(source)
    folder = Path(options.data)
    data = TextData("stdlib", {})
    if options.data != "stdlib":
        files = {"train": (str(folder / "train.jsonl.gz"),), "heldout": (str(folder / "valid.jsonl.gz"),)}
        data = TextData("files", files)

    def blocks(split: str, limit: int | None = None):
        texts = read_documents(data, split)
        return pack_documents(texts, tokenizer, block_size=options.block_size, max_blocks=limit)

    train = blocks("train", max(options.budgets, default=0) // options.block_size + 9)
    calibration = blocks("calibration").take(options.calibration_blocks)
    selection = blocks("selection").take(options.calibration_blocks // 2)
    heldout = heldout_blocks(data, tokenizer, block_size=options.block_size, max_blocks=options.heldout_blocks)
    kinds = {"pca": ("pca",), "searched": ("activation_norm", "pca")}.get(method, ("activation_norm",))
    statistics = collect_statistics(teacher, calibration, covariance_blocks=16 if "pca" in kinds else 0)
    scores = {kind: score_importance(statistics, hidden=kind) for kind in kinds}
    if method == "magnitude":
        scores = {"activation_norm": magnitudes(teacher)}
    configs = {kind: untied(teacher.config) if kind == "pca" else teacher.config for kind in kinds}
    target = Target(params=share)

    def student_of(kind, dims):
        plan = plan_pruning(scores[kind], teacher.config, dims, statistics=statistics)
        student = prune(teacher, plan)
        if not repaired:
            return student
        tried = [student]
        for how in (Repair(), Repair(sequential=False)):
            tried.append(prune(teacher, plan))
            repair(tried[-1], teacher, plan, calibration, how)
        return min(tried, key=selection_kl)

    def selection_kl(model) -> float:
        return selection_losses(model, teacher, selection, 8)["selection_kl"]

    def recovered(student, tokens: int):
        student = copy.deepcopy(student)
        distill(
            student,
            teacher,
            train,
            num_tokens=tokens,
            optimization=Optimization(learning_rate=options.learning_rate),
            execution=Execution(microbatch_size=options.microbatch_size),
        )
        return student

    started = time.perf_counter()
    if method == "searched":
        shapes = [
            (kind, dims)
            for kind in kinds
            for dims in diverse_shapes(configs[kind], target, parent=teacher.config, count=5)
        ]
        ranked = sorted(((selection_kl(student_of(*shape)), shape) for shape in shapes), key=lambda pair: pair[0])
        final = [(selection_kl(recovered(student_of(*shape), 25_000)), shape) for _, shape in ranked[:3]]
        kind, dims = min(final, key=lambda pair: pair[0])[1]
    else:
        kind = kinds[0]
        dims = solve_shape(configs[kind], target, parent=teacher.config)
    start = student_of(kind, dims)
    cut_seconds = time.perf_counter() - started
    row = {
        "model": options.model,
        "share": share,
        "method": method,
        "hidden": kind,
        "repaired": repaired,
        "shape": [dims.num_hidden_layers, dims.hidden_size, dims.intermediate_size, dims.num_attention_heads],
        "num_parameters": int(probe_axes(configs[kind]).num_parameters(dims)),
        "cut_seconds": cut_seconds,
        "threads": torch.get_num_threads(),
        "loss": {},
        "kl": {},
    }
    for tokens in [0, *options.budgets]:
        metrics = heldout_report(recovered(start, tokens) if tokens else start, teacher, heldout).metrics
        found = {metric.metric: metric.value for metric in metrics}
        row["loss"][str(tokens)], row["kl"][str(tokens)] = found["loss"], found["kl_to_teacher"]
    return row


def magnitudes(model):
    """Scores by torch-pruning's group magnitude, groups from the probed axes; a layer's is that of all its weights."""
    import torch
    import torch_pruning

    from cascade.models.architecture.sized import Sized
    from cascade.pruning.importance.gradients import group_of
    from cascade.pruning.importance.scores import Scores

    sized = Sized(model.config)
    axes, dims = sized.axes, sized.dims
    score = torch_pruning.importance.GroupMagnitudeImportance(p=2, group_reduction="sum", normalizer=None)
    depth = range(dims.num_hidden_layers)
    heads = torch.stack([score(group_of(model, axes, "num_attention_heads", layer)) for layer in depth])
    weights = dict(model.named_parameters())
    return Scores(
        layers=torch.tensor(
            [
                sum(float(w.detach().square().sum()) for n, w in weights.items() if axes.layer_of(n) == layer)
                for layer in depth
            ]
        ),
        heads=heads.view(len(depth), -1, dims.head_dim).sum(-1).float(),
        neurons=torch.stack([score(group_of(model, axes, "intermediate_size", layer)).float() for layer in depth]),
        hidden=score(group_of(model, axes, "hidden_size", None)).float(),
    )


if __name__ == "__main__":
    main()
