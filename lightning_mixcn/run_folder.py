"""The folder of a run: what in it is a run's, and what keeps a second run from replacing it."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
ADAPTER_CONFIG = "adapter_config.json"
_KEYWORDS = ("last", "best", "hpc")

# By folder, the names that only a run's own writers give.
_CONTENT = {
    ".": (
        CONFIG,
        "config.*.yaml",
        "validate.json",
        "test.json",
        "predictions.jsonl",
        "samples.jsonl",
        "answers.jsonl",
        "benchmarks.jsonl",
        "experts.csv",
        "facts.json",
    ),
    CHECKPOINTS: ("*.ckpt", "*.ckpt.sha256", ".*.ckpt.unfinished", ".*.ckpt.outdated"),
    "tensorboard": ("events.out.tfevents.*", "hparams.yaml"),
    "long_context": ("*.csv", "*.png", "*.json"),
}


def holds_run(root: Path) -> bool:
    """Tell whether a run has begun in a folder; what `validate`, `test` and `predict` write is none."""
    if (root / CONFIG).is_file() or any(root.glob(f"{CHECKPOINTS}/*.ckpt")):
        return True
    return any((root / name / ADAPTER_CONFIG).is_file() for name in ("adapter", "adapter_best"))


def check_free(root: Path, checkpoint: str | None, checkpoint_folders: list[str]) -> None:
    """Refuse to train where a run is, unless it is that run which goes on.

    Args:
        root: The run's folder, `trainer.default_root_dir`.
        checkpoint: `ckpt_path`.
        checkpoint_folders: Further folders that the run keeps checkpoints in.

    Raises:
        ValueError: says what can be done.
    """
    if not holds_run(root):
        return
    if checkpoint is not None:
        homes = [root, *map(Path, checkpoint_folders)]
        if checkpoint in _KEYWORDS or "://" in checkpoint:
            return
        if any(Path(checkpoint).absolute().is_relative_to(home.absolute()) for home in homes):
            return
        if any(Path(checkpoint).resolve().is_relative_to(home.resolve()) for home in homes):
            return
    given = "" if checkpoint is None else f", and `--ckpt_path {checkpoint}` is another run's"
    raise ValueError(
        f"`trainer.default_root_dir={str(root)!r}` holds a run{given}. Go on with it by `--ckpt_path last`, choose "
        "another folder by `--trainer.default_root_dir`, or replace it by `--overwrite`"
    )


def check_overwrite(root: Path, checkpoint: str | None) -> None:
    """Refuse to replace a run and to go on from a checkpoint, too.

    Args:
        root: The run's folder.
        checkpoint: `ckpt_path`.

    Raises:
        ValueError: both are asked for; or the folder is one that no run can be replaced in.
    """
    if checkpoint is not None:
        raise ValueError(
            f"`--overwrite` begins a new run, `--ckpt_path {checkpoint}` goes on with one. Give one of them"
        )
    if root.exists() and not root.is_dir():
        raise ValueError(f"`trainer.default_root_dir={str(root)!r}` is a file, expected a folder")


class Overwrite(Callback):
    """Removes the run that a new one takes the place of, when model, data and optimizer of the new one are there.

    Only what is recognisably a run's is removed, and of that what was there when this was made: Lightning opens the
    loggers' files of the new run before.

    Args:
        root: The run's folder.
        adapter_folders: Names of the adapters' folders in it.
    """

    def __init__(self, root: Path, adapter_folders: list[str]) -> None:
        self._root, self._content = root, list(_content(root, adapter_folders))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove it, before anything of the new run is written."""
        if trainer.is_global_zero and self._content:
            for path in self._content:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
            for folder in map(self._root.joinpath, _CONTENT):
                if folder != self._root and folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()
            rank_zero_info(f"--overwrite: the run in {self._root} was removed")
        trainer.strategy.barrier("overwrite")


def _content(root: Path, adapter_folders: list[str]) -> Iterator[Path]:
    """What is recognisably a run's."""
    for folder, patterns in _CONTENT.items():
        for pattern in patterns:
            yield from (root / folder).glob(pattern)
    for name in adapter_folders:
        if (root / name / ADAPTER_CONFIG).is_file():
            yield root / name
