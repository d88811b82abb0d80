"""A quiet trainer, and the paper's LoRA on a tiny model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from peft import LoraConfig

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate", "w1", "w2", "w3"]


@pytest.fixture
def lora() -> Callable[..., LoraConfig]:
    def make(**changes: Any) -> LoraConfig:
        settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS}
        return LoraConfig(**(settings | changes))

    return make


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., Trainer]:
    def make(**changes: Any) -> Trainer:
        settings: dict[str, Any] = {
            "accelerator": "cpu",
            "default_root_dir": tmp_path / "run",
            "enable_checkpointing": False,
            "enable_model_summary": False,
            "enable_progress_bar": False,
            "limit_val_batches": 0,
            "logger": False,
            "max_steps": 2,
        }
        return Trainer(**(settings | changes))

    return make
