"""One command turns one language model into a family of smaller ones.

The stages, importable one by one; torch is imported only when one of them is asked for.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "collect_statistics": "cascade.pruning.importance.statistics",
    "offloaded": "cascade.pruning.importance.offload",
    "score_importance": "cascade.pruning.importance.scores",
    "plan_pruning": "cascade.pruning.choose",
    "solve_shape": "cascade.pruning.size.shape",
    "Target": "cascade.pruning.size.target",
    "fit_decode_latency": "cascade.pruning.size.latency",
    "prune": "cascade.pruning.cut",
    "prune_on_disk": "cascade.pruning.cut_on_disk",
    "prove_cuts": "cascade.pruning.proof",
    "repair": "cascade.pruning.repair.refit",
    "Repair": "cascade.pruning.repair.refit",
    "distill": "cascade.distillation.trainer",
    "find_learning_rate": "cascade.distillation.range_test",
    "label": "cascade.teacher.targets.label",
    "open_windows": "cascade.teacher.targets.keys",
    "Layout": "cascade.teacher.targets.record",
    "CachedTargets": "cascade.teacher.targets.reader",
    "Objective": "cascade.distillation.options",
    "Schedule": "cascade.distillation.schedule",
    "Features": "cascade.distillation.options",
    "FeatureLoss": "cascade.distillation.losses.features",
    "Supervision": "cascade.distillation.supervision",
    "Selection": "cascade.distillation.supervision",
    "Lesson": "cascade.distillation.supervision",
    "Optimization": "cascade.distillation.options",
    "Execution": "cascade.distillation.options",
    "Safekeeping": "cascade.distillation.options",
    "Hooks": "cascade.distillation.options",
    "origin_of": "cascade.pruning.origin",
    "OnPolicy": "cascade.distillation.options",
    "fused_loss": "cascade.distillation.losses.fused",
    "evaluate": "cascade.evaluation.evaluate",
    "TaskOptions": "cascade.evaluation.tasks_lm_eval.task_options",
    "HarnessOptions": "cascade.evaluation.tasks_lm_eval.task_options",
    "load_recipe": "cascade.recipe.load",
    "run_recipe": "cascade.pipeline.run",
    "run_experiment": "cascade.pipeline.experiment.run",
    "load_model": "cascade.models.checkpoint.load",
    "load_tokenizer": "cascade.models.checkpoint.load",
    "resolve_model": "cascade.models.checkpoint.load",
    "save_checkpoint": "cascade.models.checkpoint.load",
    "pack_documents": "cascade.data.packing",
    "framing_of": "cascade.data.framing",
    "choose_framing": "cascade.evaluation.framing_test",
    "TokenBlocks": "cascade.data.blocks",
    "load_family": "cascade.report.records",
    "family_of": "cascade.report.records",
}

__all__ = ["__version__", *_WHERE]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'cascade' has no attribute '{name}'")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
