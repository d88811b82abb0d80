"""A module's arguments as plain data, so that checkpoints load with ``weights_only=True`` and loggers can show them."""

from collections.abc import Mapping
from enum import Enum
from typing import Any

from lightning.pytorch import LightningModule
from peft import LoraConfig

_PLAIN = (str, int, float, bool, type(None))
# Written by PEFT itself.
_LORA_BOOKKEEPING = ("peft_type", "peft_version", "base_model_name_or_path", "task_type")
# Lightning's mark for arguments that jsonargparse turns back into objects, as LightningCLI writes it.
_INSTANTIATOR = "_instantiator"


def make_plain(module: LightningModule) -> None:
    """Make a module's saved hyper-parameters plain data; from the command line they are already.

    `load_from_checkpoint` then goes through jsonargparse, as for runs of the command line, so e.g. ``lora`` becomes
    a LoraConfig again.

    Args:
        module: One that has called `save_hyperparameters`.
    """
    if _INSTANTIATOR in module.hparams:
        return
    plain = plain_arguments(module.hparams)
    class_path = f"{type(module).__module__}.{type(module).__qualname__}"
    record = {"_class_path": class_path, _INSTANTIATOR: "lightning.pytorch.cli.instantiate_module"}
    module.hparams.clear()
    module.save_hyperparameters(plain | record)


def plain_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Reduce constructor arguments to strings, numbers, booleans, ``None``, lists and dicts of these.

    Args:
        arguments: As given to ``__init__``.

    Returns:
        The same without what has no plain form, which is left to its default when the module is made again: callables
        such as an optimizer factory given in Python (the command line gives its own plain description).

    >>> plain_arguments({"base": "folder", "lora": LoraConfig(r=4, target_modules=["w1"]), "optimizer": print})
    {'base': 'folder', 'lora': {'r': 4, 'target_modules': ['w1']}}
    """
    return {name: _plain(value) for name, value in arguments.items() if not callable(value)}


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, LoraConfig):
        return plain_lora(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(_plain(item) for item in value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value)


def plain_lora(lora: LoraConfig) -> dict[str, Any]:
    """Reduce PEFT's configuration to what differs from its defaults, as plain data: the rest changes with its version.

    Args:
        lora: The configuration.
    """
    default = vars(LoraConfig())
    changed = {name: value for name, value in vars(lora).items() if name in default and value != default[name]}
    return {name: _plain(value) for name, value in changed.items() if name not in _LORA_BOOKKEEPING and name[0] != "_"}
