"""Learning rate: linear warm-up, then a cosine, or a constant rate and a decay at the end."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from lightning.pytorch.cli import LRSchedulerTypeUnion, ReduceLROnPlateau
from lightning.pytorch.utilities.types import LRSchedulerConfigType, OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_mixcn.arguments import MOST_STEPS, Between, Share, Steps, check_arguments
from lightning_mixcn.errors import UserError

# A whole number counts steps, a number below 1 is a fraction of the run.
StepsOrFraction = (
    Annotated[int, Between(0, MOST_STEPS, "steps")] | Annotated[float, Between(0, 1, "of the run", excluded=(1,))]
)


class ScheduleOfRun(LRScheduler, ABC):
    """Schedule whose learning rate is the peak times a factor of the step and of the length of the run.

    Args:
        optimizer: Optimizer to schedule; each group's own ``lr`` is its peak.
        total_steps: Optimizer steps of the run, or null until `set_total_steps`.
    """

    # They belong to the configuration, so that a resumed run may be made longer. A checkpoint has them to compare with.
    _configured: ClassVar[tuple[str, ...]]

    def __init__(self, optimizer: Optimizer, total_steps: int | None) -> None:
        self.total_steps: int | None = None
        super().__init__(optimizer)
        if total_steps is not None:
            self.set_total_steps(total_steps)

    @abstractmethod
    def factor(self, step: int) -> float:
        """Return a step's learning rate (from step 0) as a fraction of the peak; constant after the last step."""

    def set_total_steps(self, total_steps: int, *, is_trial: bool = False) -> None:
        """Fix the length of the run and set the learning rates of its present step.

        Args:
            total_steps: Optimizer steps, at least one.
            is_trial: A run of `fast_dev_run`, whose few steps need not hold all parts of a schedule.

        Raises:
            ValueError: ``total_steps`` is below one, which is what an unlimited run (``max_steps: -1``) has.
        """
        if total_steps < 1:
            raise UserError(
                f"`trainer.max_steps={total_steps}`: {type(self).__name__} needs the number of optimizer steps. "
                "Set `trainer.max_steps`, `trainer.max_epochs`, or `total_steps` of the scheduler"
            )
        self.total_steps = total_steps
        self._set_rates()

    def go_to(self, step: int) -> None:
        """Set the learning rates of a step (from 0), as if it had been reached."""
        self.last_epoch = step
        self._set_rates()

    def get_lr(self) -> list[float | Tensor]:
        """Return the learning rate of each parameter group for the present step.

        Raises:
            ValueError: stepped before the length of the run was known.
        """
        if self.total_steps is None:
            if self.last_epoch > 0:
                name = type(self).__name__
                raise UserError(f"`total_steps` of {name} is not set. Pass it, or call `set_total_steps` first")
            return list(self.base_lrs)
        return [base * self.factor(self.last_epoch) for base in self.base_lrs]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the progress; the shape of the curve is the configuration's."""
        super().load_state_dict({key: value for key, value in state_dict.items() if key not in self._configured})

    def _set_rates(self) -> None:
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = rate
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]


class WarmupCosine(ScheduleOfRun):
    """Linear warm-up to the optimizer's learning rate, then half a cosine down.

    Step s of N (counted from 0, W of them warm-up) has the learning rate times (s + 1) / (W + 1) while s < W, and after
    it times f + (1 − f) · (1 + cos(π · (s − W) / (N − W))) / 2. Neither the first nor the last step is at zero.

    Args:
        optimizer: Optimizer to schedule; each group's own ``lr`` is its peak.
        warmup_fraction: Fraction of all steps spent on warm-up, in [0, 1); 0.05 as in the Chinese-Mixtral paper.
        final_fraction: Learning rate at the end as a fraction of the peak, in [0, 1]; 0.1, since a rate near zero
            learns nothing from the text it still costs.
        total_steps: Optimizer steps of the run. The module gives ``trainer.max_steps`` where this is null.

    Raises:
        ValueError: a fraction outside its range, or ``total_steps`` below one.
    """

    _configured = ("total_steps", "warmup_fraction", "final_fraction")

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_fraction: Share = 0.05,
        final_fraction: Annotated[float, Between(0, 1)] = 0.1,
        total_steps: Steps | None = None,
    ) -> None:
        """Set the learning rates of the first step."""
        check_arguments(WarmupCosine, locals())
        self.warmup_fraction = warmup_fraction
        self.final_fraction = final_fraction
        super().__init__(optimizer, total_steps)

    def factor(self, step: int) -> float:
        """Return a step's learning rate (from step 0) as a fraction of the peak; constant after the last step."""
        assert self.total_steps is not None
        warmup = round(self.warmup_fraction * self.total_steps)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = min(1.0, (step - warmup) / max(1, self.total_steps - warmup))
        return self.final_fraction + (1 - self.final_fraction) * (1 + math.cos(math.pi * progress)) / 2


class WarmupStableDecay(ScheduleOfRun):
    """Linear warm-up to the optimizer's learning rate, which then stays until it decays at the end (WSD).

    Step s of N (counted from 0, W of them warm-up, the last D of them decay) has the learning rate times
    (s + 1) / (W + 1) while s < W, times 1 until step N − D, and from there times f + (1 − f) · (1 − √p), or
    f + (1 − f) · (1 − p), with p = (s − N + D) / D: Hägele et al. 2024 (arXiv 2405.18392), whose decays reach the
    cosine's loss, 1 − √p the better of the two.

    The rate before the decay does not depend on N. A run that is stopped there can be resumed with more steps, as the
    infinite schedules of arXiv 2503.05029 are, and is then exactly one that was planned so from the start, where
    `warmup` is a number of steps; otherwise the line at resume says why not.

    Args:
        optimizer: Optimizer to schedule; each group's own ``lr`` is its peak.
        warmup: Warm-up: a whole number of steps, or a fraction of the run below 1; 0.05 as in `WarmupCosine`.
        decay: Decay at the end: a whole number of steps, or a fraction of the run below 1; 0.2 as in the paper.
        decay_shape: Shape of the decay: ``sqrt`` for 1 − √p, ``linear`` for 1 − p.
        decay_to: Learning rate after the last step as a fraction of the peak, in [0, 1]; 0 as in the paper.
        total_steps: Optimizer steps of the run. The module gives ``trainer.max_steps`` where this is null.

    Raises:
        ValueError: a value outside its range, or warm-up and decay that are longer than the run.
    """

    # `decay_to` has a name of its own: jsonargparse would keep the default of WarmupCosine's `final_fraction`.
    _configured = ("total_steps", "warmup", "decay", "decay_shape", "decay_to")

    def __init__(
        self,
        optimizer: Optimizer,
        warmup: StepsOrFraction = 0.05,
        decay: StepsOrFraction = 0.2,
        decay_shape: Literal["sqrt", "linear"] = "sqrt",
        decay_to: Annotated[float, Between(0, 1)] = 0.0,
        total_steps: Steps | None = None,
    ) -> None:
        """Set the learning rates of the first step."""
        check_arguments(WarmupStableDecay, locals())
        self.warmup = warmup
        self.decay = decay
        self.decay_shape = decay_shape
        self.decay_to = decay_to
        super().__init__(optimizer, total_steps)

    def set_total_steps(self, total_steps: int, *, is_trial: bool = False) -> None:
        """Fix the length of the run, see the base class. Raises: ValueError if warm-up and decay are longer."""
        super().set_total_steps(total_steps)
        if (needed := self._warmup_steps + self._decay_steps) > total_steps and not is_trial:
            raise UserError(
                f"WarmupStableDecay: `warmup={self.warmup}` and `decay={self.decay}` are {needed} steps, but the run "
                f"has {total_steps}. Shorten them, or raise `trainer.max_steps`"
            )

    def factor(self, step: int) -> float:
        """Return a step's learning rate (from step 0) as a fraction of the peak; constant after the last step."""
        warmup, decay = self._warmup_steps, self._decay_steps
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if step <= self._decay_start or not decay:
            return 1.0
        progress = min(1.0, (step - self._decay_start) / decay)
        remaining = 1 - (math.sqrt(progress) if self.decay_shape == "sqrt" else progress)
        return self.decay_to + (1 - self.decay_to) * remaining

    def departures(self, saved: Mapping[str, Any]) -> list[str]:
        """Say why a run that is resumed with another length is not one that was planned so from the start.

        Args:
            saved: State of this class of schedule in the checkpoint.

        Returns:
            One remark; none where the steps so far had the learning rates that they have here.
        """
        if saved["total_steps"] in (None, self.total_steps):
            return []
        of_checkpoint = {name: saved[name] for name in self._configured}
        before, done = WarmupStableDecay(SGD([nn.Parameter(torch.zeros(1))]), **of_checkpoint), saved["last_epoch"]
        reasons = []
        if before._warmup_steps != self._warmup_steps:
            reasons.append("the warm-up was another (give `warmup` in steps)")
        # The first step of a decay still has the peak.
        if done > 1 + min(before._decay_start, self._decay_start):
            reasons.append("the decay had begun")
        return [f"unlike a run of {self.total_steps} steps from the start: {', '.join(reasons)}"] if reasons else []

    @property
    def _warmup_steps(self) -> int:
        return _steps_of(self.warmup, self.total_steps)

    @property
    def _decay_steps(self) -> int:
        return _steps_of(self.decay, self.total_steps)

    @property
    def _decay_start(self) -> int:
        assert self.total_steps is not None
        return self.total_steps - self._decay_steps


def _steps_of(length: float, total_steps: int | None) -> int:
    """Return a length in steps, which is a number of them or a fraction of all."""
    assert total_steps is not None
    return round(length if length >= 1 else length * total_steps)


def known_length(scheduler: LRSchedulerTypeUnion, max_steps: int, *, is_trial: bool = False) -> LRSchedulerTypeUnion:
    """Give a schedule of this package without a length that of the run.

    Args:
        scheduler: Any schedule.
        max_steps: `trainer.max_steps`. Not the trainer's `estimated_stepping_batches`: reading that makes Lightning
            drop the data loader's state (its issue 20550).
        is_trial: `trainer.fast_dev_run`.

    Returns:
        The same schedule.
    """
    if isinstance(scheduler, ScheduleOfRun) and scheduler.total_steps is None:
        scheduler.set_total_steps(max_steps, is_trial=is_trial)
    return scheduler


def scheduled(
    optimizer: Optimizer, scheduler: LRSchedulerTypeUnion, val_check_interval: int | float | None
) -> OptimizerLRScheduler:
    """Return optimizer and schedule as Lightning's `configure_optimizers` does.

    Args:
        optimizer: The optimizer.
        scheduler: Schedule of the optimizer, stepped once a step; one that follows a value, after each validation.
        val_check_interval: `trainer.val_check_interval`: micro-batches, or a fraction of an epoch or None for a time,
            after which a schedule that follows a value is stepped once an epoch.
    """
    if not isinstance(scheduler, ReduceLROnPlateau):
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
    follows: LRSchedulerConfigType = {"scheduler": scheduler, "monitor": scheduler.monitor}
    if isinstance(val_check_interval, int):
        # An epoch of a stream has no end. Lightning counts micro-batches in both, and validates first.
        follows |= {"interval": "step", "frequency": val_check_interval}
    return {"optimizer": optimizer, "lr_scheduler": follows}
