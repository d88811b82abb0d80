"""A callback that writes down what a run did, for the demo's report."""

import json
import os
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_mixcn.model import bytes_in_memory, count_parameters

FACTS_FILE = "facts.json"


class RunFacts(Callback):
    """Write ``facts.json`` into the run's folder: size of the model, tokens, speed and each validation's likelihoods.

    It holds ``parameters`` (total, trainable, quantised), ``bytes_in_memory``, ``tokens_seen`` (positions that are not
    padding), ``training_seconds`` (steps and waiting for data; no validation, no samples), ``tokens_per_second``, and
    ``validations``: a list of ``step`` and ``sources``, which has ``nll_nats_per_token``, ``bits_per_byte``, ``tokens``
    and ``bytes`` by source.
    """

    def __init__(self) -> None:
        self._tokens_seen = 0
        self._training_seconds = 0.0
        self._mark: float | None = None
        self._validations: list[dict[str, Any]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock at the first step."""
        if self._mark is None:
            self._mark = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: dict[str, Tensor], batch_idx: int
    ) -> None:
        """Count the step's tokens on this rank and its seconds, those it waited for data included."""
        now = time.perf_counter()
        assert self._mark is not None
        self._training_seconds += now - self._mark
        self._mark = now
        self._tokens_seen += int((batch["document_ids"] >= 0).sum())

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the likelihoods, and leave validation out of the training time."""
        if self._mark is not None:
            self._mark = time.perf_counter()
        if not trainer.sanity_checking:
            # `source_likelihoods` is CausalLMModule's; a callback of another host has nothing to keep.
            sources = getattr(pl_module, "source_likelihoods", {}).get("val", {})
            self._validations.append({"step": trainer.global_step, "sources": json.loads(json.dumps(sources))})

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file, complete or not at all."""
        if not trainer.is_global_zero:
            return
        facts = {
            "parameters": count_parameters(pl_module),
            "bytes_in_memory": bytes_in_memory(pl_module),
            "tokens_seen": self._tokens_seen,
            "training_seconds": self._training_seconds,
            "tokens_per_second": self._tokens_seen / self._training_seconds if self._training_seconds else 0.0,
            "validations": self._validations,
        }
        path = Path(trainer.default_root_dir, FACTS_FILE)
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(".tmp")
        scratch.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        os.replace(scratch, path)
