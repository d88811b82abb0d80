"""Callbacks in a module that is not this package's."""

import pytest
from lightning.pytorch import LightningModule, Trainer

from lightning_mixcn.callbacks import (
    AdapterCheckpoint,
    EvaluationReport,
    PredictionWriter,
    SampleText,
)


@pytest.mark.parametrize(
    "callback",
    [AdapterCheckpoint(), EvaluationReport(), PredictionWriter(), SampleText(["a"])],
    ids=lambda c: type(c).__name__,
)
def test_another_kind_of_module_is_refused(callback: AdapterCheckpoint) -> None:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(
        ValueError, match=rf"{type(callback).__name__} works with a CausalLMModule, but `model` is Light"
    ):
        callback.setup(trainer, LightningModule(), "fit")
