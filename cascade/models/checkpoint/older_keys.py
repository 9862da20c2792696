"""config.json as older readers understand it: the keys of transformers 4 beside those of transformers 5.

transformers 5 writes the rotary base and its scaling as `rope_parameters`, and `dtype`. transformers 4, vLLM and
llama.cpp's converter of that time look for `rope_theta`, `rope_scaling` and `torch_dtype`, and take their own defaults,
such as a base of 10,000, where these are missing: another model, without a word. transformers 5 reads the same config
from both.
"""

import json
from pathlib import Path
from typing import Any

from cascade.runtime.files import read_json

READ_BY = "transformers 4.53 and later"
"""The oldest version that read members and gave the same logits (`tests/models/test_older_readers.py`, nightly)."""

_THETA = {"gpt_neox": "rotary_emb_base", "gpt_neox_japanese": "rotary_emb_base"}
_PARTIAL = {"gpt_neox": "rotary_pct", "gpt_neox_japanese": "rotary_pct"}
_LOCAL_THETA = {"gemma3_text": "rope_local_base_freq", "gemma3n_text": "rope_local_base_freq"}
_BY_NAME = {"modernbert": ("global_rope_theta", "local_rope_theta")}
_OF_LAYERS = ("sliding_window_pattern", "global_attn_every_n_layers")
_BY_NAME["modernbert-decoder"] = _BY_NAME["modernbert"]


def add_older_keys(folder: Path) -> None:
    """Put the keys of older readers into the config.json that transformers has written to a folder."""
    path = folder / "config.json"
    values: dict[str, Any] = read_json(path)
    # What the parent's config said of its own order of layers need not hold for a cut one.
    together = {key: value for key, value in values.items() if key not in _OF_LAYERS} | older_keys(values)
    if together == values:
        return
    path.write_text(json.dumps(together, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def older_keys(values: dict[str, Any]) -> dict[str, Any]:
    """The keys that say of a config, written by transformers 5, what older readers look for."""
    keys: dict[str, Any] = {}
    if values.get("dtype"):
        keys["torch_dtype"] = values["dtype"]
    rope, model_type = values.get("rope_parameters"), str(values.get("model_type"))
    if isinstance(rope, dict) and rope:
        keys |= _by_layer_type(rope, model_type) if "full_attention" in rope else _plain(rope, model_type)
    kinds = values.get("layer_types") or []
    period = _period(kinds)
    if period and model_type in ("gemma3_text", "cohere2"):
        keys["sliding_window_pattern"] = period
    if model_type == "modernbert" and period is None:
        every = _every(kinds)
        keys |= {"global_attn_every_n_layers": every} if every else {}
    return keys


def _plain(rope: dict[str, Any], model_type: str) -> dict[str, Any]:
    """Of one set of rotary parameters for all layers."""
    keys: dict[str, Any] = {}
    if "rope_theta" in rope:
        keys[_THETA.get(model_type, "rope_theta")] = rope["rope_theta"]
    if "partial_rotary_factor" in rope:
        keys[_PARTIAL.get(model_type, "partial_rotary_factor")] = rope["partial_rotary_factor"]
    return keys | _scaling(rope, model_type)


def _by_layer_type(rope: dict[str, Any], model_type: str) -> dict[str, Any]:
    """Of rotary parameters that differ between layers of full and of sliding attention."""
    full, sliding = rope["full_attention"] or {}, rope.get("sliding_attention") or {}
    if model_type in _BY_NAME:
        return dict(zip(_BY_NAME[model_type], (full.get("rope_theta"), sliding.get("rope_theta")), strict=True))
    keys = {"rope_theta": full.get("rope_theta")} | _scaling(full, model_type)
    if model_type in _LOCAL_THETA:
        keys[_LOCAL_THETA[model_type]] = sliding.get("rope_theta")
    return {key: value for key, value in keys.items() if value is not None}


def _scaling(rope: dict[str, Any], model_type: str) -> dict[str, Any]:
    if rope.get("rope_type", "default") == "default":
        return {}
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
    if model_type == "phi3":  # whose older config class takes these three keys and no others
        scaling = {"type": scaling["rope_type"], **{key: scaling[key] for key in ("short_factor", "long_factor")}}
    return {"rope_scaling": scaling}


def _period(kinds: list[str]) -> int | None:
    """N where each n-th layer attends to everything and the others to a window; None for any other order."""
    full = [number for number, kind in enumerate(kinds, start=1) if kind == "full_attention"]
    if not full or len(full) == len(kinds):
        return None
    regular = all((number % full[0] == 0) == (kind == "full_attention") for number, kind in enumerate(kinds, start=1))
    return full[0] if regular else None


def _every(kinds: list[str]) -> int | None:
    """N where the first layer, and each n-th after it, attends to everything; None for any other order."""
    full = [number for number, kind in enumerate(kinds) if kind == "full_attention"]
    if not full or full[0] != 0 or len(full) == len(kinds):
        return None
    step = full[1] if len(full) > 1 else len(kinds)
    regular = all((number % step == 0) == (kind == "full_attention") for number, kind in enumerate(kinds))
    return step if regular else None
