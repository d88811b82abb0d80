"""The supported families of mixtures, one file each; the rest of `model` asks their records.

A fourth one is a file here that makes an `Architecture`, and its name in `MODEL_TYPES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from lightning_mixcn.errors import UserError

from .record import Architecture

if TYPE_CHECKING:  # its import takes seconds, for which `mixcn upcycle --help` does not wait
    from transformers import PreTrainedConfig

__all__ = [
    "MODEL_TYPES",
    "Architecture",
    "UpcycledFamily",
    "architecture_named",
    "architecture_of",
    "upcycled_families",
]

# Names of the files, which are transformers' types of models.
MODEL_TYPES = ("mixtral", "olmoe", "qwen3_moe")
# Those that continue dense models; their records say which.
UpcycledFamily = Literal["mixtral", "qwen3_moe"]


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """Return the record of the family that a configuration of transformers belongs to. Raises: ValueError."""
    return architecture_named(config.model_type)


def architecture_named(model_type: str) -> Architecture:
    """Return the record of a type of models; only its own family of transformers is imported. Raises: ValueError."""
    if model_type not in MODEL_TYPES:
        raise ValueError(f"model_type={model_type!r}: expected one of {', '.join(MODEL_TYPES)}")
    return cast(Architecture, import_module(f".{model_type}", __name__).ARCHITECTURE)


def upcycled_families() -> dict[str, Architecture]:
    """Map transformers' type of each dense model that can become a mixture to the family that it becomes."""
    records = map(architecture_named, get_args(UpcycledFamily))
    return {dense: architecture for architecture in records for dense in architecture.dense}


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
