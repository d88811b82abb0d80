"""A callback that writes down what a run did, for reports and for comparing runs."""

import json
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_mixcn.arguments import Between, check_arguments
from lightning_mixcn.commands.process import peak_resident_bytes
from lightning_mixcn.data import StreamDataModule
from lightning_mixcn.errors import UserError
from lightning_mixcn.files.atomic import write_text
from lightning_mixcn.files.schema import MAPPING, each, real, record
from lightning_mixcn.model import bytes_in_memory, count_parameters
from lightning_mixcn.modules.checkpoint_schema import require_state
from lightning_mixcn.tokenizer.pieces import TokenizerPieces

from .checkpoints import StepCheckpoint
from .clocks import step_clock

FACTS_FILE = "facts.json"

# Numbers that a checkpoint keeps, `validations` aside.
_STATE = ("tokens", "text_bytes", "training_seconds", "fit_seconds", "peak_memory_bytes")


class RunFacts(Callback):
    """Write ``facts.json`` into the run's folder: size of the model, tokens, speed and each validation's likelihoods.

    It holds ``parameters`` (total, trainable, quantised), ``bytes_in_memory``, ``steps`` of ``planned_steps``,
    ``tokens_seen`` (positions that are not padding) and ``text_bytes_seen`` (UTF-8 bytes of their pieces, null without
    a tokenizer in the data module), both of all ranks; ``training_seconds`` (steps and waiting for data; no validation,
    no samples), ``fit_seconds`` (everything since the model is there), ``tokens_per_second``, ``peak_memory_bytes``
    (of the rank with most: allocated on a GPU, else resident in the process), and ``validations``: a list of ``step``,
    ``text_bytes_seen`` and ``sources``, which has ``nll_nats_per_token``, ``bits_per_byte``, ``tokens`` and ``bytes``
    by source. A resumed run goes on counting.
    """

    run_files = (FACTS_FILE,)

    def __init__(self) -> None:
        self._before: dict[str, Any] = dict.fromkeys(_STATE, 0)  # in the processes before this one, of all ranks
        self._validations: list[dict[str, Any]] = []
        self._piece_bytes: Tensor | None = None  # [V] int64
        self._seen: Tensor | None = None  # of this rank and process: tokens, text bytes; on the device
        self._fit_started: float | None = None
        self._run: tuple[Trainer, LightningModule] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the run's clock."""
        if stage == "fit":
            self._clock = step_clock(trainer)
            tokenizer = _tokenizer(trainer)
            self._piece_bytes = None if tokenizer is None else torch.tensor(piece_bytes(tokenizer))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of the whole."""
        self._fit_started, self._seen, self._run = time.perf_counter(), None, (trainer, pl_module)
        if self._piece_bytes is not None:
            self._piece_bytes = self._piece_bytes.to(pl_module.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: dict[str, Tensor], batch_idx: int
    ) -> None:
        """Count the batch on the device, without waiting for it."""
        is_token_BS = batch["document_ids"] >= 0
        table = self._piece_bytes
        bytes_BS = torch.zeros_like(batch["input_ids"]) if table is None else table[batch["input_ids"]]
        seen = torch.stack([is_token_BS.sum(), (bytes_BS * is_token_BS).sum()])
        self._seen = seen if self._seen is None else self._seen + seen

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the likelihoods."""
        if not trainer.sanity_checking and self._run is not None:
            # `source_likelihoods` is CausalLMModule's; a callback of another host has nothing to keep.
            sources = getattr(pl_module, "source_likelihoods", {}).get("val", {})
            seen = None if self._piece_bytes is None else self._numbers()["text_bytes"]
            kept = {"step": trainer.global_step, "text_bytes_seen": seen, "sources": sources}
            self._validations.append(json.loads(json.dumps(kept)))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file, complete or not at all."""
        numbers = self._before = self._numbers()
        self._run = None  # what a checkpoint takes after this, or another `fit` adds to, is the whole of it
        if not trainer.is_global_zero:
            return
        seconds = numbers["training_seconds"]
        facts = {
            "parameters": count_parameters(pl_module),
            "bytes_in_memory": bytes_in_memory(pl_module),
            "steps": trainer.global_step,
            "planned_steps": trainer.max_steps,
            "tokens_seen": numbers["tokens"],
            "text_bytes_seen": None if self._piece_bytes is None else numbers["text_bytes"],
            "training_seconds": seconds,
            "fit_seconds": numbers["fit_seconds"],
            "tokens_per_second": numbers["tokens"] / seconds if seconds else 0.0,
            "peak_memory_bytes": numbers["peak_memory_bytes"],
            "validations": self._validations,
        }
        write_text(Path(trainer.default_root_dir, FACTS_FILE), json.dumps(facts, indent=2) + "\n")

    def state_dict(self) -> dict[str, Any]:
        """Return the counts so far, in plain values; Lightning calls this on every rank, as it must."""
        return self._numbers() | {"validations": list(self._validations)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting from there."""
        numbers = dict.fromkeys(_STATE, real(0, 2.0**63))
        require_state(self, state_dict, record(numbers | {"validations": each(MAPPING)}))
        self._before = {name: state_dict[name] for name in _STATE}
        self._validations = list(state_dict["validations"])

    def _numbers(self) -> dict[str, Any]:
        """Add this process's counts, of all ranks, to those before it."""
        found = dict(self._before)
        if self._run is None or self._fit_started is None:
            return found
        trainer, module = self._run
        seen = torch.zeros(2, dtype=torch.int64, device=module.device) if self._seen is None else self._seen.clone()
        tokens, text_bytes = trainer.strategy.reduce(seen, reduce_op="sum").tolist()
        peak = torch.tensor(_peak_memory_bytes(module.device), device=module.device)
        found["tokens"] += tokens
        found["text_bytes"] += text_bytes
        found["training_seconds"] += self._clock.training_seconds
        found["fit_seconds"] += time.perf_counter() - self._fit_started
        found["peak_memory_bytes"] = max(
            found["peak_memory_bytes"], int(trainer.strategy.reduce(peak, reduce_op="max"))
        )
        return found


def piece_bytes(tokenizer: Any) -> list[int]:
    """Return the UTF-8 bytes of each id's piece, 0 for special tokens.

    Args:
        tokenizer: A `TextTokenizer`.
    """
    pieces = TokenizerPieces(Path(tokenizer.path))
    special = {index for index, is_special in tokenizer.added_tokens.values() if is_special}
    special |= {tokenizer.bos_id, tokenizer.eos_id}
    return [0 if index in special else pieces.num_bytes(index) for index in range(len(pieces))]


def _tokenizer(trainer: Trainer) -> Any:
    return getattr(getattr(trainer, "datamodule", None), "tokenizer", None)


def _peak_memory_bytes(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident_bytes()


_ROWS_MEASURED = 2048


class ByteBudget(Callback):
    """Sets the steps of `fit` so that they see ``text_bytes`` bytes of text; ``trainer.max_steps`` gives way.

    Runs with different tokenizers can be compared then: each sees as much text, in as many tokens as it needs. How many
    bytes a row has is measured before training, on the first rows (2,048, or fewer where these are the budget). Only
    whole steps are taken; learning-rate schedules and progress follow. Sources are mixed alike, too, where the data's
    ``weight_unit`` is ``bytes``.

    Args:
        text_bytes: UTF-8 bytes of text, of all sources and ranks together.
        validations: Number of validations, evenly spaced, the last at the end; the trainer's own interval gives way.
    """

    def __init__(
        self, text_bytes: Annotated[int, Between(1, 10**15)], validations: Annotated[int, Between(1, 10**6)] = 1
    ) -> None:
        check_arguments(ByteBudget, locals())
        self.text_bytes, self.validations = text_bytes, validations
        self._due: list[int] = []  # steps after which there is a validation

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Set the steps, before the optimizer and its schedule are made.

        Raises:
            TypeError: the data module is none of this project's streams.
            ValueError: the sources end before the budget, or it has fewer steps than validations.
        """
        if stage != "fit":
            return
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, StreamDataModule):
            raise TypeError(
                "ByteBudget measures the rows of a PretrainDataModule or InstructDataModule, "
                f"not of {type(data).__name__}"
            )
        rows = self._rows(data)
        steps = round(rows / (data.rows_a_batch * trainer.accumulate_grad_batches))
        if steps < self.validations:
            raise UserError(
                f"`text_bytes={self.text_bytes}` are {steps} steps, fewer than `validations={self.validations}`. Give "
                "more text, smaller steps or fewer validations"
            )
        self._due = [round(steps * part / self.validations) for part in range(1, self.validations + 1)]
        # Where Lightning keeps them; `Trainer(max_steps=…)` writes there too.
        trainer.fit_loop.epoch_loop.max_steps = steps
        # In micro-batches since the beginning of the run, whatever an epoch is.
        trainer.check_val_every_n_epoch = None
        trainer.val_check_interval = steps * trainer.accumulate_grad_batches
        rank_zero_info(f"ByteBudget: {self.text_bytes:,} bytes are {rows:,.0f} rows, {steps:,} steps")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Say when the next validation is due: Lightning validates where the batches are a multiple of it."""
        step = next(step for step in self._due if step > trainer.global_step)
        trainer.val_check_batch = step * trainer.accumulate_grad_batches

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Have the checkpoint of a step that is validated saved after the validation: no resumed run lacks one."""
        if trainer.global_step in self._due:
            for checkpoint in _step_checkpoints(trainer):
                checkpoint.postpone()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            for checkpoint in _step_checkpoints(trainer):
                checkpoint.request()

    def _rows(self, data: StreamDataModule) -> float:
        """Return the rows that hold the budget."""
        rows = measured = 0
        for row_bytes in islice(_row_bytes(data), _ROWS_MEASURED):
            if not row_bytes:
                raise UserError(
                    f"`text_bytes={self.text_bytes}`: the sources end after {measured:,} bytes. Give less, or raise "
                    "their `max_epochs`"
                )
            rows, measured = rows + 1, measured + row_bytes
            if measured >= self.text_bytes:
                break
        return rows * self.text_bytes / measured


def _step_checkpoints(trainer: Trainer) -> list[StepCheckpoint]:
    return [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, StepCheckpoint)]


def _row_bytes(data: StreamDataModule) -> Iterator[int]:
    for row in data.training_rows():
        yield sum(data.tokenizer.num_bytes(part.tokens.tolist()) for part in row)
