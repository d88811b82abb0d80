"""The result of `validate` and `test` as a file."""

import json
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from .finished_output import write_text
from .host import causal_lm


class EvaluationReport(Callback):
    """Writes ``validate.json`` or ``test.json`` into the run's folder: each source's likelihood, tokens and bytes.

    Validation inside `fit` goes to TensorBoard and is not written here.
    """

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
            "sources": sources,
            "base": module.base,
            "quantization": module.quantization,
            "adapter": module.adapter,
            # `last.ckpt` is a link.
            "checkpoint": None if trainer.ckpt_path is None else str(Path(trainer.ckpt_path).resolve()),
            "steps_trained": module.steps_trained,
        }
        path = Path(trainer.default_root_dir, name)
        write_text(path, json.dumps(report, ensure_ascii=False, indent=2) + "\n")
