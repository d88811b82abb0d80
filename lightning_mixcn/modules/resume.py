"""Resuming where checkpoint and configuration differ: settings that are taken from the configuration, or refused.

Lightning restores the settings of the optimizer and its schedule with their states. A run that is resumed with another
learning rate would go on with the old one. Here the configuration holds, and one line says what has changed.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.cli import LRSchedulerTypeUnion, ReduceLROnPlateau
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_mixcn.errors import UserError

from .checkpoint_schema import REMEDY, check_optimizer_states, schedule_steps
from .schedule import ScheduleOfRun, WarmupStableDecay

SETTINGS_KEY = "mixcn_settings"

# Of a scheduler: how far it has come, not how it is set.
_PROGRESS = {"last_epoch", "_step_count", "_last_lr", "_is_initial", "_get_lr_called_within_step", "verbose"}
_PLATEAU_PROGRESS = _PROGRESS | {"best", "num_bad_epochs", "cooldown_counter", "optimizer"}
# Shown as learning rates instead.
_SHOWN_ELSEWHERE = {"base_lrs"}
# Of a parameter group: what torch's schedules set. Their value of the present step counts, not the configured one.
_SCHEDULED = {"lr", "initial_lr", "betas", "momentum"}
_PLAIN_TYPES = (str, int, float, bool, type(None))
_NOT_SET = "not set"


class ConfiguredOptimization:
    """Optimizer and schedule as the configuration states them, kept apart from what a checkpoint restores.

    Args:
        optimizer: The optimizer, just made.
        make_scheduler: Makes its schedule, of known length, for any optimizer.
        make_optimizer: Makes an optimizer of parameters, to try settings on.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        make_scheduler: Callable[[Optimizer], LRSchedulerTypeUnion],
        make_optimizer: Callable[[Any], Optimizer],
    ) -> None:
        self._optimizer = _SettingsOnly(optimizer)
        self.rates = [_comparable(group["lr"]) for group in self._optimizer.param_groups]
        self._parameters = sum(len(group["params"]) for group in optimizer.param_groups)
        self.optimizer_name = _name(optimizer)
        self._scheduler = make_scheduler(self._optimizer)
        self._make_optimizer = make_optimizer
        # At step 0, before the schedule is advanced.
        self._start = [
            {key: _copy(value) for key, value in group.items() if key != "params"}
            for group in self._optimizer.param_groups
        ]

    def settings(self) -> dict[str, Any]:
        """Return what a checkpoint keeps beside the states, in plain values.

        Returns:
            Names of optimizer, schedule and the schedule's parts, and of each parameter group the learning rate and
            all settings as configured. Some optimizers (Prodigy, D-Adaptation, ScheduleFree) keep progress in their
            groups, so that a group's present values do not say how it was configured.
        """
        return {
            "optimizer": self.optimizer_name,
            "lr_scheduler": _name(self._scheduler),
            "lr_scheduler_parts": _part_names(self._scheduler),
            "lr": self.rates,
            "groups": [
                {key: plain for key, value in group.items() if _is_plain(plain := _comparable(value))}
                for group in self._start
            ],
        }

    def check(self, saved: Mapping[str, Any] | None) -> None:
        """Refuse a checkpoint whose optimizer has other states.

        Args:
            saved: Result of `settings` when the checkpoint was written; ``None`` for one that has none.

        Raises:
            ValueError: another class of optimizer, or another number of parameter groups.
        """
        if saved is None:
            return
        if saved["optimizer"] != self.optimizer_name:
            raise UserError(
                f"The checkpoint holds the states of {saved['optimizer']}, but `optimizer` is {self.optimizer_name}, "
                "which cannot go on with them. Set `model.init_args.optimizer` as it was; to train on with another "
                "optimizer, begin a new run with `model.init_args.adapter`"
            )
        if len(saved["lr"]) != len(self.rates):
            raise UserError(
                f"The checkpoint's optimizer has {len(saved['lr'])} parameter groups, here it has {len(self.rates)}. "
                "Make the same groups as in the run that wrote the checkpoint; the values of "
                "`model.init_args.learning_rates` may change, but both runs have it, or none"
            )

    def check_groups(self, saved: list[list[int]]) -> None:
        """Refuse the states of other parameters than the optimizer's.

        Args:
            saved: Number of parameters in each group of each optimizer in a checkpoint; empty for a sharded one.

        Raises:
            ValueError: another number of optimizers, groups or parameters.
        """
        if saved and (len(saved) != 1 or len(saved[0]) != len(self.rates) or sum(saved[0]) != self._parameters):
            groups = "; ".join(", ".join(map(str, sizes)) for sizes in saved)
            raise UserError(
                f"The checkpoint's optimizer_states have groups of {groups} parameters, expected {len(self.rates)} "
                f"groups of {self._parameters} in all. {REMEDY}"
            )

    def is_restorable(self, saved: Mapping[str, Any] | None) -> bool:
        """Tell whether the schedule and its parts are of the classes whose state the checkpoint holds."""
        if saved is None:
            return True
        here = (_name(self._scheduler), _part_names(self._scheduler))
        return (saved["lr_scheduler"], saved.get("lr_scheduler_parts", here[1])) == here

    def apply(
        self,
        optimizer: Optimizer,
        scheduler: LRSchedulerTypeUnion,
        saved: Mapping[str, Any] | None,
        schedule_state: Mapping[str, Any],
        global_step: int,
    ) -> list[str]:
        """Set a restored optimizer and its schedule as the configuration says.

        Args:
            optimizer: Optimizer with the checkpoint's states and settings.
            scheduler: Schedule of the optimizer.
            saved: Result of `settings` when the checkpoint was written.
            schedule_state: The state of the schedule in the checkpoint.
            global_step: Optimizer steps done.

        Returns:
            Changes, such as ``lr 0.001 → 1e-05``; none where all is as it was.

        Raises:
            ValueError: the optimizer's states do not allow a setting, or the schedule ends before the present step.
        """
        if isinstance(scheduler, ReduceLROnPlateau):
            return self._apply_plateau(optimizer, scheduler, saved, schedule_state)
        step = schedule_steps(schedule_state) if self.is_restorable(saved) else global_step
        advance(self._scheduler, step)
        changes = self._apply_groups(optimizer, step, saved)
        target = self._scheduler.state_dict()
        if saved is not None and not self.is_restorable(saved):
            changes.append(self._other_schedule(saved))
            scheduler.load_state_dict(target)
        elif different := list(_schedule_differences(schedule_state, target)):
            changes += _schedule_changes(scheduler, different)
            if isinstance(self._scheduler, WarmupStableDecay):
                changes += self._scheduler.departures(schedule_state)
            scheduler.load_state_dict(target)
        return list(dict.fromkeys(changes))

    def check_states(self, optimizer: Optimizer) -> None:
        """Check a restored optimizer of torch's own, whose next step would fail or be nonsense. Raises: ValueError."""
        if not type(optimizer).__module__.startswith("torch.optim") or not optimizer.state:
            return
        device = next(iter(optimizer.state)).device
        parameter = nn.Parameter(torch.zeros((2, 2), device=device))
        try:
            trial = self._make_optimizer([parameter])
            parameter.grad = torch.ones_like(parameter)
            trial.step()
        except Exception:  # a function that wants the model's own parameters, or LBFGS, whose steps want a closure
            return
        check_optimizer_states(optimizer, trial.state[parameter])

    def _other_schedule(self, saved: Mapping[str, Any]) -> str:
        names = (
            (saved["lr_scheduler"], saved.get("lr_scheduler_parts")),
            (_name(self._scheduler), _part_names(self._scheduler)),
        )
        old, new = (f"{name}({', '.join(parts)})" if parts else name for name, parts in names)
        return f"lr_scheduler {old} → {new}"

    def _apply_groups(
        self, optimizer: Optimizer, step: int, saved: Mapping[str, Any] | None, kept: frozenset[str] = frozenset()
    ) -> list[str]:
        """Set the parameter groups, and say what has changed; the configured schedule is at ``step``."""
        changes, curve = [], []
        groups = (optimizer.param_groups, self._optimizer.param_groups, self._start)
        older: list[dict[str, Any]] = [{} for _ in self._start]  # of an older checkpoint running values are compared
        for group, configured, start, before in zip(*groups, (saved or {}).get("groups", older), strict=True):
            unchanged = {key for key in before.keys() & start.keys() if _equal(before[key], _comparable(start[key]))}
            # Where the schedule has altered a value since the start, that value is the configured one.
            unchanged -= _SCHEDULED | {key for key, _, _ in _differences(start, configured, set())}
            different = list(_differences(group, configured, {"params", *kept, *unchanged}))
            if not different:
                continue
            self._try(group, start, optimizer, different)
            scheduled, of = "initial_lr" in group, f" of {group['name']}" if "name" in group else ""
            for key, old, new in different:
                if key == "lr" and scheduled:
                    curve.append(f"learning rate{of} of step {step} {_shown(old)} → {_shown(new)}")
                else:
                    changes.append(f"{'lr' if key == 'initial_lr' else key}{of} {_shown(old)} → {_shown(new)}")
                group[key] = _copy(configured[key])
            if {"fused", "capturable"} & {key for key, _, _ in different}:
                # These decide where a state's `step` is; loading puts it there.
                optimizer.load_state_dict(optimizer.state_dict())
        return changes + curve

    def _apply_plateau(
        self,
        optimizer: Optimizer,
        scheduler: LRSchedulerTypeUnion,
        saved: Mapping[str, Any] | None,
        schedule_state: Mapping[str, Any],
    ) -> list[str]:
        """Do the same for a schedule that follows a value: its reductions stay unless the rate is set again."""
        is_same_rate = saved is None or not list(_differences({"lr": saved["lr"]}, {"lr": self.rates}, set()))
        is_same_rate = is_same_rate and self.is_restorable(saved)
        changes = self._apply_groups(optimizer, 0, saved, frozenset({"lr"}) if is_same_rate else frozenset())
        configured = {key: value for key, value in vars(self._scheduler).items() if key not in _PLATEAU_PROGRESS}
        if saved is not None and not self.is_restorable(saved):
            return [*changes, self._other_schedule(saved)]
        for key, old, new in _differences(schedule_state, configured, set()):
            setattr(scheduler, key, new)
            changes += [f"{key} {_shown(old)} → {_shown(new)}"] if _is_plain(_comparable(old)) else []
            if key in ("monitor", "mode"):
                vars(scheduler).update(best=vars(self._scheduler)["best"], num_bad_epochs=0, cooldown_counter=0)
        return list(dict.fromkeys(changes))

    def _try(
        self,
        group: Mapping[str, Any],
        start: Mapping[str, Any],
        optimizer: Optimizer,
        different: list[tuple[str, Any, Any]],
    ) -> None:
        """Step an optimizer of one small parameter with the old settings, and then with the new ones.

        Args:
            group: The restored group.
            start: Configured settings of the group at step 0, at which an optimizer makes its states.
            optimizer: The restored optimizer.
            different: Key, old and new value of what is changed.

        Raises:
            ValueError: it cannot, since its states lack what the new ones need, such as Adam's ``amsgrad``.
        """
        trained = [parameter for parameter in group["params"] if parameter in optimizer.state]
        if not trained:
            return
        parameter = nn.Parameter(torch.zeros((2,) * max(1, trained[0].dim()), device=trained[0].device))
        try:
            trial = self._make_optimizer([parameter])
        except Exception:  # a function that wants the model's own parameters
            return
        settings = trial.param_groups[0]
        settings.update({key: _copy(value) for key, value in start.items()})
        if callable(train := getattr(trial, "train", None)):
            train()  # ScheduleFree's steps in no other mode
        old, new = {key: old for key, old, _ in different}, {key: new for key, _, new in different}
        try:
            for values in (old, new):
                settings.update({key: _copy(value) for key, value in values.items()})
                parameter.grad = torch.ones_like(parameter)
                trial.step()
        except (KeyError, RuntimeError, TypeError, AttributeError) as error:
            listed = ", ".join(f"{key} {_shown(old)} → {_shown(new)}" for key, old, new in different if key != "lr")
            raise UserError(
                f"The checkpoint's states of {self.optimizer_name} do not allow {listed} "
                f"({type(error).__name__}: {error}). Set `model.init_args.optimizer` as it was"
            ) from error


class _SettingsOnly(Optimizer):
    """Hold the parameter groups of an optimizer without its parameters, to be scheduled."""

    def __init__(self, of: Optimizer) -> None:
        groups = []
        for group in of.param_groups:
            settings = {key: _copy(value) for key, value in group.items() if key != "params"}
            groups.append(settings | {"params": [nn.Parameter(torch.zeros(1))]})
        super().__init__(groups, dict(of.defaults))
        self._opt_called = True  # else schedulers warn that it was not stepped

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # torch's has overloads
        """Do nothing."""


def advance(scheduler: LRSchedulerTypeUnion, steps: int) -> None:
    """Bring a new schedule to a step.

    Args:
        scheduler: Schedule at step 0.
        steps: Optimizer steps done.

    Raises:
        ValueError: it ends before.
    """
    if isinstance(scheduler, ScheduleOfRun):
        scheduler.go_to(steps)
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of schedulers in SequentialLR, about their own order of calls
            for _ in range(steps):
                scheduler.step()
    except ValueError as error:
        raise UserError(
            f"`lr_scheduler`: {_name(scheduler)} ends before step {steps}, at which the run is resumed ({error}). "
            "Raise its length"
        ) from error


def settings_changes(
    saved: Mapping[str, Any], present: Mapping[str, Any], *, apart: frozenset[str] = frozenset()
) -> list[str]:
    """List which of a module's arguments are others than in the run that wrote a checkpoint.

    Args:
        saved: The arguments in the checkpoint, plain data.
        present: The arguments here.
        apart: Names that are compared elsewhere.

    >>> settings_changes({"seed": 0, "lora": {"r": 4}}, {"seed": 1, "lora": {"r": 4}})
    ['seed 0 → 1']
    >>> settings_changes({"extra": None}, {"extra": {"a": 1}})
    ["extra null → {'a': 1}"]
    """
    # An argument that only one of them has came or went with a version.
    names = [name for name in present if name in saved and name not in apart and not name.startswith("_")]
    return [
        f"{key} {_shown(old)} → {_shown(new)}"
        for name in names
        for key, old, new in _nested_differences(name, saved[name], present[name])
    ]


def callback_changes(callbacks: list[Any], states: dict[str, Any]) -> list[str]:
    """Have callbacks' settings hold against a checkpoint's, in place, and list what has changed.

    Args:
        callbacks: Callbacks of the trainer.
        states: Their states in the checkpoint, by Lightning's key, which names a callback's class and settings.

    Returns:
        The changes; a callback that is set otherwise than the saved one starts without its state.
    """
    changes, keys = [], {callback.state_key for callback in callbacks}
    for callback in callbacks:
        state = states.get(callback.state_key)
        if isinstance(callback, EarlyStopping) and state and state["patience"] != callback.patience:
            changes.append(f"patience of EarlyStopping {state['patience']} → {callback.patience}")
            state["patience"] = callback.patience
        if state is None:
            of_class = [key for key in states if key.partition("{")[0] == type(callback).__qualname__]
            changes += [f"{key} → {callback.state_key}, which begins again" for key in of_class if key not in keys]
    return changes


def _nested_differences(name: str, saved: Any, present: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield dotted name, saved and present value of what differs; a mapping and something else differ as a whole."""
    if isinstance(saved, Mapping) and isinstance(present, Mapping) and saved and present:
        for key in dict.fromkeys((*saved, *present)):
            yield from _nested_differences(f"{name}.{key}", saved.get(key, _NOT_SET), present.get(key, _NOT_SET))
    elif not _equal(_comparable(saved), _comparable(present)):
        yield name, saved, present


def _schedule_differences(saved: Mapping[str, Any], present: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield key, saved and present value of a schedule's settings that differ; those of its parts one by one."""
    for key, old, new in _differences(saved, present, _PROGRESS):
        if key == "_schedulers" and len(old) == len(new):
            for index, parts in enumerate(zip(old, new, strict=True)):
                for inner, *values in _schedule_differences(*parts):
                    yield f"schedulers[{index}].{inner}", *values
        else:
            # SequentialLR's milestones and OneCycleLR's strategy are private by name only.
            yield key.lstrip("_"), old, new


def _schedule_changes(scheduler: LRSchedulerTypeUnion, different: list[tuple[str, Any, Any]]) -> list[str]:
    """Say what of a schedule has changed, at least that something has; peaks are said with the parameter groups."""
    different = [(key, old, new) for key, old, new in different if key.rpartition(".")[2] not in _SHOWN_ELSEWHERE]
    said = [f"{key} {_shown(old)} → {_shown(new)}" for key, old, new in different if _is_plain(_comparable(old))]
    return said if said or not different else [f"lr_scheduler {_name(scheduler)} is set otherwise"]


def _part_names(scheduler: Any) -> list[str]:
    """Name the schedules that a SequentialLR or ChainedScheduler consists of, depth first."""
    parts = getattr(scheduler, "_schedulers", ())
    return [name for part in parts for name in (_name(part), *_part_names(part))]


def _differences(
    saved: Mapping[str, Any], present: Mapping[str, Any], ignored: set[str]
) -> Iterator[tuple[str, Any, Any]]:
    """Yield key, saved and present value of what both have and is not the same."""
    for key, value in present.items():
        if key in saved and key not in ignored and not _equal(_comparable(saved[key]), _comparable(value)):
            yield key, saved[key], value


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        keys = (one.keys() | other.keys()) - _PROGRESS
        return all(key in one and key in other and _equal(one[key], other[key]) for key in keys)
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (one, other))
    return math.isclose(one, other, rel_tol=1e-9) if numbers else bool(one == other)


def _comparable(value: Any) -> Any:
    """Return numbers for tensors of one element, and lists for tuples: sharded checkpoints do not keep them apart."""
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else value.tolist()
    return [_comparable(item) for item in value] if isinstance(value, list | tuple) else value


def _is_plain(value: Any) -> bool:
    """Tell whether a comparable value can be written into a checkpoint and shown."""
    if isinstance(value, Mapping):
        return all(isinstance(key, str | int) and _is_plain(item) for key, item in value.items())
    return all(map(_is_plain, value)) if isinstance(value, list) else isinstance(value, _PLAIN_TYPES)


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _shown(value: Any) -> str:
    value = _comparable(value)
    if value is None:
        return "null"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _name(thing: object) -> str:
    """Name a class by its library and its name: where in the library it is defined changes with its version."""
    return f"{type(thing).__module__.partition('.')[0]}.{type(thing).__qualname__}"
