"""A run as a user types it, from YAML, on a GPU: training, callbacks, resuming, chat. A CPU runs the same."""

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_mixcn.callbacks.evaluation.long_context import LongContextReport
from lightning_mixcn.cli import main
from lightning_mixcn.testing import save_tiny_mixtral

CONFIG = """
seed_everything: 0
model:
  class_path: PretrainModule
  init_args:
    dtype: bfloat16
    lora: {r: 8, lora_alpha: 16, lora_dropout: 0.05, target_modules: all-linear}
    activation_memory: auto
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1.0e-2, fused: true}}
data:
  class_path: PretrainDataModule
  init_args:
    sources: [{name: zh, path: zh.jsonl}]
    sequence_length: 64
    micro_batch_size: 2
    num_streams: 2
    num_workers: 0
    val_fraction: 0.2
trainer:
  max_steps: 4
  val_check_interval: 4
  num_sanity_val_steps: 0
  log_every_n_steps: 1
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: TrainabilityCheck
    - class_path: ExpertLoadMonitor
    - class_path: ThroughputLogger
    - {class_path: StepCheckpoint, init_args: {every_n_steps: 2}}
    - {class_path: SampleText, init_args: {prompts: ["今天"], max_new_tokens: 4}}
    - {class_path: LongContextEval, init_args: {lengths: [32, 64], documents: 1}}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with a base whose sizes every kernel takes, a text and a configuration."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    save_tiny_mixtral(tmp_path / "base", hidden_size=64, intermediate_size=128, head_dim=16)
    lines = [json.dumps({"text": f"今天是第{number}天。" * 4}) for number in range(40)]
    Path("zh.jsonl").write_text("\n".join(lines), encoding="utf-8")
    config: dict[str, Any] = yaml.safe_load(CONFIG)
    config["model"]["init_args"]["base"] = str(tmp_path / "base")
    Path("run.yaml").write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("overlay", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_a_run(overlay: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["fit", "--config", "run.yaml", "--config", f"trainer/{overlay}"]
    assert main(command) == 0
    assert main([*command, "--ckpt_path", "last", "--trainer.max_steps", "6"]) == 0
    run = folder / "runs" / "run"
    assert "step=00000006.ckpt" in str((run / "checkpoints" / "last.ckpt").resolve())
    state = torch.load(run / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=False)
    assert all(value.isfinite().all() for value in state["state_dict"].values())
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {record["step"] for record in samples} >= {4, 6}
    assert (run / "experts.csv").read_text(encoding="utf-8").count("\n") > 1
    likelihoods = [row for entry in LongContextReport(run / "long_context").evaluations for row in entry["likelihoods"]]
    assert likelihoods
    assert all(math.isfinite(row["nll_nats_per_token"]) for row in likelihoods)
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO("今天\n"))
    device = "cuda" if overlay == "gpu" else "cpu"
    assert main(["chat", str(run), f"--device={device}", "--max_new_tokens=4", "--temperature=0"]) == 0
