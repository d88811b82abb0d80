"""The package `lightning_mixcn.callbacks`, and the modules that its callbacks work with."""

import importlib.util
from pathlib import Path

import pytest
from lightning.pytorch import LightningModule, Trainer

from lightning_mixcn.callbacks import (
    AdapterCheckpoint,
    EvaluationReport,
    PredictionWriter,
    SampleText,
)
from lightning_mixcn.cli import main


def test_it_cannot_be_imported_as_callbacks() -> None:
    path = Path(__file__).parents[2] / "callbacks" / "__init__.py"
    spec = importlib.util.spec_from_file_location("callbacks", path)
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(
        ImportError, match=r"this package is lightning_mixcn.callbacks, but was imported as 'callbacks'"
    ):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


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


@pytest.mark.parametrize("name", ["RankWatch", "lightning_mixcn.callbacks.RankWatch"])
def test_a_callback_that_went_is_named_in_one_line(
    name: str, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["fit", "--model", "PretrainModule", "--model.base", str(tiny_base), "--data", "PretrainDataModule"]
    arguments += ["--data.sources", "[{name: zh, path: nowhere.jsonl}]"]
    assert main([*arguments, f"--trainer.callbacks=[{{class_path: {name}}}]"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("mixcn: error: RankWatch is gone, since torch and the launchers end all ranks")
