"""Which model class a config belongs to, and which architectures are refused, each with what is missing."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    PreTrainedModel,
)

from cascade.runtime.errors import UserError

# Config keys that tell of units which nothing here can score or cut.
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts")
_STATES = ("state_size", "ssm_state_size", "mamba_d_state", "linear_num_value_heads", "lru_width", "rwkv_version")
_STATE_LAYERS = ("linear_attention", "mamba", "recurrent", "conv")


def model_class_of(config: Any) -> Any:
    """The transformers class that a config's `architectures` names; the causal language model where it names none.

    Raises:
        UserError: transformers has no such class.
    """
    for name in getattr(config, "architectures", None) or []:
        candidate: Any = getattr(transformers, name, None)
        # The name comes from a file: only a model class made for this very kind of config will do.
        if isinstance(candidate, type) and issubclass(candidate, PreTrainedModel):
            kind: Any = candidate
            if kind.config_class is type(config):
                return kind
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    raise UserError(
        f"model type '{config.model_type}' with architectures {getattr(config, 'architectures', None)}: "
        "transformers has no class for it without remote code"
    )


SINGLE_LABEL = "single_label_classification"

CLASSIFIERS = {
    "text_classification": ("ForSequenceClassification", MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING),
    "image_classification": ("ForImageClassification", MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING),
}
"""task -> how its classes' names end, and transformers' own list of them."""


def as_classifier(config: Any, task: str, classes: Sequence[str], place: str) -> Any:
    """The config with a head for these classes; changed in place.

    Raises:
        UserError: transformers has no such model of this type.
    """
    suffix, known = CLASSIFIERS[task]
    if type(config) not in known:
        raise UserError(
            f"{place}: transformers has no {suffix.removeprefix('For')} model of type '{config.model_type}'"
        )
    kind: Any = known[type(config)]
    config.architectures = [(kind[0] if isinstance(kind, tuple) else kind).__name__]
    if getattr(config, "problem_type", None) is not None:
        config.problem_type = SINGLE_LABEL  # what an earlier head was for
    config.id2label = dict(enumerate(classes))
    config.label2id = {name: number for number, name in enumerate(classes)}
    return config


def as_masked(config: Any, place: str) -> Any:
    """The config with a head that guesses hidden tokens; changed in place.

    Raises:
        UserError: transformers has no such model of this type.
    """
    if type(config) not in MODEL_FOR_MASKED_LM_MAPPING:
        raise UserError(f"{place}: transformers has no MaskedLM model of type '{config.model_type}'")
    config.architectures = [MODEL_FOR_MASKED_LM_MAPPING[type(config)].__name__]
    return config


def guesses(config: Any) -> bool:
    """Whether the config is that of a model that guesses hidden tokens."""
    return str((getattr(config, "architectures", None) or [""])[0]).endswith("ForMaskedLM")


def require_language(config: Any, place: str) -> None:
    """Refuse a model that does not predict the next token of a text.

    Raises:
        UserError: the model has another head, or none.
    """
    if is_classifier(config) or is_body(config) or guesses(config) or reads_images(config):
        raise UserError(
            f"{place}: {', '.join(config.architectures)} does not predict the next token; this command trains and "
            "measures language models. For other models, give a recipe with `task:` to `cascade run`"
        )


def require_masked(config: Any, place: str) -> None:
    """Refuse a model that does not guess hidden tokens.

    Raises:
        UserError: the model has another head or none, or sees only what stands before a token.
    """
    if not guesses(config):
        raise UserError(
            f"{place}: {', '.join(config.architectures or ['no architecture'])} has no head for hidden tokens; "
            "task: masked_language needs a ForMaskedLM model"
        )
    if getattr(config, "is_decoder", False):
        raise UserError(
            f"{place}: is_decoder: true: it guesses a hidden token by what stands before it alone; task: "
            "masked_language needs a model that reads both sides (is_decoder: false, if it was trained so)"
        )


def require_single_label(config: Any, task: str, place: str) -> None:
    """Refuse a classifier whose outputs are not the logits of classes of which a text, or an image, has exactly one.

    Raises:
        UserError: the classifier gives each class a probability of its own, or gives a number.
    """
    what = "image" if task == "image_classification" else "text"
    problem = getattr(config, "problem_type", None)
    if problem not in (None, SINGLE_LABEL):
        raise UserError(f"{place}: problem_type: {problem}; task {task} is for one class per {what}")
    if config.num_labels == 1:
        raise UserError(
            f"{place}: num_labels: 1, which is a number to transformers (regression); task {task} is for one class per "
            f"{what}, of two or more"
        )


def auto_class_of(config: Any) -> str:
    """The name of the transformers auto class with which a user loads such a model."""
    name = (getattr(config, "architectures", None) or [""])[0]
    if is_body(config):
        return "AutoModel"
    kinds = ("ForSequenceClassification", "ForImageClassification", "ForMaskedLM")
    return f"AutoModel{next((kind for kind in kinds if name.endswith(kind)), 'ForCausalLM')}"


def is_classifier(config: Any) -> bool:
    """Whether the config is that of a model with a head for classes."""
    names = getattr(config, "architectures", None) or [""]
    return any(names[0].endswith(suffix) for suffix, _ in CLASSIFIERS.values())


def is_body(config: Any) -> bool:
    """Whether the config is that of a model without any head, which gives hidden states."""
    kind: Any = MODEL_MAPPING[type(config)] if type(config) in MODEL_MAPPING else None
    classes = kind if isinstance(kind, tuple) else (kind,)
    names = [body_class.__name__ for body_class in classes if body_class is not None]
    return (getattr(config, "architectures", None) or [""])[0] in names


def require_body(config: Any, place: str) -> None:
    """Refuse a model that has a head.

    Raises:
        UserError: the model has a head, or reads images.
    """
    if not is_body(config) or reads_images(config):
        raise UserError(
            f"{place}: {', '.join(config.architectures or ['no architecture'])} is no encoder without a head; "
            "task: embedding takes one, such as BertModel"
        )


def reads_images(config: Any) -> bool:
    """Whether the model takes pixels instead of tokens."""
    return getattr(config, "vocab_size", None) is None and getattr(config, "image_size", None) is not None


def image_shape(config: Any) -> tuple[int, int, int]:
    """(channels, height, width) of the images that a model reads."""
    size = config.image_size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return int(config.num_channels), int(height), int(width)


def config_from_values(values: Mapping[str, Any], place: str) -> Any:
    """The transformers config of a `model_type` and its own keys.

    Raises:
        UserError: no or an unknown model_type, or values that its config class refuses; `place` is named.
    """
    rest = dict(values)
    model_type = rest.pop("model_type", None)
    if not isinstance(model_type, str):
        raise UserError(f"{place}: `model_type` is missing, such as llama")
    try:
        return AutoConfig.for_model(model_type, **rest)
    except Exception as error:  # transformers' strict dataclasses raise several unrelated classes
        raise UserError(f"{place}: {error}") from error


def own_names(model_type: str) -> dict[str, str]:
    """What a type of model calls some of the usual keys, such as n_positions for max_position_embeddings in GPT-2."""
    known: Any = CONFIG_MAPPING
    return dict(known[model_type].attribute_map) if model_type in known else {}


def model_from_config(config: Any, *, dtype: torch.dtype = torch.float32) -> Any:
    """A new model of the config, its weights as transformers initialises them; the config is left unchanged."""
    # _from_config writes the dtype into the config that it is given.
    return model_class_of(config)._from_config(copy.deepcopy(config), dtype=dtype)


def attends_causally(config: Any) -> bool:
    """Whether a token sees only what stands before it, as the model's attention says of itself."""
    flags = [module.is_causal for module in build_on_meta(config).modules() if hasattr(module, "is_causal")]
    return any(flags) if flags else not guesses(config)


def build_on_meta(config: Any) -> nn.Module:
    """The model of a config without memory for its weights."""
    with torch.device("meta"):
        model: nn.Module = model_from_config(config)
    return model


def require_supported(config: Any) -> None:
    """Refuse what has units of another kind than layers, heads, neurons and hidden channels.

    Raises:
        UserError: a mixture of experts, a state-space or convolutional layer, an encoder-decoder or a multimodal model.
    """
    values = config.to_dict()
    kind = f"model type '{config.model_type}'"
    experts = next((key for key in _EXPERTS if isinstance(values.get(key), int) and values[key] > 1), None)
    if experts is not None:
        raise UserError(
            f"{kind} is a mixture of experts ({experts} = {values[experts]}): scores and surgery for experts and their "
            "router are missing; only dense models can be cut"
        )
    state = next((key for key in _STATES if values.get(key)), None)
    layers = sorted({str(layer) for layer in values.get("layer_types") or () if str(layer).startswith(_STATE_LAYERS)})
    if state is not None or layers:
        raise UserError(
            f"{kind} has state-space or other layers without attention ({state or ', '.join(layers)}): scores and "
            "surgery for their states are missing; only attention with MLPs can be cut"
        )
    if values.get("is_encoder_decoder"):
        raise UserError(f"{kind} is an encoder-decoder: scores and surgery for cross-attention are missing")
    if "text_config" in values:
        raise UserError(
            f"{kind} is multimodal: surgery for what joins its towers is missing; save its text model alone and cut it"
        )
