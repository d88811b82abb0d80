"""The adapter of a run as a PEFT folder, whenever a checkpoint is written."""

import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from peft import PeftModel

from lightning_mixcn.model.hub import local_folder
from lightning_mixcn.modules.strategies import whole_parameters

from .finished_output import new_folder
from .host import causal_lm

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


class AdapterCheckpoint(Callback):
    """Writes ``adapter/`` into the run's folder with every checkpoint and at the end: PEFT's format, and the tokenizer.

    Args:
        folder: Name of the adapter's folder inside ``trainer.default_root_dir``.
    """

    def __init__(self, folder: str = "adapter") -> None:
        self.folder = folder
        self._written_at: int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse another kind of module."""
        causal_lm(self, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write the adapter of this step."""
        self._write(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the adapter of the last step."""
        self._write(trainer, pl_module)
        if self._written_at is not None:
            rank_zero_info(f"adapter: {Path(trainer.default_root_dir, self.folder)}")

    def _write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = causal_lm(self, pl_module)
        model = module.model
        if not isinstance(model, PeftModel) or self._written_at == trainer.global_step:
            return
        self._written_at = trainer.global_step
        # Every rank has a part in gathering what is sharded.
        with whole_parameters(trainer.strategy.model):
            if not trainer.is_global_zero:
                model.save_pretrained("", is_main_process=False)
                return
            with new_folder(Path(trainer.default_root_dir, self.folder)) as folder:
                model.save_pretrained(str(folder))
                copy_tokenizer(module.tokenizer_path, folder)


def copy_tokenizer(source: str, target: Path) -> None:
    """Copy a tokenizer's files as they are; transformers would write some of them anew, and differently.

    Args:
        source: Checkpoint folder or hub id.
        target: Folder.
    """
    folder = local_folder(source)
    for name in _TOKENIZER_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)
