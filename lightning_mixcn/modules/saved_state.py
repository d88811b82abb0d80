"""What a checkpoint holds of a model: what trains, and which base it belongs to."""

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from lightning_mixcn.model import base_identity
from lightning_mixcn.model.local_rows import plain_name

BASE_KEY = "mixcn_base"
ACCUMULATION_KEY = "mixcn_accumulate_grad_batches"


class SavedStateModule(LightningModule):
    """A LightningModule whose checkpoints hold what trains, and the identity of the base instead of the base.

    A subclass has the attribute `base`, the path or hub id of the base.
    """

    base: str

    def __init__(self) -> None:
        super().__init__()
        self.strict_loading = False  # a checkpoint holds what trains; `load_state_dict` checks that all of it is there
        self.steps_trained = 0  # of the checkpoint that was loaded

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]  # torch's has overloads
        """Only what trains; the base is named by its identity, see `on_save_checkpoint`."""
        trainable, prefix = trainable_names(self), kwargs.get("prefix", "")
        state: dict[str, Any] = super().state_dict(*args, **kwargs)
        for name in [name for name in state if plain_name(name.removeprefix(prefix)) not in trainable]:
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
        checkpoint[ACCUMULATION_KEY] = self.trainer.accumulate_grad_batches
        if self.trainer.strategy.lightning_restore_optimizer:
            for state in checkpoint.get("optimizer_states", ()):
                number_as_in_module(state, self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check the base before anything is loaded. Raises: ValueError if it is another one."""
        check_same_base(checkpoint.get(BASE_KEY), self._base_identity)
        if self._trainer is not None:
            rescale_batch_counts(checkpoint, self.trainer.accumulate_grad_batches)
        self.steps_trained = int(checkpoint["global_step"])

    @cached_property
    def _base_identity(self) -> dict[str, str]:
        return base_identity(self.base)


def trainable_names(module: nn.Module) -> set[str]:
    """Names of the parameters that train, as a checkpoint has them; a tied pair has one."""
    return {plain_name(name) for name, parameter in module.named_parameters() if parameter.requires_grad}


def check_trainable_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Check that a checkpoint holds every parameter that trains here, and nothing else.

    Args:
        module: The LightningModule, its model built.
        state: A checkpoint's ``state_dict``.

    Raises:
        ValueError: a parameter is missing, left over, or of another shape.
    """
    trainable = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    remedy = "Give `lora`, `train_embeddings` and `tokenizer` as they were in the run that wrote the checkpoint"
    if missing := sorted(trainable.keys() - state.keys()):
        raise ValueError(f"The checkpoint lacks {_some(missing)}, which train here. {remedy}")
    if extra := sorted(state.keys() - trainable.keys()):
        raise ValueError(f"The checkpoint holds {_some(extra)}, which do not train here. {remedy}")
    for name, parameter in trainable.items():
        if state[name].shape != parameter.shape:
            shapes = f"{tuple(state[name].shape)} in the checkpoint and {tuple(parameter.shape)} here"
            raise ValueError(f"{name} has the shape {shapes}. {remedy}")


def check_same_base(saved: Mapping[str, Any] | None, present: Mapping[str, Any]) -> None:
    """Check that a checkpoint belongs to the base that is loaded; its folder may have moved.

    Args:
        saved: ``{"path", "sha256"}`` from the checkpoint.
        present: The same of the base in use.

    Raises:
        ValueError: another base, or a checkpoint that names none.
    """
    if saved is None:
        raise ValueError("The checkpoint names no base model: it was not written by lightning_mixcn. Give one that was")
    if saved["sha256"] != present["sha256"]:
        raise ValueError(
            f"The checkpoint was trained on the base {saved['path']} (sha256 {saved['sha256'][:12]}…), but `base` is "
            f"{present['path']} (sha256 {present['sha256'][:12]}…). Set `model.init_args.base` to the former; to start "
            "anew from its adapter on this base, give `model.init_args.adapter` instead of `--ckpt_path`"
        )


def number_as_in_module(optimizer_state: dict[str, Any], module: nn.Module) -> None:
    """Number the parameters of an optimizer's state among all of the module's, frozen ones too, in place.

    That is how Lightning's FSDP strategies take a state of one file apart again; torch itself goes by the order.

    Args:
        optimizer_state: Of an optimizer over all that trains, its parameters numbered from 0.
        module: The LightningModule.
    """
    among_all = [index for index, parameter in enumerate(module.parameters()) if parameter.requires_grad]
    numbers = [number for group in optimizer_state["param_groups"] for number in group["params"]]
    if sorted(numbers) != list(range(len(among_all))):
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
    """The PEFT folder to continue from: the given one, or the one that `AdapterCheckpoint` wrote in a run folder."""
    inside = Path(adapter, "adapter") if adapter else None
    return str(inside) if inside is not None and inside.is_dir() else adapter


def _some(names: Iterable[str], shown: int = 3) -> str:
    names = list(names)
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{', '.join(names[:shown])}{rest}"
