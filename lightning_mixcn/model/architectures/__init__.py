"""The supported families of mixtures, one file each; the rest of `model` asks their records.

A fourth one is a file here that makes an `Architecture`, and its name in `MODEL_TYPES`.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Any, cast

from transformers import PreTrainedConfig

from .record import Architecture

__all__ = ["MODEL_TYPES", "Architecture", "architecture_named", "architecture_of"]

# Names of the files, which are transformers' types of models.
MODEL_TYPES = ("mixtral", "olmoe", "qwen3_moe")


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """Return the record of the family that a configuration of transformers belongs to. Raises: ValueError."""
    return architecture_named(config.model_type)


def architecture_named(model_type: str) -> Architecture:
    """Return the record of a type of models; only its own family of transformers is imported. Raises: ValueError."""
    if model_type not in MODEL_TYPES:
        raise ValueError(f"model_type={model_type!r}: expected one of {', '.join(MODEL_TYPES)}")
    return cast(Architecture, import_module(f".{model_type}", __name__).ARCHITECTURE)


def refusal(settings: Mapping[str, Any]) -> str | None:
    """Tell what of the content of a ``config.json`` keeps its model from being used here; ``None`` if nothing does."""
    model_type = settings.get("model_type")
    if model_type not in MODEL_TYPES:
        return (
            f"a model of type {model_type!r}. Expected {', '.join(MODEL_TYPES[:-1])} or {MODEL_TYPES[-1]}; a dense "
            "model becomes a mixture with `mixcn upcycle`"
        )
    architecture = architecture_named(model_type)
    for key, accepted in architecture.accepted.items():
        if (value := settings.get(key)) not in accepted:
            expected = " or ".join(map(repr, accepted))
            return f"a model with {key}={value!r}, which is not supported. Expected {expected}"
    return None
