"""Whether a GGUF file is a whole model: all parts, and every tensor that the architecture needs."""

import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from cascade.models.architecture.model_class import build_on_meta
from cascade.models.checkpoint.weight_files import listed_names
from cascade.runtime.errors import UserError

_ROTARY = "rope_freqs.weight"
_PART = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")


def check_gguf(path: Path, config: Any, reference: str) -> tuple[str, ...]:
    """Notes about what the file holds and the model does not read.

    Raises:
        UserError: the file is one part of several, lacks a tensor of the architecture, or holds others.
        ImportError: the gguf package is not installed.
    """
    names, shares, all_ones, architecture = _contents(path, path.stat().st_mtime_ns)
    part = _PART.search(path.name)
    count = max(shares, int(part[1]) if part else 1)
    if count > 1:
        raise UserError(
            f"{reference}: is one part of a model in {count} GGUF files; join them first (llama-gguf-split --merge "
            "FIRST-PART OUTPUT.gguf) and give the whole file"
        )
    expected = _expected_names(config, architecture)
    if expected is None:
        return ()
    needed, allowed = expected
    lacking, unread = needed - names, names - allowed
    notes: list[str] = []
    if _ROTARY in unread & all_ones:  # other values would scale the positions, which config.json then does not say
        unread -= {_ROTARY}
        notes.append(f"{reference}: not read, as its values are all 1: {_ROTARY}")
    if lacking or unread:
        parts = {"the file lacks": lacking, "the model does not read": unread}
        differences = "; ".join(f"{what} {listed_names(named)}" for what, named in parts.items() if named)
        raise UserError(
            f"{reference}: its tensors are not those of its architecture ({type(config).__name__}); {differences}. Get "
            "the whole file again, or the model in safetensors"
        )
    return tuple(notes)


@lru_cache(maxsize=8)
def _contents(path: Path, changed_ns: int) -> tuple[frozenset[str], int, frozenset[str], str]:
    """(names of the tensors, number of the model's files, names of the tensors that are 1 everywhere, architecture)."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise UserError(f"{path}: cannot be read as GGUF: {error}; get the file again") from error
    count, architecture = reader.get_field("split.count"), reader.get_field("general.architecture")
    all_ones = frozenset(
        str(tensor.name)
        for tensor in reader.tensors
        if tensor.tensor_type.name == "F32" and len(tensor.shape) == 1 and bool((tensor.data == 1).all())
    )
    return (
        frozenset(str(tensor.name) for tensor in reader.tensors),
        1 if count is None else int(count.contents()),
        all_ones,
        "" if architecture is None else str(architecture.contents()),
    )


def _expected_names(config: Any, architecture: str) -> tuple[set[str], set[str]] | None:
    """The GGUF names of the parameters that must be there, and of those that may; None where gguf does not know them.

    The loading report of transformers then judges alone.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    known = {name: key for key, name in MODEL_ARCH_NAMES.items()}
    if architecture not in known:
        return None
    names = get_tensor_name_map(known[architecture], config.num_hidden_layers)
    model: Any = build_on_meta(config)
    tied = set(model.all_tied_weights_keys)
    needed, allowed = set[str](), set[str]()
    for name, _ in model.named_parameters(remove_duplicate=False):
        translated = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if translated is None:
            return None
        allowed.add(translated)
        if name not in tied:
            needed.add(translated)
    return needed, allowed
