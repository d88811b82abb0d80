"""Figures and texts reach every logger; those that take none have files beside them."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CometLogger, CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger
from matplotlib.figure import Figure
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]  # published without types
    EventAccumulator,
)

from lightning_mixcn.callbacks.host import log_figures, log_texts

Make = Callable[..., Trainer]


class Calls:
    """Keeps what is called on it, as a client of a service that is not installed here."""

    def __init__(self) -> None:
        self.made: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: self.made.append((name, args, kwargs))


class OfflineWandb(WandbLogger):
    """Lightning's logger, whose own methods call a client that keeps what it is given."""

    def __init__(self) -> None:
        self.calls, self._prefix, self._wandb_init = Calls(), "", {}

    experiment = property(lambda self: self.calls)  # Lightning's imports wandb before it looks


class OfflineMLFlow(MLFlowLogger):
    """Lightning's logger with such a client."""

    def __init__(self) -> None:
        self.calls, self._run_id = Calls(), "run7"

    experiment = property(lambda self: self.calls)  # likewise


class OfflineComet(CometLogger):
    """Lightning's logger with such an experiment."""

    def __init__(self) -> None:
        self.calls = Calls()

    experiment = property(lambda self: self.calls)  # likewise


@pytest.fixture
def figure() -> Figure:
    figure = Figure(figsize=(2, 1), dpi=100)
    figure.suptitle("expert load")
    return figure


def log_both(trainer: Trainer, figure: Figure) -> None:
    log_figures(trainer, {"experts/val/load": figure}, 7)
    log_texts(trainer, {"samples/0": "**中**\n\n| step 7 |\n| --- |\n| 文 |"}, 7)


def written(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("figures/*")}


FILES = {"figures/experts_val_load_step_00000007.png", "figures/samples_0.md"}


@pytest.mark.parametrize("kind", ["csv", "none", "unknown"])
def test_files_where_no_logger_takes_them(kind: str, tmp_path: Path, trainer: Make, figure: Figure) -> None:
    class Unknown(CSVLogger):
        pass

    loggers = {"csv": CSVLogger(str(tmp_path)), "none": False, "unknown": Unknown(str(tmp_path))}
    run = trainer(logger=loggers[kind])
    log_both(run, figure)
    log_texts(run, {"samples/0": "newer"}, 8)
    assert written(tmp_path) == FILES
    assert imread(tmp_path / "figures/experts_val_load_step_00000007.png").shape[:2] == (100, 200)
    assert (tmp_path / "figures/samples_0.md").read_text(encoding="utf-8") == "newer\n"


def test_tensorboard_has_them_and_no_file_is_written(tmp_path: Path, trainer: Make, figure: Figure) -> None:
    logger = TensorBoardLogger(str(tmp_path), name="log", version="")
    log_both(trainer(logger=logger), figure)
    logger.finalize("success")
    events = EventAccumulator(str(tmp_path / "log")).Reload()
    (image,) = events.Images("experts/val/load")
    (text,) = events.Tensors("samples/0/text_summary")
    assert (image.step, image.width, text.step) == (7, 200, 7)
    assert "| 文 |" in text.tensor_proto.string_val[0].decode()
    assert not written(tmp_path)


def test_weights_and_biases(tmp_path: Path, trainer: Make, figure: Figure, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = SimpleNamespace(Image=lambda image: image, Table=lambda **kwargs: kwargs)
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    logger = OfflineWandb()
    log_both(trainer(logger=logger), figure)
    (_, (of_figure,), _), (_, (of_text,), _) = logger.calls.made
    assert of_figure["experts/val/load"][0].size == (200, 100)
    assert of_figure["trainer/global_step"] == of_text["trainer/global_step"] == 7
    assert of_text["samples/0"]["columns"] == ["step", "text"]
    assert of_text["samples/0"]["data"][0][0] == "7"
    assert not written(tmp_path)


def test_mlflow(tmp_path: Path, trainer: Make, figure: Figure) -> None:
    logger = OfflineMLFlow()
    log_both(trainer(logger=logger), figure)
    of_figure, of_text = logger.calls.made
    assert of_figure == ("log_figure", ("run7", figure, "experts/val/load_step_00000007.png"), {})
    assert (of_text[0], of_text[1][0], of_text[1][2]) == ("log_text", "run7", "samples/0.md")
    assert not written(tmp_path)


def test_comet(tmp_path: Path, trainer: Make, figure: Figure) -> None:
    logger = OfflineComet()
    log_both(trainer(logger=logger), figure)
    of_figure, of_text = logger.calls.made
    assert of_figure == ("log_figure", (), {"figure_name": "experts/val/load", "figure": figure, "step": 7})
    assert of_text[2] == {"step": 7, "metadata": {"tag": "samples/0"}}
    assert not written(tmp_path)


def test_every_logger_of_several_has_them(tmp_path: Path, trainer: Make, figure: Figure) -> None:
    tensorboard, mlflow = TensorBoardLogger(str(tmp_path), name="log", version=""), OfflineMLFlow()
    log_both(trainer(logger=[CSVLogger(str(tmp_path)), tensorboard, mlflow]), figure)
    tensorboard.finalize("success")
    assert EventAccumulator(str(tmp_path / "log")).Reload().Tags()["images"] == ["experts/val/load"]
    assert [name for name, *_ in mlflow.calls.made] == ["log_figure", "log_text"]
    assert written(tmp_path) == FILES


def test_a_trial_of_a_few_batches_writes_nothing(tmp_path: Path, trainer: Make, figure: Figure) -> None:
    log_both(trainer(logger=DummyLogger()), figure)
    assert not written(tmp_path)


def test_other_ranks_write_nothing(
    tmp_path: Path, trainer: Make, figure: Figure, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer()
    monkeypatch.setattr(type(run.strategy), "is_global_zero", property(lambda _: False))
    log_both(run, figure)
    assert not written(tmp_path)
