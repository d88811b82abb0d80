"""A run from Python is the run of the command."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]  # published without types
    EventAccumulator,
)
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout  # type: ignore[import-untyped]  # likewise
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData  # type: ignore[import-untyped]  # likewise

from lightning_mixcn import PretrainDataModule, PretrainModule, __version__, trainer_defaults
from lightning_mixcn.callbacks import ExpertLoadMonitor, StepCheckpoint, StepProgressBar, ThroughputLogger
from lightning_mixcn.callbacks.defaults import run_logger
from lightning_mixcn.cli import main

LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.05, "target_modules": ["q_proj", "gate", "w1", "w2"]}
DATA: dict[str, Any] = {
    "sources": [{"name": "zh", "path": "zh.jsonl"}],
    "sequence_length": 48,
    "micro_batch_size": 2,
    "num_workers": 0,
    "val_fraction": 0.2,
}


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def page(folder: Path) -> list[tuple[str, list[str]]]:
    """Return the charts of a run's page of custom scalars, and the regular expressions of their tags."""
    (event, *_) = EventAccumulator(str(folder / "tensorboard")).Reload().Tensors("custom_scalars__config__")
    (category,) = Layout.FromString(event.tensor_proto.string_val[0]).category
    return [(chart.title, list(chart.multiline.tag)) for chart in category.chart]


def test_a_run_from_python_is_that_of_the_command(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"text": "今天天气很好。" * (1 + number % 4) + str(number)}) for number in range(40)]
    Path("zh.jsonl").write_text("\n".join(lines), encoding="utf-8")
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "max_steps": 3,
        "val_check_interval": 3,
        "check_val_every_n_epoch": None,
    }
    module = {"base": str(tiny_base), "dtype": "float32", "lora": LORA}
    config = {
        "model": {"class_path": "PretrainModule", "init_args": module},
        "data": {"class_path": "PretrainDataModule", "init_args": DATA},
        "trainer": {**settings, "default_root_dir": "command", "callbacks": [{"class_path": "ExpertLoadMonitor"}]},
    }
    Path("run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    assert main(["fit", "--config", "run.yaml"]) == 0
    trainer = Trainer(**trainer_defaults("python", [ExpertLoadMonitor()]), **settings)
    trainer.fit(
        PretrainModule(str(tiny_base), dtype="float32", lora=LoraConfig(**LORA)),
        PretrainDataModule(**DATA),
    )
    for file in ("adapter/adapter_model.safetensors", "adapter_best/adapter_model.safetensors"):
        assert Path("python", file).read_bytes() == Path("command", file).read_bytes()
    of_command, of_python = scalars(Path("command")), scalars(Path("python"))
    assert set(of_command) == set(of_python)
    timed = ("throughput/", "data/seconds_waiting", "data/wait_share")
    measured = {name for name in of_command if not name.startswith(timed)}
    assert len(measured) > 5
    assert {name: of_python[name] for name in measured} == {name: of_command[name] for name in measured}
    assert "hp_metric" not in of_command
    drawn = {
        chart: {tag for tag in of_command for regex in tags if re.match(regex, tag)}
        for chart, tags in page(Path("command"))
    }
    assert list(drawn) == [
        "loss", "validation by language: bits per byte", "learning rate", "throughput: tokens per second",
        "expert balance",
    ]  # fmt: skip
    assert list(drawn.values())[:3] == [
        {"train/loss", "train/nll_nats_per_token"}, {"val/bits_per_byte", "val/zh/bits_per_byte"}, {"lr-AdamW"},
    ]  # fmt: skip
    assert drawn["throughput: tokens per second"] == {"throughput/tokens_per_second"}
    assert drawn["expert balance"] == {
        f"experts/{name}"
        for name in ("imbalance_max_over_mean", "dead_expert_fraction", "routing_entropy", "drift_bits")
    }
    assert {path.name for path in Path("command").iterdir()} == {
        *(path.name for path in Path("python").iterdir()), "config.yaml",
    }  # fmt: skip


def test_own_callbacks_take_the_place_of_defaults_of_their_kind(tmp_path: Path) -> None:
    own = [StepCheckpoint(every_n_steps=7), StepProgressBar()]
    found = trainer_defaults(tmp_path, callbacks=own)["callbacks"]
    assert found[:2] == own
    assert [callback for callback in found if isinstance(callback, ModelCheckpoint)] == own[:1]
    assert own[0].dirpath == str(tmp_path / "checkpoints")  # type: ignore[attr-defined]  # of the first
    assert sum(isinstance(callback, ThroughputLogger) for callback in found) == 1


def test_hyper_parameters_are_read_beside_the_loss(tmp_path: Path) -> None:
    logger = run_logger(tmp_path)
    lora = {"class_path": "peft.LoraConfig", "init_args": {"r": 8, "target_modules": ["q_proj", "w1"], "bias": None}}
    logger.log_hyperparams({"base": "a|b", "lora": lora, "adapter": None, "train": True, "_class_path": "x.Y"})
    logger.log_hyperparams({"base": "a|b", "lora": None})
    logger.finalize("success")
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == []
    start, end, experiment = (
        HParamsPluginData.FromString(events.SummaryMetadata(f"_hparams_/{name}").plugin_data.content)
        for name in ("session_start_info", "session_end_info", "experiment")
    )
    assert end.HasField("session_end_info")
    assert [metric.name.tag for metric in experiment.experiment.metric_infos] == ["train/loss"]
    found = {name: value for name, value in start.session_start_info.hparams.items()}
    assert set(found) == {"base", "lora", "lora/r", "lora/target_modules", "train"}
    assert found["lora/r"].number_value == 8
    assert found["lora/target_modules"].string_value == "q_proj, w1"
    (origin, _) = events.Tensors("environment/text_summary")
    lines = dict(line.strip().split(": ", 1) for line in origin.tensor_proto.string_val[0].decode().splitlines())
    assert lines.keys() >= {"command", "machine", "python", "torch", "peft"}
    assert lines["lightning_mixcn"] == __version__
    (card, _) = events.Tensors("hyper_parameters/text_summary")
    assert card.tensor_proto.string_val[0].decode() == (
        "    base: a|b\n    lora: peft.LoraConfig\n    lora/r: 8\n    lora/target_modules: q_proj, w1\n    train: true"
    )
