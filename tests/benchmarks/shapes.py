"""Which shape of a size recovers best, and what tells so beforehand: many shapes, each cut, repaired and recovered.

    python tests/benchmarks/shapes.py recipes/stories.yaml --share 0.35 --shape 4,48,80,4,2 --shape 3,48,120,4,2 ...
    python tests/benchmarks/shapes.py --fit recipes/experiments/results/shapes-stories260K.jsonl [MORE.jsonl ...]

A shape is layers, hidden size, intermediate size (0: the largest that fits the share), query heads, key/value heads;
`p` before it means a rotated stream with a head of its own. Each is cut from the recipe's parent and judged by KL to it
on selection text: as cut, repaired, after a tenth of the tokens and after all of them, with the recipe's optimizer
settings. --results keeps finished rows, and a stopped run goes on. --fit prints, for every file and size, the rank
correlation of each cheap criterion with the final KL, and the weights of `cascade.pruning.size.shape` that fit best.
"""

import argparse
import copy
import json
import tempfile
from pathlib import Path

import numpy as np

AXES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
POWER = 1.5


def main() -> None:
    """Rows of one recipe and size, or the fit of rows that are there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?")
    parser.add_argument("--fit", nargs="+", type=Path)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--share", type=float)
    parser.add_argument("--shape", action="append", default=[])
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--learning-rate", type=float, default=1.8e-2)
    parser.add_argument("--optimizer", default="muon")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--features", default="none")
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    if options.fit:
        fit(options.fit)
        return
    if not options.recipe or options.share is None or not options.shape:
        parser.error("give a recipe, --share and at least one --shape; or --fit")
    done = []
    if options.results and options.results.exists():
        done = [json.loads(line) for line in options.results.read_text().splitlines()]
    setting = Setting(options)
    if options.results and not done:
        options.results.write_text(json.dumps(setting.heading()) + "\n")
    for text in options.shape:
        row = setting.shape(text)
        if row is None:
            print(f"{text}: does not fit into {options.share:.0%} of the parent")
            continue
        if any(all(old.get(key) == row[key] for key in (*AXES, "rotated", "share", "tokens")) for old in done):
            continue
        row = setting.measure(row)
        print(json.dumps(row), flush=True)
        if options.results:
            with options.results.open("a") as file:
                file.write(json.dumps(row) + "\n")


class Setting:
    """A recipe's parent and text, and how shapes are judged."""

    def __init__(self, options: argparse.Namespace):
        from rich.console import Console

        from cascade.data.blocks import load_blocks
        from cascade.distillation.teacher_memory import remember
        from cascade.models.checkpoint.load import load_model
        from cascade.pipeline.prepare import make_parent, prepare
        from cascade.pipeline.runner import StageRunner
        from cascade.pipeline.stages.framing import framed
        from cascade.pruning.importance.statistics import collect_statistics
        from cascade.recipe.load import load_recipe
        from cascade.runtime.progress import RunProgress

        self.options = options
        recipe = load_recipe(options.recipe, [*options.set, "evaluate.tasks=[]", "evaluate.heldout_blocks=8"])
        with tempfile.TemporaryDirectory() as folder, RunProgress(Console(quiet=True), "shapes", {}) as progress:
            runner = StageRunner(Path(folder), progress)
            parent = make_parent(runner, recipe)
            recipe = framed(runner, recipe, parent)
            data = prepare(runner, recipe, parent).data.folder
            self.train, self.calibration, self.selection = (
                load_blocks(data / f"{split}.safetensors") for split in ("train", "calibration", "selection")
            )
        self.recipe, self.parent = recipe, parent
        self.selection = self.selection.take(64)
        self.teacher = remember(load_model(parent).float().requires_grad_(False))
        self.statistics = collect_statistics(
            self.teacher,
            self.calibration.take(recipe.calibration.num_blocks),
            batch_size=recipe.calibration.batch_size,
            covariance_blocks=-(-recipe.calibration.num_blocks // 4),
        )

    def heading(self) -> dict:
        """The first line of results: the parent's dims and how shapes are trained."""
        from cascade.models.architecture.dims import dims_of

        parent, options = dims_of(self.teacher.config), self.options
        settings = ("tokens", "learning_rate", "optimizer", "batch_size", "features")
        named = {"recipe": Path(options.recipe).name, "parent": {name: getattr(parent, name) for name in AXES}}
        return named | {name: getattr(options, name) for name in settings}

    def shape(self, text: str) -> dict | None:
        """The shape of a text as a row; None where it does not fit."""
        from cascade.models.architecture.sized import Sized
        from cascade.planning.family import shape_config

        rotated = text.startswith("p")
        config = shape_config(self.teacher.config, "pca" if rotated else "activation_norm")
        sized = Sized(config)
        axes, dims = sized.axes, sized.dims
        limit = self.options.share * Sized(self.teacher.config).num_parameters
        values = dict(zip(AXES, map(int, text.removeprefix("p").split(",")), strict=True))
        step = max(4, dims.intermediate_size // 43)
        widths = (
            [values["intermediate_size"]] if values["intermediate_size"] else range(dims.intermediate_size, 0, -step)
        )
        for width in widths:
            size = int(axes.num_parameters(dims.replace(**values | {"intermediate_size": width})))
            if size <= limit:
                row = values | {"intermediate_size": width, "rotated": rotated, "num_parameters": size}
                return row | {"share": self.options.share, "tokens": self.options.tokens}
        return None

    def measure(self, row: dict) -> dict:
        """The row with its KLs."""
        from cascade.models.architecture.dims import dims_of
        from cascade.planning.family import shape_config
        from cascade.pruning.choose import plan_pruning
        from cascade.pruning.cut import prune
        from cascade.pruning.importance.scores import score_importance
        from cascade.pruning.repair.refit import Repair, repair

        hidden, calibration = "pca" if row["rotated"] else "activation_norm", self.calibration.take(64)
        dims = dims_of(shape_config(self.teacher.config, hidden)).replace(**{name: row[name] for name in AXES})
        removed = dims_of(self.teacher.config).num_hidden_layers - dims.num_hidden_layers
        scores = score_importance(
            self.statistics, layers="block_influence", heads="activation_norm", neurons="activation_norm",
            hidden=hidden, model=self.teacher, blocks=calibration, num_removed=removed,
        )  # fmt: skip
        plan = plan_pruning(scores, self.teacher.config, dims, statistics=self.statistics, merge_heads=False)
        students = [prune(self.teacher, plan) for _ in range(3)]
        for student, how in zip(students[1:], (Repair(), Repair(sequential=False)), strict=True):
            repair(student, self.teacher, plan, calibration.take(32), how, batch_size=8)
        judged = [self.judge(student) for student in students]
        best = min(range(3), key=lambda number: judged[number]["kl"])
        tenth, whole = (self.recovered(students[best], plan, share) for share in (0.1, 1.0))
        kls = {"kl_cut": judged[0]["kl"], "kl_repaired": judged[best]["kl"], "kl_tenth": tenth["kl"]}
        return row | kls | whole

    def judge(self, student) -> dict:
        """KL to the parent and loss on selection text."""
        from cascade.distillation.losses.batch import selection_losses

        found = selection_losses(student, self.teacher, self.selection, 8)
        student.eval()
        return {"kl": round(found["selection_kl"], 5), "loss": round(found["selection_loss"], 5)}

    def recovered(self, start, plan, share: float) -> dict:
        """What a recovery on a share of the tokens comes to."""
        from cascade.distillation.losses.features import FeatureLoss
        from cascade.distillation.options import Execution, Features, Optimization
        from cascade.distillation.supervision import Supervision
        from cascade.distillation.trainer import distill
        from cascade.pruning.origin import origin_of

        options, student, features = self.options, copy.deepcopy(start), None
        if options.features != "none":
            features = FeatureLoss(Features(options.features), origin_of([plan]), student, self.teacher)
        distill(
            student,
            self.teacher,
            self.train,
            num_tokens=int(share * options.tokens),
            supervision=Supervision(features=features),
            optimization=Optimization(
                batch_size=options.batch_size,
                learning_rate=options.learning_rate * (1.0 if share == 1.0 else 2 / 3),
                optimizer=options.optimizer,
            ),
            execution=Execution(microbatch_size=options.batch_size, remember_teacher=True),
        )
        return self.judge(student)


def fit(paths: list[Path]) -> None:
    """Rank correlations by file and size, and the weights of all files' shapes without a rotation."""
    groups, features, targets = [], [], []
    for path in paths:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        parent = next(row["parent"] for row in rows if "parent" in row)
        rows = [row for row in rows if "kl" in row and not row["rotated"]]
        for share in sorted({row["share"] for row in rows}):
            part = [row for row in rows if row["share"] == share]
            number = len(groups)
            groups.append((path.stem, share, part))
            for row in part:
                lost = [np.log(parent[name] / row[name]) ** POWER for name in AXES]
                features.append((number, lost))
                targets.append(np.log(row["kl"]))
    table = np.array([[float(number == index) for index in range(len(groups))] + lost for number, lost in features])
    weights = np.linalg.lstsq(table, np.array(targets), rcond=None)[0]
    misses = table @ weights - np.array(targets)
    print(f"{len(targets)} shapes; log KL is missed by {np.sqrt(np.mean(misses**2)):.3f} (root of the mean square)")
    for name, weight in zip(AXES, weights[len(groups) :], strict=True):
        print(f"  {name}: {weight:.4f}, as a multiple of intermediate_size's {weight / weights[len(groups) + 2]:.2f}")
    print("rank correlation with the final KL:")
    for number, (name, share, part) in enumerate(groups):
        final = [row["kl"] for row in part]
        given = [table[index] @ weights for index, (group, _) in enumerate(features) if group == number]
        cheap = {key: [row[key] for row in part] for key in ("kl_cut", "kl_repaired", "kl_tenth")} | {"fit": given}
        shown = ", ".join(f"{key} {rank_correlation(value, final):.2f}" for key, value in cheap.items())
        print(f"  {name} at {share:.0%} ({len(part)} shapes, KL {min(final):.3f} to {max(final):.3f}): {shown}")


def rank_correlation(first: list[float], second: list[float]) -> float:
    """Spearman's, without ties."""
    ranks = [np.argsort(np.argsort(values)) for values in (first, second)]
    return float(np.corrcoef(*ranks)[0, 1]) if len(first) > 2 else float("nan")


if __name__ == "__main__":
    main()
