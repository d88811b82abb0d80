"""Rank and scaling of a checkpoint's LoRA factors, which the factors themselves do not say."""

import math
from collections.abc import Mapping
from typing import Any, cast

from lightning.pytorch import LightningModule
from peft import LoraConfig
from torch import nn

from lightning_mixcn.model.adapters import lora_layers

from .hyperparameters import plain_lora

LORA_KEY = "mixcn_lora"
# What decides rank and scaling; targets are seen by the names.
_MEANING = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
_DROPOUT = "lora_dropout"
_TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


def lora_record(module: LightningModule) -> dict[str, Any]:
    """Write down what a module's adapters are, in plain values.

    Args:
        module: One with a ``model``, and perhaps a ``lora``.

    Returns:
        ``config``, PEFT's options that differ from its defaults, and ``layers``: rank and scaling of each adapted
        projection, as they are in effect.
    """
    layers = {}
    for name, layer in lora_layers(cast(nn.Module, module.model)):
        for adapter in layer.active_adapters:
            layers[name] = [int(layer.r[adapter]), float(layer.scaling[adapter])]
    lora = getattr(module, "lora", None)
    return {"config": {} if lora is None else plain_lora(lora), "layers": layers}


def check_same_lora(checkpoint: Mapping[str, Any], module: LightningModule) -> None:
    """Check that a checkpoint's factors mean here what they meant when they were trained.

    Args:
        checkpoint: With the record; an older checkpoint, which has none, has the module's arguments.
        module: Its model is built.

    Raises:
        ValueError: another rank, scaling or target; says both values.
    """
    if getattr(module, "model", None) is None:
        return
    present, saved = lora_record(module), checkpoint.get(LORA_KEY)
    if saved is None:
        given = _saved_config(checkpoint)
        if given and (changed := _changed(given, present["config"], _MEANING)):
            raise ValueError(f"The checkpoint's adapters mean something else: {changed}. {_remedy()}")
        return
    for name, (rank, scaling) in saved["layers"].items():
        here = present["layers"].get(name)
        if here is None:
            changed = _changed(saved["config"], present["config"], _TARGETS) or "`lora` leaves it out"
            raise ValueError(f"The checkpoint adapts {name}, which has no adapter here: {changed}. {_remedy()}")
        if here[0] != rank or not math.isclose(here[1], scaling, rel_tol=1e-6):
            changed = _changed(saved["config"], present["config"], _MEANING)
            raise ValueError(
                f"The checkpoint's adapter of {name} has the rank {rank} and the scaling {scaling:g}, here it has "
                f"{here[0]} and {here[1]:g}{changed and ': '}{changed}. {_remedy()}"
            )
    if more := sorted(present["layers"].keys() - saved["layers"].keys()):
        changed = _changed(saved["config"], present["config"], _TARGETS) or "`lora` is another"
        raise ValueError(f"The checkpoint has no adapter of {more[0]}, which has one here: {changed}. {_remedy()}")


def lora_changes(checkpoint: Mapping[str, Any], module: LightningModule) -> list[str]:
    """List the options of LoRA that may change on resume and have changed.

    Args:
        checkpoint: With the record, or at least the module's arguments.
        module: One with a ``lora``, perhaps.

    Returns:
        Changes such as ``lora.lora_dropout 0 → 0.1``.
    """
    lora, saved = getattr(module, "lora", None), _saved_config(checkpoint)
    if lora is None or saved is None:
        return []
    old, new = (float(config.get(_DROPOUT, vars(LoraConfig())[_DROPOUT])) for config in (saved, plain_lora(lora)))
    return [] if old == new else [f"lora.{_DROPOUT} {old:g} → {new:g}"]


def _saved_config(checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the options in the record, or in an older checkpoint's arguments as the command line has them or plain."""
    if (saved := checkpoint.get(LORA_KEY)) is not None:
        return dict(saved["config"])
    given = checkpoint.get("hyper_parameters", {}).get("lora")
    return dict(given.get("init_args", given)) if given else None


def _changed(saved: Mapping[str, Any], present: Mapping[str, Any], options: tuple[str, ...]) -> str:
    default = vars(LoraConfig())
    values = [(key, saved.get(key, default[key]), present.get(key, default[key])) for key in options]
    return ", ".join(
        f"`lora.{key}` was {old!r} and is {new!r}" for key, old, new in values if _listed(old) != _listed(new)
    )


def _listed(value: Any) -> Any:
    return sorted(value) if isinstance(value, list | set) else value or None


def _remedy() -> str:
    return "Give `model.init_args.lora` as it was in the run that wrote the checkpoint"
