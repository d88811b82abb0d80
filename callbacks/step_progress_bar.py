"""A progress bar that knows how long the run is."""

from lightning.pytorch.callbacks import TQDMProgressBar


class StepProgressBar(TQDMProgressBar):
    """Lightning's bar, whose total is that of the run.

    Lightning mixes micro-batches done with optimizer steps to do, which differ when gradients are accumulated.
    """

    @property
    def total_train_batches(self) -> int | float:
        """Micro-batches on this rank until ``max_steps``, or in the epoch where that is fewer."""
        trainer = self.trainer
        if trainer.max_steps < 0:
            return trainer.num_training_batches
        return min(trainer.num_training_batches, trainer.max_steps * trainer.accumulate_grad_batches)
