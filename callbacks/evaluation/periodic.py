"""When something is evaluated while the model trains, and on which documents."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_mixcn.arguments import Steps
from lightning_mixcn.errors import UserError
from lightning_mixcn.modules import CausalLMModule
from lightning_mixcn.text import DocumentSet, Source, all_documents, read_corpus

from ..host import StepRecords, causal_lm


class PeriodicEvaluation(Callback):
    """Evaluates before the first step, every so often and after the last; what to evaluate is the subclass's.

    Args:
        every_n_steps: Optimizer steps between evaluations; null evaluates before the first step and after the last.
    """

    def __init__(self, every_n_steps: Steps | None) -> None:
        self.every_n_steps = every_n_steps
        self._evaluated_at: int | None = None

    def evaluate(self, trainer: Trainer, module: CausalLMModule) -> None:
        """Evaluate, log and record. Every rank comes here, since a sharded model needs all of them."""
        raise NotImplementedError

    def records(self, trainer: Trainer) -> StepRecords:
        """Return the records of the run."""
        raise NotImplementedError

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate the start of a run; a resumed one goes on."""
        if trainer.is_global_zero:
            self.records(trainer).start(trainer.global_step)
        if trainer.global_step == 0:
            self.evaluate(trainer, causal_lm(self, pl_module))
        self._evaluated_at = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Evaluate where a step is a multiple of ``every_n_steps``."""
        # Micro-batches of the next step still see this step's number.
        step = trainer.global_step
        if self.every_n_steps is not None and step % self.every_n_steps == 0 and step != self._evaluated_at:
            self._evaluated_at = step
            self.evaluate(trainer, causal_lm(self, pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate the last step."""
        if trainer.global_step != self._evaluated_at:
            self._evaluated_at = trainer.global_step
            self.evaluate(trainer, causal_lm(self, pl_module))


def evaluation_documents(callback: Callback, trainer: Trainer, sources: Sequence[Source] | None) -> list[DocumentSet]:
    """Return the documents of a callback's sources, or else those of the data module's validation set.

    Args:
        callback: Callback that asks.
        trainer: Lightning's, with the data module.
        sources: The callback's ``sources``.

    Raises:
        FileNotFoundError: a source's path matches no file.
        ValueError: there are no documents.
    """
    if sources is not None:
        return [all_documents(read_corpus(source, f"sources[{i}]")) for i, source in enumerate(sources)]
    documents = getattr(getattr(trainer, "datamodule", None), "evaluation_documents", None)
    found: Sequence[DocumentSet] = documents("val") if documents is not None else ()
    if not found:
        raise UserError(
            f"{type(callback).__name__} has no documents: `sources` is null, and the data module has no validation "
            "set. Give `sources`, e.g. [{name: zh, path: data/held_out/*.jsonl}]"
        )
    return list(found)
