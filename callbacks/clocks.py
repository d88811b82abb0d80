"""Time, waiting and tokens of a run, counted once for all callbacks that show them, and the progress bar."""

from collections import defaultdict
from collections.abc import Mapping
from datetime import timedelta
from time import perf_counter
from typing import Annotated, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.profilers import Profiler
from torch import Tensor

from lightning_mixcn.arguments import Between, check_arguments


class StepClock(Callback):
    """Counts time and tokens of `fit`, and logs ``throughput/tokens_per_second`` of each optimizer step.

    Other callbacks find it with `step_clock`, and read it once training has started. A step's seconds are waiting for
    data, forward, backward and update; validation, samples and checkpoints are not in them.
    """

    def __init__(self) -> None:
        self.tokens: Tensor | None = None  # of this rank in this process, without padding; on the device
        self.first_step = 0  # optimizer steps done when training started
        self.training_seconds = 0.0  # of all steps in this process
        self._step = 0
        self._step_seconds = self._waited_seconds = 0.0
        self._started = self._batch_started = self._validation_started = self._validation_seconds = 0.0
        self._fetching: _FetchClock | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Listen where the trainer tells its profiler of its waiting."""
        if stage == "fit" and self._fetching is None:
            host: Any = trainer  # its attributes that Lightning sets outside of the class have no types
            self._fetching = host.profiler = _FetchClock(host.profiler)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start."""
        self.tokens, self.first_step, self.training_seconds = None, trainer.global_step, 0.0
        self._step, self._step_seconds, self._validation_seconds = trainer.global_step, 0.0, 0.0
        self._waited_seconds, self._started = self.waited_seconds, perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop for a validation."""
        self._validation_started = perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on."""
        self._validation_seconds += perf_counter() - self._validation_started

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start a micro-batch."""
        self._batch_started = perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add up the micro-batch, and log where it ended a step."""
        waited = self.waited_seconds
        seconds = perf_counter() - self._batch_started + waited - self._waited_seconds
        self._waited_seconds = waited
        self.training_seconds += seconds
        self._step_seconds += seconds
        if isinstance(batch, Mapping) and "document_ids" in batch:
            tokens = (batch["document_ids"] >= 0).sum()
            self.tokens = tokens if self.tokens is None else self.tokens + tokens
        if trainer.global_step > self._step:
            of_step: float | None = getattr(pl_module, "tokens_of_step", None)  # a CausalLMModule's
            if of_step is not None and self._step_seconds:
                # On the host: a plain number Lightning would move to the device, and read back for the progress bar.
                speed = torch.tensor(of_step / self._step_seconds)
                pl_module.log("throughput/tokens_per_second", speed, prog_bar=True)
            self._step, self._step_seconds = trainer.global_step, 0.0

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the trainer its profiler back."""
        if self._fetching is not None:
            host: Any = trainer
            host.profiler = self._fetching.profiler
            self._fetching = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the trainer its profiler back."""
        self.teardown(trainer, pl_module, "fit")

    @property
    def waited_seconds(self) -> float:
        """Seconds in which the training loop had asked for a batch and had not got it."""
        return 0.0 if self._fetching is None else self._fetching.seconds

    @property
    def seconds(self) -> float:
        """Seconds since training started, without validation; callbacks and checkpoints are in it."""
        return self.total_seconds - self._validation_seconds

    @property
    def total_seconds(self) -> float:
        """Seconds since training started."""
        return perf_counter() - self._started

    def seconds_left(self, trainer: Trainer) -> float | None:
        """Estimate the seconds to the run's end from all it has spent: validation and checkpoints come again, too.

        Args:
            trainer: Trainer of the run.

        Returns:
            ``None`` before the first step of this process, or where the run has no end.
        """
        steps = trainer.global_step - self.first_step
        if steps <= 0 or trainer.max_steps < 0:
            return None
        return self.total_seconds / steps * max(0, trainer.max_steps - trainer.global_step)


def step_clock(trainer: Trainer) -> StepClock:
    """Return the trainer's clock; the first callback to ask, in its `setup`, puts one before all callbacks.

    Args:
        trainer: Trainer that is being set up to fit.
    """
    host: Any = trainer
    clock = next((callback for callback in host.callbacks if isinstance(callback, StepClock)), None)
    if clock is None:
        clock = StepClock()
        host.callbacks = [clock, *host.callbacks]
    clock.setup(trainer, host.lightning_module, "fit")
    return clock


# Lightning 2.6 tells the trainer's profiler of each call to the training loader by a name that ends so.
_FETCH = "].train_dataloader_next"


class _FetchClock(Profiler):
    """Adds up, in front of a trainer's profiler, the time between the loop's asking for a batch and getting it.

    That is where Lightning's own profilers measure: no validation, checkpoint, log or copy to the device is in it. The
    batch that Lightning fetches before the first step, while workers start, is not counted.

    Args:
        profiler: Profiler of the trainer; it gets every call, too.
    """

    # `Any`: the command line offers every Profiler wherever one is asked for, so this class inside itself without end.
    def __init__(self, profiler: Any) -> None:
        super().__init__()
        self.profiler: Profiler = profiler
        self.seconds = 0.0
        self._asked = 0.0

    def start(self, action_name: str) -> None:
        """Start an action."""
        self.profiler.start(action_name)
        if action_name.endswith(_FETCH):
            self._asked = perf_counter()

    def stop(self, action_name: str) -> None:
        """End an action."""
        if action_name.endswith(_FETCH):
            self.seconds += perf_counter() - self._asked
        self.profiler.stop(action_name)

    def summary(self) -> str:
        """Return the report of the trainer's profiler."""
        return self.profiler.summary()


class PhaseClock:
    """Adds up the time between marks.

    On CUDA a mark is an event in the stream, and nothing waits for it until the sums are asked for: a phase then lasts
    from when the device has reached its mark until it has reached the next one, the host's delays included.

    Args:
        device: Device that runs the phases.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[str, Any]] = []

    def mark(self, phase: str) -> None:
        """Begin a phase, and end the one before it."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch leaves it untyped
            event.record(torch.cuda.current_stream(self._device))
            self._marks.append((phase, event))
        else:
            self._marks.append((phase, perf_counter()))

    def take(self) -> dict[str, float]:
        """Return the seconds of each phase that has ended since the last call; on CUDA wait for the last mark."""
        if self._device.type == "cuda" and self._marks:
            self._marks[-1][1].synchronize()
        seconds: dict[str, float] = defaultdict(float)
        for (phase, start), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            seconds[phase] += start.elapsed_time(end) / 1000 if self._device.type == "cuda" else end - start
        self._marks = self._marks[-1:]
        return dict(seconds)


# Logged values that the bar shows: their short names and formats.
_SHORT = {
    "train/nll_nats_per_token": ("nll_nats", "{:.3f}"),
    "throughput/tokens_per_second": ("tokens/s", "{:,.0f}"),
}


class StepProgressBar(TQDMProgressBar):
    """Lightning's bar, whose total is that of the run, with optimizer step, likelihood, speed and time left.

    Lightning mixes micro-batches done with optimizer steps to do, which differ when gradients are accumulated, and in a
    resumed run it takes the earlier batches for ones that took no time.

    Args:
        refresh_rate: Batches between updates of the bar; 0 shows none.
        process_position: Number of lines below which the bar is drawn, for several runs in one terminal.
        leave: Keep the bar of a finished epoch on the screen.
    """

    _clock: StepClock | None = None

    def __init__(
        self,
        refresh_rate: Annotated[int, Between(0, 10**6)] = 1,
        process_position: Annotated[int, Between(0, 1000)] = 0,
        leave: bool = False,
    ) -> None:
        check_arguments(StepProgressBar, locals())
        super().__init__(refresh_rate, process_position, leave)

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

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """End the lines of the bars, lest that of the error begins in one."""
        for bar in (self._val_progress_bar, self._train_progress_bar):
            if bar is not None:
                bar.close()
