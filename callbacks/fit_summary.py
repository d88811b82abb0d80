"""What came out of a run, when `fit` ends."""

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from time import perf_counter
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from .adapter_checkpoint import AdapterCheckpoint
from .data_monitor import DataMonitor
from .host import causal_lm

_TRAIN = "train/nll_nats_per_token"


class FitSummary(Callback):
    """Prints a table when `fit` ends: steps, tokens, duration, speed, mixture, likelihoods, and where the results are.

    Tokens are those of this process's steps, of all ranks, without padding; the duration is that of training with
    validation and checkpoints, and the speed is their quotient. Where `DataMonitor` runs, each source's share of all
    tokens of the run is printed beside the share that its weight asks for. Likelihoods are negative log-likelihoods in
    nats per token: of the first and the last training step, and of each validation source the last and the best.
    """

    def __init__(self) -> None:
        self._tokens: Tensor | None = None
        self._rows: list[tuple[str, str]] = []
        self._first: float | None = None
        self._validations: dict[str, list[tuple[float, int]]] = {}  # source → likelihood and step

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse another kind of module."""
        causal_lm(self, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._tokens, self._first = None, None
        self._start, self._started_at = perf_counter(), trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Mapping[str, Tensor], batch_idx: int
    ) -> None:
        """Count tokens on the device, and keep the first step's likelihood."""
        tokens = (batch["document_ids"] >= 0).sum()
        self._tokens = tokens if self._tokens is None else self._tokens + tokens
        if self._first is None and trainer.global_step > self._started_at:
            self._first = float(trainer.callback_metrics[_TRAIN])

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep each source's likelihood; the check before training has none."""
        if not trainer.sanity_checking:
            for source, result in causal_lm(self, pl_module).source_likelihoods.get("val", {}).items():
                kept = self._validations.setdefault(source, [])
                kept.append((result["nll_nats_per_token"], trainer.global_step))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the table's rows, while all ranks are there to be added up."""
        seconds, steps = perf_counter() - self._start, trainer.global_step - self._started_at
        if self._tokens is None or steps == 0:
            return
        # Under tensor parallelism several ranks read the same rows.
        replicas = (trainer.distributed_sampler_kwargs or {}).get("num_replicas", trainer.world_size)
        summed = trainer.strategy.reduce(self._tokens.clone(), reduce_op="sum")
        tokens = int(summed) // (trainer.world_size // replicas)
        before = f", {self._started_at:,} before" if self._started_at else ""
        self._rows = [
            ("steps", f"{steps:,}{before}"),
            ("tokens", f"{tokens:,}"),
            ("duration", str(timedelta(seconds=round(seconds)))),
            ("tokens per second", f"{tokens / seconds:,.1f}"),
        ]
        self._rows += _mixture(trainer)
        if self._first is not None:
            last = float(trainer.callback_metrics[_TRAIN])
            self._rows.append(("train nll", f"{self._first:.4f} → {last:.4f} nats per token"))
        for source, kept in self._validations.items():
            (last, _), (best, step) = kept[-1], min(kept)
            self._rows.append((f"val {source} nll", f"{last:.4f} nats per token, best {best:.4f} at step {step:,}"))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print, now that every other callback has written its files."""
        if not self._rows:
            return
        rows, self._rows, self._validations = self._rows + _results(trainer), [], {}
        width = max(len(name) for name, _ in rows)
        rank_zero_info("\n".join(f"{name:<{width}}  {value}" for name, value in rows))


def _mixture(trainer: Trainer) -> list[tuple[str, str]]:
    callbacks: list[Callback] = getattr(trainer, "callbacks", [])
    data: Any = getattr(trainer, "datamodule", None)
    rows = []
    for callback in callbacks:
        if isinstance(callback, DataMonitor) and (shares := callback.shares(data)):
            ended = data.ended_sources()
            rows += [
                (f"tokens of {name}", f"{share:.1%}, asked for {asked:.1%}{' until it ended' if name in ended else ''}")
                for name, (share, asked) in shares.items()
            ]
    return rows


def _results(trainer: Trainer) -> list[tuple[str, str]]:
    rows = []
    for saver in trainer.checkpoint_callbacks:
        path = getattr(saver, "last_model_path", "") or getattr(saver, "best_model_path", "")
        if path:
            rows.append(("checkpoint", path))
    # Lightning's Trainer has this attribute from another class, which types do not know.
    callbacks: list[Callback] = getattr(trainer, "callbacks", [])
    for callback in callbacks:
        if isinstance(callback, AdapterCheckpoint):
            folder = Path(trainer.default_root_dir, callback.folder)
            rows += [("adapter", str(folder))] if folder.is_dir() else []
    return rows
