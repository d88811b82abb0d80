"""The supported families of mixtures, one file each; the rest of `model` asks their records.

A fourth one is a file here that makes an `Architecture`, and its name in `MODEL_TYPES`.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Any, cast

from transformers import PreTrainedConfig

from lightning_mixcn.errors import UserError

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


def check_supported(settings: Mapping[str, Any], where: str) -> None:
    """Refuse the content of a ``config.json`` whose model cannot be used here.

    Args:
        settings: The content.
        where: Name of the folder, for messages.

    Raises:
        ValueError: another family, or a relative that has what no supported one has.
    """
    model_type = settings.get("model_type")
    if model_type not in MODEL_TYPES:
        raise UserError(
            f"{where} holds a model of type {model_type!r}. Expected {', '.join(MODEL_TYPES[:-1])} or "
            f"{MODEL_TYPES[-1]}; a dense model becomes a mixture with `mixcn upcycle`"
        )
    for key, accepted in architecture_named(model_type).accepted.items():
        if (value := settings.get(key)) not in accepted:
            expected = " or ".join(map(repr, accepted))
            raise UserError(
                f"{where} holds a model with {key}={value!r}, which is not supported. Expected {expected}; give "
                "another base"
            )
