"""Whether a checkpoint holds exactly the weights of its config.json: by names and shapes, from headers alone.

Names are translated as transformers does, so that every reader takes the same tensor for a parameter. A tensor that
does not fit is refused; what transformers leaves out on purpose, or computes, is left out and reported.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from cascade.models.architecture.model_class import build_on_meta, is_body
from cascade.models.checkpoint.tensor_file import Entry, checkpoint_entries
from cascade.models.checkpoint.weight_files import equal_values, listed_names
from cascade.runtime.errors import UserError

_COMPUTED = tuple(
    re.compile(pattern) for pattern in (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", r"\.relative_position_index$")
)
_CAUSAL_MASK = re.compile(r"\.(attn|attention)(\.attention)?\.(bias|masked_bias)$")
_MULTI_TOKEN = re.compile(r"(^|\.)mtp(_\w+)?\.")
_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)\.")
_TASKS = (
    "PRETRAINING",
    "CAUSAL_LM",
    "MASKED_LM",
    "SEQUENCE_CLASSIFICATION",
    "TOKEN_CLASSIFICATION",
    "QUESTION_ANSWERING",
    "MULTIPLE_CHOICE",
    "NEXT_SENTENCE_PREDICTION",
    "IMAGE_CLASSIFICATION",
    "MASKED_IMAGE_MODELING",
)


@dataclass(frozen=True)
class WeightMatch:
    """The tensors of a checkpoint as the parameters of its model."""

    stored: dict[str, tuple[str, Entry]]
    """By the model's name of a parameter or buffer: its name in the checkpoint, and where; ordered as in the files."""
    notes: tuple[str, ...] = ()
    """A sentence for each group of tensors that are rightly not read or absent, with the reason."""
    left_out: frozenset[str] = frozenset()
    """Names of tensors that are not read, as they are stored and as transformers renames them."""
    absent: frozenset[str] = frozenset()
    """Names of parameters that the checkpoint rightly lacks: of a new head, of a pooler."""


def match_weights(folder: Path, config: Any, reference: str, *, new_head: bool = False) -> WeightMatch:
    """Each tensor of a checkpoint folder as the parameter that transformers makes of it.

    With `new_head` the head, and a pooler, may be absent or of another shape. Weights that are stored packed
    (quantised) match nothing here: transformers' own loading report says whether they fit.

    Raises:
        UserError: weights that the architecture does not read, or needs and does not find, or of other shapes; tied
            weights that differ.
    """
    if getattr(config, "quantization_config", None):
        return WeightMatch({})
    model: Any = build_on_meta(config)
    state = model.state_dict()
    stored, surplus, converted = _as_loaded(checkpoint_entries(folder), model, reference)
    copies = _tied_copies(stored, model, reference)
    reasons: dict[str, list[str]] = {"equal copies of tied weights": copies} if copies else {}
    absent: set[str] = set()
    for name in () if converted else _lacking(stored, model):
        reason = _reason_to_lack(name, model, config, new_head=new_head)
        if reason:
            absent.add(name)
            reasons.setdefault(reason, []).append(name)
    left_out: set[str] = set()
    for name, (loaded, reason) in _reasons_to_leave_out(surplus, model, config).items():
        if reason:
            left_out |= {name, loaded}
            reasons.setdefault(reason, []).append(name)
    differing = {
        name: (entry.shape, tuple(state[name].shape))
        for name, (_, entry) in stored.items()
        if entry.shape != tuple(state[name].shape) and not (new_head and _is_of_head(name, model))
    }
    unread = [name for name in surplus if name not in left_out]
    lacking = [] if converted else [name for name in _lacking(stored, model) if name not in absent]
    if unread or lacking or differing:
        raise UserError(_refusal(reference, config, type(model).__name__, unread, lacking, differing))
    notes = tuple(f"{reference}: {reason}: {listed_names(names)}" for reason, names in reasons.items())
    return WeightMatch(stored, notes, frozenset(left_out), frozenset(absent))


def _as_loaded(
    entries: dict[str, Entry], model: Any, reference: str
) -> tuple[dict[str, tuple[str, Entry]], dict[str, tuple[str, Entry]], bool]:
    """(tensors by the model's names, tensors that it has no name for, whether some are computed from several)."""
    state = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in mapping if isinstance(rule, WeightConverter)]
    stored: dict[str, tuple[str, Entry]] = {}
    surplus: dict[str, tuple[str, Entry]] = {}
    converted = False
    for name, entry in entries.items():
        loaded, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if loaded not in state and name in state:
            loaded, pattern = rename_source_key(name, [], [], model.base_model_prefix, state)
        if loaded not in state:
            surplus[name] = (loaded, entry)
        elif pattern is not None:
            converted = True
        elif loaded in stored:
            raise UserError(f"{reference}: '{name}' and '{stored[loaded][0]}' are both the weights of '{loaded}'")
        else:
            stored[loaded] = (name, entry)
    return stored, surplus, converted


def _tied_groups(model: Any) -> dict[str, list[str]]:
    """Names that share one weight, the first of them its owner."""
    groups: dict[str, list[str]] = {}
    for name, owner in model.all_tied_weights_keys.items():
        groups.setdefault(owner, [owner]).append(name)
    return groups


def _tied_copies(stored: dict[str, tuple[str, Entry]], model: Any, reference: str) -> list[str]:
    """Tensors that repeat the weight that they are tied to.

    Raises:
        UserError: a tensor differs from the weight that it is tied to.
    """
    copies = []
    for names in _tied_groups(model).values():
        present = [stored[name] for name in names if name in stored]
        for name, entry in present[1:]:
            if not equal_values(present[0][1], entry):
                raise UserError(
                    f"{reference}: config.json ties '{name}' to '{present[0][0]}', and the weights hold different "
                    "values for them; some readers take both, some only the first. If they belong to the model, write "
                    '"tie_word_embeddings": false into config.json; if not, remove the tensor'
                )
            copies.append(name)
    return copies


def _lacking(stored: dict[str, tuple[str, Entry]], model: Any) -> list[str]:
    """Names of the model that no tensor of the checkpoint fills, not even through a tie."""
    filled = set(stored)
    for names in _tied_groups(model).values():
        if filled & set(names):
            filled |= set(names)
    return sorted(model.state_dict().keys() - filled)


def _reason_to_lack(name: str, model: Any, config: Any, *, new_head: bool) -> str:
    """The reason why a checkpoint may lack a weight; empty where it may not."""
    if any(re.search(pattern, name) for pattern in model._keys_to_ignore_on_load_missing or ()):
        return "absent, as its class allows"
    if new_head and _is_of_head(name, model):
        return "absent or of another task, made anew"
    if any(pattern.search(name) for pattern in _COMPUTED):
        return "absent, as they are computed from config.json"
    if "pooler." in name and (new_head or is_body(config)):
        return "an absent pooler, whose weights are random"
    return ""


def _reasons_to_leave_out(surplus: dict[str, tuple[str, Entry]], model: Any, config: Any) -> dict[str, tuple[str, str]]:
    """Tensor -> (its name after renaming, the reason why it need not be read) for those without a name in the model."""
    reasons = {
        name: (loaded, _reason_to_leave_out(loaded, entry, model, config)) for name, (loaded, entry) in surplus.items()
    }
    open_names = [name for name, (_, reason) in reasons.items() if not reason]
    heads = set(_names_of_heads(config)) if open_names else set()
    for name in open_names:
        if reasons[name][0] in heads:
            reasons[name] = (reasons[name][0], "not read, as they are a head of another task")
    return reasons


def _reason_to_leave_out(loaded: str, entry: Entry, model: Any, config: Any) -> str:
    """The reason why a tensor need not be read; empty where it must be."""
    if any(re.search(pattern, loaded) for pattern in model._keys_to_ignore_on_load_unexpected or ()):
        return "not read, as its class ignores them"
    buffers = {buffer for buffer, _ in model.named_buffers()}
    kinds = [pattern for pattern in _COMPUTED if any(pattern.search(buffer) for buffer in buffers)]
    mask = _CAUSAL_MASK.search(loaded) and len(entry.shape) in (0, 4)
    if loaded in buffers or mask or any(pattern.search(loaded) for pattern in kinds):
        return "not read, as they are computed from config.json"
    extra = int(getattr(config, "num_nextn_predict_layers", None) or 0)
    layers = int(getattr(config, "num_hidden_layers", None) or 0)
    number = _LAYER.search(loaded)
    if _MULTI_TOKEN.search(loaded) or (number and layers <= int(number[1]) < layers + extra):
        return "not read, as they predict more than one token"
    return ""


def _is_of_head(name: str, model: Any) -> bool:
    """Whether a weight lies outside the body."""
    return not name.startswith(f"{model.base_model_prefix}.")


def _names_of_heads(config: Any) -> Iterator[str]:
    for task in _TASKS:
        known = getattr(transformers, f"MODEL_FOR_{task}_MAPPING")
        if type(config) not in known:
            continue
        kinds = known[type(config)]
        for kind in kinds if isinstance(kinds, tuple) else (kinds,):
            head = _built(kind, config)
            if head is not None:
                yield from (name for name in head.state_dict() if _is_of_head(name, head))


def _built(kind: Any, config: Any) -> PreTrainedModel | None:
    """A model of the class without memory for weights; None where the class cannot be built from this config."""
    try:
        with torch.device("meta"):
            model: PreTrainedModel = kind(config)
    except Exception:  # any architecture's constructor: a head that cannot be built explains no weights
        return None
    return model


def _refusal(
    reference: str,
    config: Any,
    kind: str,
    unread: list[str],
    lacking: list[str],
    differing: dict[str, tuple[tuple[int, ...], tuple[int, ...]]],
) -> str:
    shapes = [f"{name} {here} where config.json asks for {there}" for name, (here, there) in differing.items()]
    parts = {
        "it does not read": unread,
        "the checkpoint lacks": lacking,
        "another shape has": shapes,
    }
    differences = "; ".join(f"{what} {listed_names(names)}" for what, names in parts.items() if names)
    layers = getattr(config, "num_hidden_layers", None)
    numbers = [int(layer[1]) for name in unread if (layer := _LAYER.search(name))]
    remedy = "Put the config.json beside the weights that they were saved with, or save the model again"
    if isinstance(layers, int) and numbers and max(numbers) >= layers:
        remedy = (
            f"config.json says num_hidden_layers: {layers}, the weights have {max(numbers) + 1} layers; correct the "
            "one that is wrong"
        )
    return f"{reference}: its weights are not those of its config.json ({kind}); {differences}. {remedy}"
