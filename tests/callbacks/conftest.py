"""A tiny run with callbacks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from peft import LoraConfig

from lightning_mixcn.modules import PretrainModule


@pytest.fixture
def module(tiny_base: Path) -> PretrainModule:
    lora = LoraConfig(r=2, target_modules=["q_proj", "w1", "w2", "w3"])
    return PretrainModule(str(tiny_base), dtype="float32", lora=lora)


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., Trainer]:
    def make(**changes: Any) -> Trainer:
        settings: dict[str, Any] = {
            "accelerator": "cpu",
            "default_root_dir": tmp_path,
            "enable_checkpointing": False,
            "enable_model_summary": False,
            "enable_progress_bar": False,
            "limit_val_batches": 0,
            "logger": False,
            "max_steps": 2,
        }
        return Trainer(**(settings | changes))

    return make
