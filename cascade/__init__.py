"""One command turns one language model into a family of smaller ones.

The stages, importable one by one; torch is imported only when one of them is asked for.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "collect_statistics": "cascade.importance.statistics",
    "offloaded": "cascade.importance.offload",
    "score_importance": "cascade.importance.scores",
    "plan_pruning": "cascade.pruning.choose",
    "solve_shape": "cascade.pruning.shape",
    "Target": "cascade.pruning.target",
    "fit_decode_latency": "cascade.pruning.latency",
    "prune": "cascade.pruning.cut",
    "prune_on_disk": "cascade.pruning.stream",
    "prove_cuts": "cascade.pruning.proof",
    "repair": "cascade.pruning.repair",
    "Repair": "cascade.pruning.repair",
    "distill": "cascade.distillation.trainer",
    "find_learning_rate": "cascade.distillation.range_test",
    "label": "cascade.cache.label",
    "open_windows": "cascade.cache.keys",
    "Layout": "cascade.cache.record",
    "CachedTargets": "cascade.cache.reader",
    "Objective": "cascade.distillation.options",
    "Schedule": "cascade.distillation.schedule",
    "Features": "cascade.distillation.options",
    "FeatureLoss": "cascade.distillation.features",
    "Supervision": "cascade.distillation.supervision",
    "Selection": "cascade.distillation.supervision",
    "Optimization": "cascade.distillation.options",
    "Execution": "cascade.distillation.options",
    "Safekeeping": "cascade.distillation.options",
    "Hooks": "cascade.distillation.options",
    "origin_of": "cascade.pruning.origin",
    "OnPolicy": "cascade.distillation.options",
    "fused_loss": "cascade.distillation.fused",
    "evaluate": "cascade.evaluation.evaluate",
    "TaskOptions": "cascade.evaluation.task_options",
    "HarnessOptions": "cascade.evaluation.task_options",
    "load_recipe": "cascade.recipe.load",
    "run_recipe": "cascade.run",
    "run_experiment": "cascade.experiment",
    "load_model": "cascade.models.checkpoint",
    "load_tokenizer": "cascade.models.checkpoint",
    "resolve_model": "cascade.models.checkpoint",
    "save_checkpoint": "cascade.models.checkpoint",
    "pack_documents": "cascade.data.blocks",
    "framing_of": "cascade.data.framing",
    "choose_framing": "cascade.evaluation.framing",
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
