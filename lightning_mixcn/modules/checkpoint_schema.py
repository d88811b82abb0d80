"""The structure of a checkpoint: what must be in it, of which types and in which ranges, before any of it is used.

Lightning takes apart what it loads on the way, so that a part that is missing or of another type ends in an error of
its own, is left out in silence, or, as a step of a trillion, in a loop without end. The data's part is checked against
the corpus by `RunProgress`, the base's and LoRA's against the module by `SavedStateModule`.
"""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_mixcn.errors import UserError
from lightning_mixcn.files.schema import (
    ANYTHING,
    FLAG,
    MAPPING,
    NULL,
    TEXT,
    Check,
    Fault,
    each,
    either,
    expect,
    first_fault,
    mapping_of,
    real,
    record,
    row_of,
    whole,
)

COUNT = whole(0, 2**53)
_TENSOR = expect("a tensor", lambda value: isinstance(value, Tensor))
# Far above any rate that trains: Prodigy's is 1.
_NUMBER = real(0, 1e3)
_RATE = either(
    NULL,  # Adafactor's, which finds its own
    expect("a number", lambda value: isinstance(value, Tensor) and value.numel() == 1 and _is_rate(value.item())),
    _NUMBER,
)
# In the order in which Lightning counts: none is ahead of the one before it.
_COUNTS = ("ready", "started", "processed", "completed")
_MOST_NESTED_SCHEDULES = 8


def require_state(owner: object, state: Any, check: Check) -> None:
    """Check the state that a callback, or a part of one, is to go on from. Raises: ValueError if it is broken."""
    if fault := first_fault(state, check):
        raise UserError(f"The checkpoint's state of {type(owner).__name__}: {fault}. {REMEDY}")


def tensor_of(shape: Sequence[int]) -> Check:
    """Expect a tensor of a shape, of finite numbers."""
    return expect(
        f"a tensor of finite numbers of shape {list(shape)}",
        lambda value: isinstance(value, Tensor) and value.shape == tuple(shape) and bool(value.isfinite().all()),
    )


def _is_rate(value: float) -> bool:
    return next(_NUMBER(value, ""), None) is None


def check_content(content: Any, *, fitting: bool, sharded: bool) -> None:
    """Check what a checkpoint holds.

    Args:
        content: What was read: all of a file, or what a sharded folder has beside its tensors.
        fitting: Training goes on from it, which needs more than the weights.
        sharded: It is such a folder.

    Raises:
        ValueError: names the first part that is missing or wrong.
    """
    required: dict[str, Check] = {"global_step": COUNT, "pytorch-lightning_version": _VERSION}
    optional: dict[str, Check] = {
        "mixcn_lora": _LORA,
        "mixcn_settings": _settings,
        "mixcn_accumulate_grad_batches": whole(1, 2**31),
        "hyper_parameters": record({}, {"lora": either(NULL, _SAVED_LORA)}),
        "loops": record({}, {"fit_loop": _FIT_LOOP}),
        "mixcn_base": record({"path": TEXT, "sha256": TEXT}),
        "lr_schedulers": each(_schedule),
        "callbacks": _callbacks,
    }
    in_file = {} if sharded else {"state_dict": mapping_of(TEXT, _TENSOR)}
    if fitting:
        required |= {"epoch": COUNT, "loops": record({"fit_loop": _FIT_LOOP}), "callbacks": _callbacks}
        in_file |= {} if sharded else {"optimizer_states": each(_OPTIMIZER), "lr_schedulers": each(_schedule)}
    faults = record(required | in_file, optional)(content, "")
    fault = next(faults, None) or (next(_disagreements(content), None) if fitting else None)
    fault = fault or next(_bad_numbers(content), None)
    if fault is not None:
        raise UserError(f"{fault.place or 'what it holds'} {fault.problem}")


def _disagreements(content: Mapping[str, Any]) -> Iterator[Fault]:
    """Compare the steps that are counted in several places; Lightning goes by the loop's."""
    loop, step = content["loops"]["fit_loop"], content["global_step"]
    automatic = loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["total"]["completed"]
    manual = loop["epoch_loop.manual_optimization.optim_step_progress"]["total"]["completed"]
    if step not in (automatic, manual):
        yield Fault("global_step", f"is {step:,}, but its loop has done {max(automatic, manual):,} optimizer steps")
    if step and content.get("optimizer_states") == []:
        yield Fault("optimizer_states", "has 0 entries, expected at least one")
    batches = loop["epoch_loop.batch_progress"]["total"]["ready"]
    for index, schedule in enumerate(content.get("lr_schedulers", ())):
        # One a step, or one a validation, of which there is at most one a batch.
        if (taken := schedule_steps(schedule)) > max(batches, step):
            yield Fault(f"lr_schedulers[{index}]", f"has taken {taken:,} steps, but there were {batches:,} batches")


def _bad_numbers(content: Mapping[str, Any]) -> Iterator[Fault]:
    """Find NaN, infinity, second moments below zero, and parameters that were stepped more often than the run."""
    values = {f"state_dict[{name!r}]": value for name, value in content.get("state_dict", {}).items()}
    for index, optimizer in enumerate(content.get("optimizer_states", ())):
        for number, state in optimizer["state"].items():
            values |= {f"optimizer_states[{index}].state[{number}].{key}": value for key, value in state.items()}
    for place, value in values.items():
        if not isinstance(value, Tensor):
            continue
        # A few bytes can be a view of any size.
        if value.layout != torch.strided or value.untyped_storage().nbytes() < value.nbytes:
            yield Fault(place, "is no plain tensor")
        elif value.is_floating_point() and value.numel():
            low, high = torch.stack(value.aminmax()).tolist()
            if not (abs(low) < float("inf") and abs(high) < float("inf")):
                yield Fault(place, "holds NaN or infinite values")
            elif low < 0 and place.endswith("_sq"):
                yield Fault(place, "holds a mean of squares below zero")
            elif place.endswith(".step") and not 0 <= low <= high <= content["global_step"]:
                yield Fault(place, f"is {high:g}, expected at most the run's {content['global_step']:,} steps")


def check_optimizer_states(optimizer: Optimizer, made: Mapping[str, Any]) -> None:
    """Check the restored states of one of torch's optimizers, which itself fails in its next step.

    Args:
        optimizer: The optimizer.
        made: State that the same optimizer makes for a parameter of two dimensions, of 2 × 2. Those of other dimensions
            may have other parts, such as Adafactor's, so only the shapes of their parts are checked.

    Raises:
        ValueError: a state lacks a part, or has one of another shape than its parameter.
    """
    for group in optimizer.param_groups:
        for number, parameter in enumerate(group["params"]):
            state = optimizer.state.get(parameter)
            if not state:
                continue
            for key, value in made.items():
                found = state.get(key)
                where = f"The checkpoint's optimizer state of parameter {number}: {key}"
                if not isinstance(value, Tensor) or (found is None and parameter.dim() != 2):
                    continue
                if not isinstance(found, Tensor):
                    raise UserError(f"{where} is missing, expected a tensor. {REMEDY}")
                if value.shape == (2, 2) and found.shape != parameter.shape:
                    shapes = f"{list(found.shape)}, expected {list(parameter.shape)}"
                    raise UserError(f"{where} has the shape {shapes}. {REMEDY}")


REMEDY = "Restore it from a copy, or go on from another one"


def schedule_steps(state: Mapping[str, Any]) -> int:
    """Return the steps that a schedule has taken; torch's ChainedScheduler has them in its parts only."""
    return int(state["last_epoch"] if "last_epoch" in state else schedule_steps(state["_schedulers"][0]))


def _schedule(state: Any, place: str) -> Iterator[Fault]:
    """Check a schedule's state, and its parts'."""
    numbers = {"last_epoch": whole(-1, 2**53), "base_lrs": each(_RATE), "_last_lr": each(_RATE), "_step_count": COUNT}
    yield from record({}, numbers)(state, place)
    if not isinstance(state, Mapping):
        return
    parts = state.get("_schedulers")
    if "last_epoch" not in state and not parts:
        yield Fault(f"{place}.last_epoch", "is missing")
    elif parts is not None and place.count("._schedulers") >= _MOST_NESTED_SCHEDULES:
        yield Fault(place, "has parts of parts without end")
    elif parts is not None:
        yield from each(_schedule)(parts, f"{place}._schedulers")


def _settings(settings: Any, place: str) -> Iterator[Fault]:
    """Check what `ConfiguredOptimization.settings` wrote."""
    required = {"optimizer": TEXT, "lr_scheduler": TEXT, "lr": each(_RATE)}
    faults = list(record(required, {"lr_scheduler_parts": each(TEXT), "groups": each(MAPPING)})(settings, place))
    yield from faults
    if not faults and len(settings.get("groups", settings["lr"])) != len(settings["lr"]):
        yield Fault(f"{place}.groups", f"has {len(settings['groups'])} entries, expected {len(settings['lr'])}")


def _callbacks(states: Any, place: str) -> Iterator[Fault]:
    """Check the states of Lightning's callbacks that are restored without a look; ours check their own."""
    yield from mapping_of(TEXT, ANYTHING)(states, place)
    for key, state in states.items() if isinstance(states, Mapping) else ():
        kind = str(key).partition("{")[0]
        if kind in _CALLBACKS:
            yield from _CALLBACKS[kind](state, f"{place}[{kind}]")


def _progress(*names: str, **further: Check) -> Check:
    counted = [name for name in _COUNTS if name in names]

    def counts(value: Any, place: str) -> Iterator[Fault]:
        faults = list(record(dict.fromkeys(counted, COUNT))(value, place))
        yield from faults
        if not faults and any(value[name] > value[before] for before, name in itertools.pairwise(counted)):
            yield Fault(place, f"counts more {counted[-1]} than {counted[0]}")

    return record({"total": counts, "current": counts, **further})


_RELEASE = re.compile(r"\d+(\.\d+){1,3}(\.?(a|b|rc|dev|post)\d*)*(\+[\w.]+)?")
_VERSION = expect(
    "a version such as 2.6.6", lambda value: isinstance(value, str) and _RELEASE.fullmatch(value) is not None
)
_BATCHES = _progress(*_COUNTS, is_last_batch=FLAG)
_STEPS = _progress("ready", "completed")
_FIT_LOOP = record(
    {
        "state_dict": record({}, {"combined_loader": each(MAPPING)}),
        "epoch_loop.state_dict": record({}, {"_batches_that_stepped": COUNT}),
        "epoch_loop.batch_progress": _BATCHES,
        "epoch_loop.scheduler_progress": _STEPS,
        "epoch_loop.automatic_optimization.state_dict": MAPPING,
        "epoch_loop.automatic_optimization.optim_progress": record(
            {"optimizer": record({"step": _STEPS, "zero_grad": _progress("ready", "started", "completed")})}
        ),
        "epoch_loop.manual_optimization.state_dict": MAPPING,
        "epoch_loop.manual_optimization.optim_step_progress": _STEPS,
        "epoch_loop.val_loop.state_dict": MAPPING,
        "epoch_loop.val_loop.batch_progress": _BATCHES,
        "epoch_progress": _progress(*_COUNTS),
    }
)
_OPTIMIZER = record(
    {
        "state": mapping_of(either(TEXT, COUNT), mapping_of(TEXT, ANYTHING)),
        "param_groups": each(record({"params": each(either(TEXT, COUNT))}, {"lr": _RATE, "initial_lr": _RATE})),
    }
)
_LORA_DROPOUT = {"lora_dropout": real(0, 1)}
_LORA_OPTIONS = record({}, _LORA_DROPOUT)
_SAVED_LORA = record({}, _LORA_DROPOUT | {"init_args": _LORA_OPTIONS})  # in Python's form, or the command line's
_LORA = record(
    {"config": _LORA_OPTIONS, "layers": mapping_of(TEXT, row_of(whole(1, 2**20), real(-1e9, 1e9)))},
    {"experts": mapping_of(TEXT, each(COUNT)), "start": FLAG},
)
_CHECKPOINTS = record(
    {"best_model_path": TEXT}, {"best_k_models": mapping_of(TEXT, ANYTHING), "dirpath": either(NULL, TEXT)}
)
_CALLBACKS = {
    "EarlyStopping": record({"wait_count": COUNT, "stopped_epoch": COUNT, "patience": COUNT, "best_score": ANYTHING}),
    "ModelCheckpoint": _CHECKPOINTS,
    "StepCheckpoint": _CHECKPOINTS,
}
