"""Content of a checkpoint: the parameters that train, and the identity of the base that they belong to."""

import copy
import math
from collections.abc import Iterable, Mapping
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys
from torch.optim import Optimizer

from lightning_mixcn.errors import UserError
from lightning_mixcn.model import base_identity
from lightning_mixcn.model.checkpoints.folder import Checkpoint
from lightning_mixcn.model.lora.attach import lora_layers

from .resume import (
    SETTINGS_KEY,
    ConfiguredOptimization,
    callback_changes,
    settings_changes,
)

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
        arguments: Arguments of ``__init__``.

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
        projection, as they are in effect; ``experts``: numbers of those that have factors, where some have none;
        ``start``: they started from the rounding error, which is subtracted when they are written.
    """
    layers, experts, has_start = {}, {}, False
    for name, layer in lora_layers(cast(nn.Module, module.model)):
        for adapter in layer.active_adapters:
            layers[name] = [int(layer.r[adapter]), float(layer.scaling[adapter])]
        if len(layer.slots) < layer.groups:
            experts[name] = list(layer.slots)
        has_start |= layer.start is not None
    lora = getattr(module, "lora", None)
    config = {} if lora is None else plain_lora(lora)
    return {"config": config, "layers": layers, "experts": experts, "start": has_start}


def check_same_lora(checkpoint: Mapping[str, Any], module: LightningModule) -> None:
    """Check that a checkpoint's factors mean here what they meant when they were trained.

    Args:
        checkpoint: Checkpoint with the record; an older one, which has none, has the module's arguments.
        module: Module whose model is built.

    Raises:
        ValueError: another rank, scaling, target or choice of experts; says both values.
    """
    if getattr(module, "model", None) is None:
        return
    present, saved = lora_record(module), checkpoint.get(LORA_KEY)
    if saved is None:
        given = _saved_config(checkpoint)
        if given and (changed := _changed(given, present["config"], _MEANING)):
            raise UserError(f"The checkpoint's adapters mean something else: {changed}. {_remedy()}")
        return
    if (had_start := saved.get("start", False)) != present["start"]:
        raise UserError(
            f"The checkpoint's adapters do not go on from the same start: from the rounding error of NF4 "
            f"{'in it, but not here' if had_start else 'here, but not in it'}. Give `model.init_args.lora_start` and "
            "`model.init_args.adapter` as they were in the run that wrote the checkpoint"
        )
    for name, (rank, scaling) in saved["layers"].items():
        here = present["layers"].get(name)
        if here is None:
            changed = _changed(saved["config"], present["config"], _TARGETS) or "`lora` or `train_only` leaves it out"
            raise UserError(f"The checkpoint adapts {name}, which has no adapter here: {changed}. {_remedy()}")
        if here[0] != rank or not math.isclose(here[1], scaling, rel_tol=1e-6):
            changed = _changed(saved["config"], present["config"], _MEANING)
            raise UserError(
                f"The checkpoint's adapter of {name} has the rank {rank} and the scaling {scaling:g}, here it has "
                f"{here[0]} and {here[1]:g}{changed and ': '}{changed}. {_remedy()}"
            )
    if more := sorted(present["layers"].keys() - saved["layers"].keys()):
        changed = _changed(saved["config"], present["config"], _TARGETS) or "`lora` or `train_only` is another"
        raise UserError(f"The checkpoint has no adapter of {more[0]}, which has one here: {changed}. {_remedy()}")
    chosen, given = (record.get("experts", {}) for record in (saved, present))
    for name in present["layers"]:
        if chosen.get(name) != given.get(name):
            numbers = [record.get(name, "all") for record in (chosen, given)]
            raise UserError(
                f"The checkpoint has adapters of the experts {numbers[0]} in {name}, but `train_only` chooses "
                f"{numbers[1]}. {_remedy()}"
            )


def lora_changes(checkpoint: Mapping[str, Any], module: LightningModule) -> list[str]:
    """List the options of LoRA that may change on resume and have changed.

    Args:
        checkpoint: Checkpoint with the record, or at least the module's arguments.
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
    return (
        "Give `lora` and `train_only` in `model.init_args` as they were in the run that wrote the checkpoint; to go on "
        "from its adapter, begin a new run with `adapter`"
    )


BASE_KEY = "mixcn_base"
ACCUMULATION_KEY = "mixcn_accumulate_grad_batches"
# Arguments that are compared by other means, or that only say how a run begins.
_APART = frozenset(
    {
        "base",
        "tokenizer",
        "adapter",
        "lora",
        "train_only",
        "lora_start",
        "new_rows",
        "optimizer",
        "lr_scheduler",
        "learning_rates",
        "train_embeddings",
    }
)


class SavedStateModule(LightningModule):
    """A LightningModule whose checkpoints hold what trains, and the identity of the base instead of the base.

    A subclass has the attribute `base`, the path or hub id of the base.
    """

    base: str

    def __init__(self) -> None:
        super().__init__()
        self.strict_loading = False  # a checkpoint holds what trains; `load_state_dict` checks that all of it is there
        self.steps_trained = 0  # of the checkpoint that was loaded
        self._configured: ConfiguredOptimization | None = None
        self._resumed: dict[str, Any] | None = None  # settings in the checkpoint that training goes on from

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]  # torch's has overloads
        """Return what trains only; the base is named by its identity, see `on_save_checkpoint`."""
        trainable, prefix = trainable_names(self), kwargs.get("prefix", "")
        state: dict[str, Any] = super().state_dict(*args, **kwargs)
        for name in [name for name in state if name.removeprefix(prefix) not in trainable]:
            del state[name]
        return state

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> _IncompatibleKeys:
        """Load what trains. Raises: ValueError if it is not exactly what trains here."""
        check_trainable_state(self, state_dict)
        super().load_state_dict(state_dict, strict=False, assign=assign)
        return _IncompatibleKeys([], [])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the base's path and a hash of its content, and what resuming on other ranks needs."""
        checkpoint[BASE_KEY] = self._base_identity
        checkpoint[LORA_KEY] = lora_record(self)
        if self._configured is not None:
            checkpoint[SETTINGS_KEY] = self._configured.settings()
        checkpoint[ACCUMULATION_KEY] = self.trainer.accumulate_grad_batches
        if self.trainer.strategy.lightning_restore_optimizer:
            for state, optimizer in zip(checkpoint.get("optimizer_states", ()), self.trainer.optimizers, strict=False):
                number_as_in_module(state, optimizer, self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check base, LoRA and optimizer before anything is loaded. Raises: ValueError if they are others."""
        self.check_checkpoint(checkpoint)
        if LORA_KEY not in checkpoint and "lora" not in checkpoint.get("hyper_parameters", {}):
            rank_zero_warn("The checkpoint does not say how its adapters are scaled: `lora` is not checked against it")
        if self._trainer is not None:
            rescale_batch_counts(checkpoint, self.trainer.accumulate_grad_batches)
            self._keep_settings(checkpoint)
        self.steps_trained = int(checkpoint["global_step"])

    def check_checkpoint(self, content: Mapping[str, Any]) -> None:
        """Refuse what this run cannot go on from.

        Args:
            content: The checkpoint's dictionary; the tensors need not be in it.

        Raises:
            ValueError: another base, other LoRA scalings, ranks or targets, another quantization or optimizer.
        """
        check_same_base(content.get(BASE_KEY), self._base_identity)
        check_same_lora(content, self)
        saved = content.get("hyper_parameters", {}).get("quantization")
        present = self.hparams.get("quantization")
        if self._is_fitting and None not in (saved, present) and saved != present:
            raise UserError(
                f"The checkpoint was trained with `quantization: {saved}`, but it is {present} here, which is another "
                f"base to its adapters. Set `model.init_args.quantization: {saved}`; to go on from its adapter, begin "
                "a new run with `model.init_args.adapter`"
            )
        if self._configured is not None:
            self._configured.check(content.get(SETTINGS_KEY))

    def compare_with_checkpoint(self, configured: ConfiguredOptimization) -> None:
        """Remember how the optimizer is configured, before a checkpoint is restored into it.

        Args:
            configured: Result of `configure_optimizers`; a subclass that has its own may call this, too.

        Raises:
            ValueError: the checkpoint holds the states of another optimizer.
        """
        self._configured = configured
        if self._resumed is not None:
            configured.check(self._resumed["settings"])
            configured.check_groups(self._resumed["groups"])
            self._drop_other_schedule()

    def take_configured_settings(self) -> None:
        """Set what a checkpoint has restored as the configuration says, and say in one line what has changed."""
        if (resumed := self._resumed) is None:
            return
        self._resumed = None
        changes = resumed["changes"]
        optimizers, schedules = self.trainer.optimizers, self.trainer.lr_scheduler_configs
        if self._configured is None:
            rank_zero_warn(
                f"{type(self).__name__} has its own `configure_optimizers`: optimizer and schedule go on with the "
                "checkpoint's settings, whatever the configuration says"
            )
        elif len(optimizers) == len(schedules) == len(resumed["schedules"]) == 1:
            changes = changes + self._configured.apply(
                optimizers[0],
                schedules[0].scheduler,
                resumed["settings"],
                resumed["schedules"][0],
                self.trainer.global_step,
            )
            self._configured.check_states(optimizers[0])
        if changes:
            rank_zero_info(f"resume at optimizer step {self.trainer.global_step}: {', '.join(changes)}")

    @property
    def _is_fitting(self) -> bool:
        return self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING

    def _keep_settings(self, checkpoint: dict[str, Any]) -> None:
        """Keep what is compared once all is restored; in evaluation, say what differs at once."""
        changes = settings_changes(checkpoint.get("hyper_parameters", {}), self.hparams, apart=_APART)
        if not self._is_fitting:
            changed = [change for change in changes if change.startswith(("quantization ", "dtype "))]
            if changed:
                rank_zero_info(f"The checkpoint was trained otherwise: {', '.join(changed)}")
            return
        changes += lora_changes(checkpoint, self)
        changes += callback_changes(self.trainer.callbacks, checkpoint.get("callbacks", {}))  # type: ignore[attr-defined]
        schedules, states = checkpoint.get("lr_schedulers", []), checkpoint.get("optimizer_states", [])
        self._resumed = {
            "settings": checkpoint.get(SETTINGS_KEY),
            "changes": changes,
            "groups": [[len(group["params"]) for group in state["param_groups"]] for state in states],
            "schedules": copy.deepcopy(schedules),
            "to_restore": schedules,
        }
        self._drop_other_schedule()

    def _drop_other_schedule(self) -> None:
        """Have Lightning not restore the state of a schedule of another class."""
        assert self._resumed is not None
        if self._configured is not None and not self._configured.is_restorable(self._resumed["settings"]):
            self._resumed["to_restore"].clear()

    @cached_property
    def base_checkpoint(self) -> Checkpoint:
        """The opened base."""
        return Checkpoint(self.base)

    @cached_property
    def _base_identity(self) -> dict[str, str]:
        return base_identity(self.base_checkpoint)


def trainable_names(module: nn.Module) -> set[str]:
    """Return the names of the parameters that train, as a checkpoint has them; a tied pair has one."""
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def check_trainable_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Check that a checkpoint holds every parameter that trains here, and nothing else.

    Args:
        module: The LightningModule, its model built.
        state: A checkpoint's ``state_dict``.

    Raises:
        ValueError: a parameter is missing, left over, or of another shape.
    """
    trainable = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    options = "`lora`, `train_only`, `train_embeddings` and `tokenizer`"
    remedy = f"Give {options} as they were in the run that wrote the checkpoint"
    if missing := sorted(trainable.keys() - state.keys()):
        raise UserError(f"The checkpoint lacks {_some(missing)}, which train here. {remedy}")
    if extra := sorted(state.keys() - trainable.keys()):
        raise UserError(f"The checkpoint holds {_some(extra)}, which do not train here. {remedy}")
    for name, parameter in trainable.items():
        if state[name].shape != parameter.shape:
            shapes = f"{tuple(state[name].shape)} in the checkpoint and {tuple(parameter.shape)} here"
            raise UserError(f"{name} has the shape {shapes}. {remedy}")


def check_same_base(saved: Mapping[str, Any] | None, present: Mapping[str, Any]) -> None:
    """Check that a checkpoint belongs to the base that is loaded; its folder may have moved.

    Args:
        saved: ``{"path", "sha256"}`` from the checkpoint.
        present: The same of the base in use.

    Raises:
        ValueError: another base, or a checkpoint that names none.
    """
    if saved is None:
        raise UserError("The checkpoint names no base model: it was not written by lightning_mixcn. Give one that was")
    if saved["sha256"] != present["sha256"]:
        raise UserError(
            f"The checkpoint was trained on the base {saved['path']} (sha256 {saved['sha256'][:12]}…), but `base` is "
            f"{present['path']} (sha256 {present['sha256'][:12]}…). Set `model.init_args.base` to the former; to begin "
            "a new run from its adapter on this base, give `model.init_args.adapter` instead of `--ckpt_path`"
        )


def number_as_in_module(optimizer_state: dict[str, Any], optimizer: Optimizer, module: nn.Module) -> None:
    """Count the parameters of an optimizer's state among all of the module's, frozen ones too, in place.

    Lightning's `ModelParallelStrategy` shards a state of one file by these numbers; torch itself goes by the order.

    Args:
        optimizer_state: State of the optimizer, its parameters numbered from 0 in the order of its groups.
        optimizer: An optimizer of all that trains.
        module: The LightningModule.
    """
    index_of = {parameter: index for index, parameter in enumerate(module.parameters()) if parameter.requires_grad}
    among_all = [index_of.get(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in optimizer_state["param_groups"] for number in group["params"]]
    if numbers != list(range(len(index_of))) or None in among_all:
        return  # an optimizer of a subclass's own making
    for group in optimizer_state["param_groups"]:
        group["params"] = [among_all[number] for number in group["params"]]
    optimizer_state["state"] = {among_all[number]: state for number, state in optimizer_state["state"].items()}


def rescale_batch_counts(checkpoint: dict[str, Any], accumulate_grad_batches: int) -> None:
    """Make Lightning's counts of micro-batches those of a run with another accumulation, in place.

    On fewer ranks each takes more micro-batches a step. Lightning goes by the number of micro-batches so far; without
    this the first step after a resume would be of some of them only.

    Args:
        checkpoint: Saved at the end of a step.
        accumulate_grad_batches: The present run's.
    """
    saved, loops = checkpoint.get(ACCUMULATION_KEY), checkpoint.get("loops", {})
    if saved in (None, accumulate_grad_batches) or "fit_loop" not in loops:
        return
    progress = loops["fit_loop"]["epoch_loop.batch_progress"]
    for counts in (progress["total"], progress["current"]):
        missing = counts["ready"] - counts["completed"]  # the last batch's end, where the checkpoint is written
        ready = -(-counts["ready"] // saved) * accumulate_grad_batches
        counts |= {"ready": ready, "started": ready, "processed": ready, "completed": ready - missing}


def adapter_folder(adapter: str | None) -> str | None:
    """Return the PEFT folder to continue from: the given one, or the one that `AdapterCheckpoint` wrote inside it."""
    inside = Path(adapter).expanduser() / "adapter" if adapter else None
    return str(inside) if inside is not None and inside.is_dir() else adapter


def _some(names: Iterable[str], shown: int = 3) -> str:
    names = list(names)
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{', '.join(names[:shown])}{rest}"
