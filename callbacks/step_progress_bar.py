"""A progress bar that knows how long the run is, and shows the figures that matter."""

from datetime import timedelta

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from .clocks import StepClock, step_clock

# What the bar shows of what is logged for it, and how.
_SHORT = {
    "train/nll_nats_per_token": ("nll_nats", "{:.3f}"),
    "throughput/tokens_per_second": ("tokens/s", "{:,.0f}"),
}


class StepProgressBar(TQDMProgressBar):
    """Lightning's bar, whose total is that of the run, with optimizer step, likelihood, speed and time left.

    Lightning mixes micro-batches done with optimizer steps to do, which differ when gradients are accumulated, and in a
    resumed run it takes the batches before for ones that took no time.
    """

    _clock: StepClock | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the clock of the time left."""
        super().setup(trainer, pl_module, stage)
        self._clock = step_clock(trainer) if stage == "fit" else None

    @property
    def total_train_batches(self) -> int | float:
        """Micro-batches on this rank until ``max_steps``, or in the epoch where that is fewer."""
        trainer = self.trainer
        if trainer.max_steps < 0:
            return trainer.num_training_batches
        return min(trainer.num_training_batches, trainer.max_steps * trainer.accumulate_grad_batches)

    def init_train_tqdm(self) -> Tqdm:
        """Make the bar without tqdm's own guess of the time left."""
        bar = super().init_train_tqdm()
        bar.bar_format = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
        return bar

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Return the figures at the end of the bar."""
        items = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        for tag, (name, layout) in _SHORT.items():
            if tag in items:
                items[name] = layout.format(items.pop(tag))
        seconds = None if self._clock is None else self._clock.seconds_left(trainer)
        if seconds is not None:
            items |= {
                "step": f"{trainer.global_step}/{trainer.max_steps}",
                "left": str(timedelta(seconds=round(seconds))),
            }
        return items
