"""What Ctrl-C leaves behind goes on by the command that it prints."""

import json
import logging
import re
import shlex
from pathlib import Path

import pytest
import yaml

from lightning_mixcn.cli import main

INTERRUPT = """
import signal
from lightning.pytorch import Callback

class Interrupt(Callback):
    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == 2:
            signal.raise_signal(signal.SIGINT)
"""


def test_the_printed_command_goes_on(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("interrupting.py").write_text(INTERRUPT, encoding="utf-8")
    lines = (json.dumps({"text": f"今天天气很好。{number}" * 4}) for number in range(40))
    Path("zh.jsonl").write_text("\n".join(lines), encoding="utf-8")
    lora = {"r": 2, "target_modules": ["q_proj", "w1"]}
    config = {
        "model": {"class_path": "PretrainModule",
                  "init_args": {"base": str(tiny_base), "dtype": "float32", "lora": lora}},
        "data": {"class_path": "PretrainDataModule",
                 "init_args": {"sources": [{"name": "zh", "path": "zh.jsonl"}], "sequence_length": 32,
                               "micro_batch_size": 1, "num_workers": 0, "val_fraction": 0.1}},
        "trainer": {"accelerator": "cpu", "max_steps": 5, "default_root_dir": "my run", "enable_progress_bar": False,
                    "callbacks": [{"class_path": "interrupting.Interrupt"}, {"class_path": "RunFacts"}]},
    }  # fmt: skip
    Path("run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    caplog.set_level(logging.INFO)
    assert main(["fit", "--config", "run.yaml"]) == 130
    assert "SIGINT: stopped after optimizer step 3" in caplog.text
    printed = re.search(r"Go on with: mixcn (.+)", caplog.text)
    assert printed is not None
    assert main(shlex.split(printed[1])) == 0
    assert json.loads(Path("my run", "facts.json").read_text(encoding="utf-8"))["steps"] == 5
    assert "all 5 steps" in caplog.text
