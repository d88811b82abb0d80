"""A run from Python says what the command says, and nothing of libraries' own concerns."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_mixcn.library_lines import leave_out

ROOT = Path(__file__).parents[2]
PROGRAM = """
import json
import sys
from pathlib import Path

import lightning_mixcn
from lightning.pytorch import Trainer
from lightning_mixcn.callbacks import StepProgressBar
from peft import LoraConfig

base, out = sys.argv[1], Path(sys.argv[2])
text = out / "zh.jsonl"
records = [{"text": f"{number}: the quick brown fox 今天天气很好"} for number in range(60)]
text.write_text("\\n".join(map(json.dumps, records)), encoding="utf-8")
lora = LoraConfig(r=4, target_modules=["q_proj", "gate", "w1"])
data = lightning_mixcn.PretrainDataModule(
    [{"name": "zh", "path": str(text)}], sequence_length=64, micro_batch_size=2, num_workers=0, val_fraction=0.2
)
given = lightning_mixcn.trainer_defaults(out / "run", [StepProgressBar(refresh_rate=0)])
trainer = Trainer(**given, accelerator="cpu", max_steps=3, val_check_interval=3, check_val_every_n_epoch=None)
trainer.fit(lightning_mixcn.PretrainModule(base, lora=lora), data)
"""
# Beginnings of what Lightning and this package say of a run.
EXPECTED = (
    "GPU available", "TPU available", "`Trainer.fit` stopped: ", "Restor", "parameters ", "in memory ", "adapter",
    "steps ", "tokens", "duration ", "train nll ", "val zh nll ", "ended ", "checkpoint ", "curves ", "first page ",
    "talk ", "merge ", "report ",
)  # fmt: skip


@pytest.mark.slow
def test_a_fit_from_python_is_quiet(tiny_base: Path, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tiny_base), str(tmp_path)],
        check=True, capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert [line for line in done.stderr.splitlines() if line.strip() and not line.startswith(EXPECTED)] == []


def test_only_one_line_of_a_logger_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    lines = {"some.library": ("as always",)}
    for _ in range(2):
        leave_out(lines)
    logger = logging.getLogger("some.library")
    assert len(logger.filters) == 1
    for said in ("it is as always here", "it is broken"):
        logger.warning(said)
    assert caplog.messages == ["it is broken"]


def test_the_root_logger_is_left_alone() -> None:
    program = "import logging, lightning_mixcn; root = logging.getLogger(); assert not root.handlers + root.filters; "
    program += "assert root.level == logging.WARNING; assert not logging.getLogger('lightning_mixcn').level"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
