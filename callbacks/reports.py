"""Report the results of a run, an evaluation and a prediction."""

import json
import math
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_mixcn.arguments import Name, check_arguments
from lightning_mixcn.files.atomic import write_json, write_text
from lightning_mixcn.metrics import overall_bits_per_byte
from lightning_mixcn.modules.checks import source_names

from .adapter_checkpoint import AdapterCheckpoint
from .clocks import step_clock
from .data_monitor import DataMonitor
from .ending import next_steps, why_ended
from .host import causal_lm, plain_name

_TRAIN = "train/nll_nats_per_token"


class FitSummary(Callback):
    """Prints a table when `fit` ends: steps, tokens, speed, mixture, likelihoods, why it ended, results, what is next.

    Tokens are those of this process's steps, of all ranks, without padding; the duration is that of training with
    validation and checkpoints, and the speed is their quotient. Where `DataMonitor` runs, each source's share of all
    tokens of the run is printed beside the share that its weight asks for. Likelihoods are negative log-likelihoods in
    nats per token: of the first and the last training step, and of each validation source the last and the best.
    """

    def __init__(self) -> None:
        self._rows: list[tuple[str, str]] = []
        self._ended = ""
        self._first: float | None = None
        self._validations: dict[str, list[tuple[float, int]]] = {}  # source → likelihood and step

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse another kind of module, and find the run's clock."""
        causal_lm(self, pl_module)
        if stage == "fit":
            self._clock = step_clock(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget a run before."""
        self._ended = ""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget a run before."""
        self._first = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the first step's likelihood."""
        if self._first is None and trainer.global_step > self._clock.first_step:
            self._first = float(trainer.callback_metrics[_TRAIN])

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep each source's likelihood; the check before training has none."""
        if not trainer.sanity_checking:
            for source, result in causal_lm(self, pl_module).source_likelihoods.get("val", {}).items():
                kept = self._validations.setdefault(source, [])
                kept.append((result["nll_nats_per_token"], trainer.global_step))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the table's rows, while all ranks are there to be added up."""
        self._ended = why_ended(trainer)
        clock, seconds = self._clock, self._clock.total_seconds
        steps = trainer.global_step - clock.first_step
        if clock.tokens is None or steps == 0:
            return
        tokens = int(trainer.strategy.reduce(clock.tokens.clone(), reduce_op="sum"))
        before = f", {clock.first_step:,} before" if clock.first_step else ""
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
        if not self._ended:  # there was nothing to train
            rank_zero_info(f"Nothing was trained: {why_ended(trainer)}")
        if not self._rows:
            return
        rows = [*self._rows, ("ended", self._ended), *_results(trainer)]
        self._rows, self._validations = [], {}
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
    rows: list[tuple[str, str]] = []
    written: Path | None = None
    for saver in trainer.checkpoint_callbacks:
        path = getattr(saver, "last_model_path", "") or getattr(saver, "best_model_path", "")
        if path:
            rows.append(("checkpoint", path))
    # Lightning's Trainer has this attribute from another class, which types do not know.
    callbacks: list[Callback] = getattr(trainer, "callbacks", [])
    for callback in callbacks:
        if isinstance(callback, AdapterCheckpoint):
            folder = Path(trainer.default_root_dir, callback.folder)
            if folder.is_dir():
                rows.append(("adapter", str(folder)))
                written = folder
    return rows + next_steps(trainer, written)


class EvaluationReport(Callback):
    """Writes ``validate.json`` or ``test.json`` into the run's folder: each source's likelihood, tokens and bytes.

    ``bits_per_byte`` beside ``sources`` is that of all of them together, by their bytes.

    Validation inside `fit` goes to TensorBoard and is not written here.
    """

    run_files = ("validate.json", "test.json")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse another kind of module."""
        causal_lm(self, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write ``validate.json``."""
        if trainer.state.fn == "validate":
            self._write(trainer, pl_module, "val", "validate.json")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write ``test.json``."""
        self._write(trainer, pl_module, "test", "test.json")

    def _write(self, trainer: Trainer, pl_module: LightningModule, stage: str, name: str) -> None:
        if not trainer.is_global_zero:
            return
        module = causal_lm(self, pl_module)
        sources = {
            # A source of no bytes has no bits per byte; JSON has no NaN.
            source: dict(result) | ({} if result["bytes"] else {"bits_per_byte": None})
            for source, result in module.source_likelihoods[stage].items()
        }
        report = {
            "bits_per_byte": overall_bits_per_byte(module.source_likelihoods[stage].values()),
            "sources": sources,
            "base": module.base,
            "quantization": module.quantization,
            "adapter": module.adapter,
            # `last.ckpt` is a link.
            "checkpoint": None if trainer.ckpt_path is None else str(Path(trainer.ckpt_path).resolve()),
            "steps_trained": module.steps_trained,
        }
        path = Path(trainer.default_root_dir, name)
        write_json(path, report)


# source, document -> nats, text nats, tokens, bytes
_Sums = dict[tuple[int, int], tuple[float, float, int, int]]


class PredictionWriter(Callback):
    """Writes one JSON line a document: nats, tokens, bytes and bits per byte, in the order of the evaluation data.

    ``nats`` is over all labels, the end of the document included, ``text_nats`` over its text; ``bits_per_byte`` is
    ``text_nats`` / ln 2 / ``bytes``. Pieces of a document in several rows, and on several ranks, are put together.

    Args:
        filename: Name of the file inside ``trainer.default_root_dir``.
    """

    def __init__(self, filename: Name = "predictions.jsonl") -> None:
        check_arguments(PredictionWriter, locals())
        self.filename = plain_name("filename", filename, ["predictions.jsonl"])
        self.run_files = (filename,)
        self._sums: _Sums = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse another kind of module."""
        causal_lm(self, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget a run before."""
        self._sums = {}

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add the pieces in a batch."""
        columns = (column.tolist() for column in outputs)
        for source, document, *values in zip(*columns, strict=True):
            _add(self._sums, (source, document), tuple(values))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the ranks' pieces together and write the file."""
        merged: _Sums = {}
        for sums in _gather(self._sums):
            for key, values in sums.items():
                _add(merged, key, values)
        if trainer.is_global_zero:
            names = source_names(trainer, "predict")
            path = Path(trainer.default_root_dir, self.filename)
            write_text(path, "".join(_line(names[key[0]], key[1], merged[key]) for key in sorted(merged)))
            rank_zero_info(f"predictions: {path}")


def _add(sums: _Sums, key: tuple[int, int], values: Any) -> None:
    before = sums.get(key, (0.0, 0.0, 0, 0))
    nats, text_nats, tokens, size = (old + new for old, new in zip(before, values, strict=True))
    sums[key] = (nats, text_nats, tokens, size)


def _gather(sums: _Sums) -> list[_Sums]:
    """Gather the sums of all ranks on every rank."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [sums]
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, sums)
    return gathered


def _line(source: str, document: int, values: tuple[float, float, int, int]) -> str:
    nats, text_nats, tokens, size = values
    record = {
        "source": source,
        "index": document,
        "nats": nats,
        "text_nats": text_nats,
        "tokens": tokens,
        "bytes": size,
        "bits_per_byte": text_nats / math.log(2) / size if size else None,
    }
    return json.dumps(record, ensure_ascii=False) + "\n"
