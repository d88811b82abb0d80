"""A callback that writes down what a run did, for reports and for comparing runs."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_mixcn.model import bytes_in_memory, count_parameters

from .finished_output import write_text

FACTS_FILE = "facts.json"


class RunFacts(Callback):
    """Write ``facts.json`` into the run's folder: size of the model, tokens, speed and each validation's likelihoods.

    It holds ``parameters`` (total, trainable, quantised), ``bytes_in_memory``, ``tokens_seen`` (positions that are not
    padding) and ``text_bytes_seen`` (UTF-8 bytes of their text, null without a tokenizer in the data module), both of
    all ranks; ``training_seconds`` (steps and waiting for data; no validation, no samples), ``tokens_per_second``, and
    ``validations``: a list of ``step``, ``text_bytes_seen`` and ``sources``, which has ``nll_nats_per_token``,
    ``bits_per_byte``, ``tokens`` and ``bytes`` by source. A resumed run goes on counting.
    """

    def __init__(self) -> None:
        self._tokens = self._text_bytes = 0  # of all ranks
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
        """Count the batch's tokens and its seconds, those it waited for data included."""
        assert self._mark is not None
        here = torch.tensor([*_tokens_and_bytes(batch, _tokenizer(trainer))], device=pl_module.device)
        counted: Any = trainer.strategy.reduce(here, reduce_op="sum")
        tokens, text_bytes = counted.tolist()
        self._tokens, self._text_bytes = self._tokens + tokens, self._text_bytes + text_bytes
        now = time.perf_counter()
        self._training_seconds += now - self._mark
        self._mark = now

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the likelihoods, and leave validation out of the training time."""
        if self._mark is not None:
            self._mark = time.perf_counter()
        if not trainer.sanity_checking:
            # `source_likelihoods` is CausalLMModule's; a callback of another host has nothing to keep.
            sources = getattr(pl_module, "source_likelihoods", {}).get("val", {})
            kept = {"step": trainer.global_step, "text_bytes_seen": self._bytes_seen(trainer), "sources": sources}
            self._validations.append(json.loads(json.dumps(kept)))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file, complete or not at all."""
        if not trainer.is_global_zero:
            return
        facts = {
            "parameters": count_parameters(pl_module),
            "bytes_in_memory": bytes_in_memory(pl_module),
            "steps": trainer.global_step,
            "tokens_seen": self._tokens,
            "text_bytes_seen": self._bytes_seen(trainer),
            "training_seconds": self._training_seconds,
            "tokens_per_second": self._tokens / self._training_seconds if self._training_seconds else 0.0,
            "validations": self._validations,
        }
        write_text(Path(trainer.default_root_dir, FACTS_FILE), json.dumps(facts, indent=2) + "\n")

    def state_dict(self) -> dict[str, Any]:
        """What was counted so far, in plain values."""
        return {
            "tokens": self._tokens,
            "text_bytes": self._text_bytes,
            "training_seconds": self._training_seconds,
            "validations": list(self._validations),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting from there."""
        self._tokens, self._text_bytes = state_dict["tokens"], state_dict["text_bytes"]
        self._training_seconds = state_dict["training_seconds"]
        self._validations = list(state_dict["validations"])

    def _bytes_seen(self, trainer: Trainer) -> int | None:
        return None if _tokenizer(trainer) is None else self._text_bytes


def _tokenizer(trainer: Trainer) -> Any:
    return getattr(getattr(trainer, "datamodule", None), "tokenizer", None)


def _tokens_and_bytes(batch: dict[str, Tensor], tokenizer: Any) -> tuple[int, int]:
    """Of this rank's batch: positions that are no padding, and bytes of their text."""
    is_token = batch["document_ids"] >= 0
    rows = [] if tokenizer is None else zip(batch["input_ids"], is_token, strict=True)
    texts = (tokenizer.decode(row[kept].tolist()) for row, kept in rows)
    return int(is_token.sum()), sum(len(text.encode()) for text in texts)
