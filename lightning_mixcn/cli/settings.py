"""The settings of a run as they are given, made consistent before anything is made of them."""

import os
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from lightning_mixcn.arguments import check_arguments
from lightning_mixcn.data import StreamDataModule
from lightning_mixcn.errors import UserError
from lightning_mixcn.files.hub import local_folder
from lightning_mixcn.masking import MASK, without_secrets
from lightning_mixcn.model.vocabulary import tokenizer_for
from lightning_mixcn.modules.run_settings import RunSettings, TrainerArguments
from lightning_mixcn.modules.state import adapter_folder


def check_run_settings(settings: Any) -> None:
    """Refuse values that no run could mean, before anything is made of them.

    Args:
        settings: A subcommand's configuration.

    Raises:
        ValueError: names the key.
    """
    check_arguments(RunSettings, vars(settings))
    if not isinstance(settings.trainer, Namespace):
        raise UserError(f"`trainer={settings.trainer!r}`: expected a mapping, e.g. {{max_steps: 1000}}")
    check_arguments(TrainerArguments, vars(settings.trainer), "trainer.")
    lora = _arguments(settings, "model").get("lora")
    kind = _arguments({"lora": lora}, "lora").get("peft_type") if isinstance(lora, Namespace) else None
    if kind not in (None, "LORA"):  # PEFT writes its own over it
        raise UserError(f"`lora.peft_type={kind!r}`: expected LORA. Leave it out")


def expand_home(settings: Any) -> None:
    """Replace a leading ``~`` of every path by the home folder, in place.

    Lightning's parts disagree: some expand it, others make a folder of this name.

    Args:
        settings: A subcommand's configuration. Lists of texts stay as they are, such as prompts; those under the key
            ``path`` are paths.
    """
    mapping = vars(settings) if isinstance(settings, Namespace) else settings
    items = enumerate(settings) if isinstance(settings, list) else mapping.items()
    for key, value in list(items):
        if key == "path" and isinstance(value, list):
            settings[key] = [os.path.expanduser(path) for path in value]
        elif isinstance(value, Namespace | dict | list):
            expand_home(value)
        elif isinstance(value, str) and value.startswith("~") and not isinstance(settings, list):
            settings[key] = os.path.expanduser(value)


def mask_settings(settings: Any) -> None:
    """Mask what is secret in a configuration, in place: what a run writes of it is copied and shown."""
    for place, key, value in _leaves(settings):
        place[key] = without_secrets({key: value})[key]


def refuse_masks(settings: Any) -> None:
    """Refuse a configuration that a run wrote without its secrets.

    Raises:
        ValueError: names the key whose value is masked.
    """
    for _, key, value in _leaves(settings):
        if isinstance(value, str) and MASK in value:
            raise UserError(
                f"`{key}={value!r}` is masked: configurations that a run writes hold no secrets. Give the whole value "
                "again, in a configuration of your own or by an option after this one, or keep it in the environment"
            )


def _leaves(settings: Any) -> Iterator[tuple[Any, Any, Any]]:
    """Yield the mapping or list that holds a plain value, its key there, and the value."""
    mapping = vars(settings) if isinstance(settings, Namespace) else settings
    for key, value in list(enumerate(settings) if isinstance(settings, list) else mapping.items()):
        if isinstance(value, Namespace | dict | list):
            yield from _leaves(value)
        else:
            yield settings, key, value


def input_paths(settings: Any) -> Iterator[tuple[str, str]]:
    """List what a run reads.

    Args:
        settings: A subcommand's configuration.

    Yields:
        Name of an argument, such as ``data.init_args.sources[0].path``, and a path, a glob or a hub id.
    """
    for config in settings.get("config") or []:
        yield "--config", str(config)
    for part, names in (("model", ("adapter", "base", "tokenizer")), ("data", ("tokenizer",))):
        for name in names:
            if (value := _arguments(settings, part).get(name)) is not None:
                yield f"{part}.init_args.{name}", str(value)
    for name in ("sources", "val_sources", "test_sources", "predict_sources"):
        sources = _arguments(settings, "data").get(name)
        for number, source in enumerate(sources if isinstance(sources, list) else []):
            for path in source["path"] if isinstance(source["path"], list) else [source["path"]]:
                yield f"data.init_args.{name}[{number}].path", str(path)


def settle_epochs(settings: Any) -> None:
    """Turn ``trainer.max_epochs`` into ``max_epochs`` of every source that has none, in place.

    An epoch of Lightning's is what its loader gives, and that of a stream has no end.

    Args:
        settings: A subcommand's configuration; data without sources are left to Lightning.

    Raises:
        ValueError: the length of the run is given twice, or every source has another ``max_epochs`` of its own.
    """
    trainer, sources = settings.trainer, _arguments(settings, "data").get("sources")
    epochs = trainer.max_epochs
    if epochs in (None, -1) or trainer.fast_dev_run or not isinstance(sources, list):
        return
    if epochs < 1:
        raise UserError(f"`trainer.max_epochs={epochs}`: expected at least 1, or -1 for no bound")
    if trainer.max_steps not in (None, -1):
        raise UserError(
            f"`trainer.max_epochs={epochs}` and `trainer.max_steps={trainer.max_steps}` both say how long the run is. "
            "Give one of them"
        )
    own = [source["max_epochs"] for source in sources]
    if None not in own and any(value != epochs for value in own):
        given = ", ".join(f"{source['name']} {source['max_epochs']}" for source in sources)
        raise UserError(
            f"`trainer.max_epochs={epochs}` has no effect: every source has its own `max_epochs` ({given}). Change "
            "those in `data.init_args.sources`, or leave `trainer.max_epochs` out"
        )
    for source in sources:
        if source["max_epochs"] is None:
            source["max_epochs"] = epochs
    trainer.max_epochs = -1


def settle_tokenizer(settings: Any) -> None:
    """Give the data module the model's tokenizer, in place.

    Args:
        settings: A subcommand's configuration; a model or data without an argument ``tokenizer`` is left alone.

    Raises:
        ValueError: the data module was given another one, or an adapter was trained with another one.
    """
    model, data = (_arguments(settings, part) for part in ("model", "data"))
    if not _shares_tokenizer(model, data):
        return
    wanted = tokenizer_for(model["base"], model["tokenizer"], adapter_folder(model.get("adapter")))
    given = data["tokenizer"]
    if given is not None and not _is_same(given, wanted):
        raise UserError(
            f"`data.init_args.tokenizer={given!r}` is not the model's, which is {wanted!r}. Give it as "
            "`model.init_args.tokenizer`, which the data take, too, or leave it out"
        )
    data["tokenizer"] = wanted


def fetch_tokenizer(settings: Any) -> None:
    """Resolve the data's tokenizer to a folder, downloading it if it is a hub model's, in place."""
    data = _arguments(settings, "data")
    if data.get("tokenizer") is not None:
        data["tokenizer"] = str(local_folder(data["tokenizer"]))


def forget_tokenizer(settings: Any) -> None:
    """Leave out of a configuration what `settle_tokenizer` derives from the rest of it, in place.

    A data module of somebody else's may need its tokenizer.
    """
    model, data = (_arguments(settings, part) for part in ("model", "data"))
    if _shares_tokenizer(model, data) and _is_stream(settings["data"]["class_path"]):
        data["tokenizer"] = None


def _is_stream(class_path: str) -> bool:
    module, _, name = class_path.rpartition(".")
    return issubclass(getattr(import_module(module), name), StreamDataModule)


def _shares_tokenizer(model: Any, data: Any) -> bool:
    return "base" in model and "tokenizer" in model and "tokenizer" in data


def _arguments(settings: Any, part: str) -> Any:
    return (settings.get(part) or {}).get("init_args") or {}


def _is_same(one: str, other: str) -> bool:
    return one == other or (Path(one).exists() and Path(other).exists() and os.path.samefile(one, other))
