"""Learning rate: linear warm-up, then a cosine, both by fraction of the run."""

import math
from typing import Annotated, Any

from lightning.pytorch.cli import LRSchedulerTypeUnion, ReduceLROnPlateau
from lightning.pytorch.utilities.types import LRSchedulerConfigType, OptimizerLRScheduler
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_mixcn.arguments import Between, Share, Steps, check_arguments
from lightning_mixcn.errors import UserError

# They belong to the configuration, so that a resumed run may be made longer. A checkpoint has them to compare with.
_CONFIGURED = ("total_steps", "warmup_fraction", "final_fraction")


class WarmupCosine(LRScheduler):
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
        self.total_steps: int | None = None
        super().__init__(optimizer)
        if total_steps is not None:
            self.set_total_steps(total_steps)

    def set_total_steps(self, total_steps: int) -> None:
        """Fix the length of the run and set the learning rates of its present step.

        Args:
            total_steps: Optimizer steps, at least one.

        Raises:
            ValueError: ``total_steps`` is below one, which is what an unlimited run (``max_steps: -1``) has.
        """
        if total_steps < 1:
            raise UserError(
                f"`trainer.max_steps={total_steps}`: WarmupCosine needs the number of optimizer steps. "
                "Set `trainer.max_steps`, `trainer.max_epochs`, or `total_steps` of the scheduler"
            )
        self.total_steps = total_steps
        self._set_rates()

    def go_to(self, step: int) -> None:
        """Set the learning rates of a step (from 0), as if it had been reached."""
        self.last_epoch = step
        self._set_rates()

    def factor(self, step: int) -> float:
        """Return a step's learning rate (from step 0) as a fraction of the peak; constant after the last step."""
        assert self.total_steps is not None
        warmup = round(self.warmup_fraction * self.total_steps)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = min(1.0, (step - warmup) / max(1, self.total_steps - warmup))
        return self.final_fraction + (1 - self.final_fraction) * (1 + math.cos(math.pi * progress)) / 2

    def get_lr(self) -> list[float | Tensor]:
        """Return the learning rate of each parameter group for the present step.

        Raises:
            ValueError: stepped before the length of the run was known.
        """
        if self.total_steps is None:
            if self.last_epoch > 0:
                raise UserError("`total_steps` of WarmupCosine is not set. Pass it, or call `set_total_steps` first")
            return list(self.base_lrs)
        return [base * self.factor(self.last_epoch) for base in self.base_lrs]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the progress; the shape of the curve is the configuration's."""
        super().load_state_dict({key: value for key, value in state_dict.items() if key not in _CONFIGURED})

    def _set_rates(self) -> None:
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = rate
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]


def known_length(scheduler: LRSchedulerTypeUnion, max_steps: int) -> LRSchedulerTypeUnion:
    """Give a `WarmupCosine` without a length that of the run.

    Args:
        scheduler: Any schedule.
        max_steps: `trainer.max_steps`. Not the trainer's `estimated_stepping_batches`: reading that makes Lightning
            drop the data loader's state (its issue 20550).

    Returns:
        The same schedule.
    """
    if isinstance(scheduler, WarmupCosine) and scheduler.total_steps is None:
        scheduler.set_total_steps(max_steps)
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
