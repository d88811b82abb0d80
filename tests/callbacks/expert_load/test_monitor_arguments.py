"""What is refused, and the monitor in a configuration."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule
from peft import LoraConfig
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]  # published without types
    EventAccumulator,
)

from lightning_mixcn.callbacks import ExpertLoadMonitor
from lightning_mixcn.cli import main
from lightning_mixcn.modules import PretrainModule
from lightning_mixcn.testing import FixedBatches, random_batch


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every_n_steps": 0}, "`every_n_steps=0`: expected at least 1"),
        ({"figure_every_n_steps": -1}, "`figure_every_n_steps=-1`"),
        ({"starving_steps": 0}, "`starving_steps=0`"),
        ({"starving_share": 1.0}, "`starving_share=1.0`: expected less than 1"),
        ({"position_boundaries": [8, 4]}, r"`position_boundaries=\[8, 4\]`: expected ascending"),
        ({"position_boundaries": [0, 4]}, r"`position_boundaries\[0\]=0`: expected at least 1"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExpertLoadMonitor(**arguments)


def test_another_host_is_refused(trainer: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="ExpertLoadMonitor works with a CausalLMModule"):
        ExpertLoadMonitor().setup(trainer(), LightningModule(), "fit")


def test_a_source_named_as_validation_is_refused(module: PretrainModule, trainer: Callable[..., Any]) -> None:
    run = trainer(callbacks=[ExpertLoadMonitor()])
    with pytest.raises(ValueError, match="A source is named 'val'"):
        run.fit(module, FixedBatches([random_batch([20])], ["val"]))


class SmallForwards(PretrainModule):
    """Gives the model a row at a time, which no monitor can assign to the batch."""

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return super().training_step({name: value[:1] for name, value in batch.items()}, batch_idx)


def test_a_run_without_a_counted_token_is_told(tiny_base: Path, trainer: Callable[..., Any]) -> None:
    module = SmallForwards(str(tiny_base), dtype="float32", lora=LoraConfig(target_modules=["w1"]))
    run = trainer(max_steps=1, callbacks=[ExpertLoadMonitor()])
    with pytest.warns(UserWarning, match="counted no token up to step 1"):
        run.fit(module, FixedBatches([random_batch([20, 20])]))


CONFIG = """
model:
  class_path: PretrainModule
  init_args: {dtype: float32, lora: {r: 2, target_modules: [gate, w1, w2, w3]}}
data:
  class_path: PretrainDataModule
  init_args:
    sources: [{name: zh, path: zh.jsonl}, {name: en, path: en.jsonl}]
    sequence_length: 32
    micro_batch_size: 2
    num_streams: 4
    num_workers: 0
    val_fraction: 0.2
trainer:
  accelerator: cpu
  max_steps: 2
  val_check_interval: 2
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - {class_path: ExpertLoadMonitor, init_args: {every_n_steps: 1, all_numbers: true, position_boundaries: [16]}}
"""


def test_in_a_configuration_by_its_short_name(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    for name, text in {"zh": "今天天气很好。", "en": "The weather is fine. "}.items():
        lines = (json.dumps({"text": text * (1 + number % 3) + str(number)}) for number in range(30))
        Path(f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = yaml.safe_load(CONFIG)
    config["model"]["init_args"]["base"] = str(tiny_base)
    Path("tiny.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    assert main(["fit", "--config", "tiny.yaml"]) == 0
    tags = EventAccumulator("runs/tiny/tensorboard").Reload().Tags()
    assert {"experts/en/effective_experts", "experts/val/zh/router_confidence"} <= set(tags["scalars"])
    assert {"experts/load", "experts/val/load"} <= set(tags["images"])
    table = Path("runs/tiny/experts.csv").read_bytes()
    # Evaluation apart from a run leaves the run's counts alone.
    assert main(["validate", "--config", "tiny.yaml", "--ckpt_path", "last"]) == 0
    assert Path("runs/tiny/experts.csv").read_bytes() == table


def test_help_shows_the_arguments(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    with pytest.raises(SystemExit) as end:
        main(["fit", "--trainer.callbacks.help", "ExpertLoadMonitor"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert "Optimizer steps between logs of training" in shown
    for name in ("every_n_steps", "figure_every_n_steps", "per_layer", "position_boundaries", "starving_share"):
        assert f"--trainer.callbacks.init_args.{name}" in shown or name in shown
