"""The folder of a run: which files in it a run writes, and what keeps a second run from replacing them."""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from glob import has_magic
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from lightning_mixcn.callbacks.adapter_average import AdapterAverage
from lightning_mixcn.callbacks.adapter_checkpoint import ADAPTER_CONFIG, ADAPTER_FILES, AdapterCheckpoint
from lightning_mixcn.callbacks.checkpoints import restore_last
from lightning_mixcn.callbacks.host import CHECKPOINTS, FIGURES, LONG_CONTEXT, RUN_FILES, TENSORBOARD
from lightning_mixcn.errors import InUseError, UserError
from lightning_mixcn.files.atomic import (
    check_replaceable,
    owned,
    partial_path,
    remove_leftovers,
    remove_path,
    scratch_folder,
)
from lightning_mixcn.files.lock import lock_path
from lightning_mixcn.text.corpus.listings import LeftOut, match_glob
from lightning_mixcn.text.corpus.reading import LOCAL, is_url

CONFIG = "config.yaml"
_SCRATCH = "fast_dev_run"
_KEYWORDS = ("last", "best", "hpc")
# How often torchrun and SLURM have started this job again.
_RESTART_COUNTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")

# By folder, the names of the files that a run writes.
_CONTENT = {
    ".": RUN_FILES,
    CHECKPOINTS: ("*.ckpt", "*.ckpt.sha256", ".*.ckpt.unfinished", ".*.ckpt.outdated", ".*.ckpt.removed"),
    TENSORBOARD: ("events.out.tfevents.*", "hparams.yaml"),
    LONG_CONTEXT: ("*.csv", "*.png", "*.json"),
    FIGURES: ("*_step_????????.png", "*.md"),
}


def holds_run(root: Path) -> bool:
    """Tell whether training has begun in a folder; `validate`, `test` and `predict` alone make no run."""
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
        ValueError: the folder holds a run that would be replaced.
    """
    if not holds_run(root):
        return
    if checkpoint == "last":
        _check_last(root, checkpoint_folders)
    if checkpoint is not None:
        homes = [root, *map(Path, checkpoint_folders)]
        if checkpoint in _KEYWORDS or "://" in checkpoint:
            return
        if any(Path(checkpoint).absolute().is_relative_to(home.absolute()) for home in homes):
            return
        if any(Path(checkpoint).resolve().is_relative_to(home.resolve()) for home in homes):
            return
    given = "" if checkpoint is None else f", and `--ckpt_path {checkpoint}` is another run's"
    raise UserError(
        f"`trainer.default_root_dir={str(root)!r}` holds a run{given}. Go on with it by `--ckpt_path last`, choose "
        "another folder by `--trainer.default_root_dir`, or replace it by `--overwrite`"
    )


def _check_last(root: Path, checkpoint_folders: list[str]) -> None:
    """Refuse to begin from scratch, as Lightning does without a last checkpoint, where an adapter has been trained.

    A job that was killed before or while it wrote its first checkpoint may begin again.
    """
    folders = [str(root / CHECKPOINTS), *checkpoint_folders]
    if any("://" in folder for folder in folders) or not (root / "adapter" / ADAPTER_CONFIG).is_file():
        return
    if not (_checkpoints(root, folders, "last*.ckpt") or _was_writing(folders)):
        raise UserError(
            f"`--ckpt_path last`: {str(root)!r} holds an adapter, but there is no last checkpoint in "
            f"{', '.join(folders)}, so training would begin from scratch and replace the adapter. Give a checkpoint by "
            "its path, choose another folder by `--trainer.default_root_dir`, or replace the run by `--overwrite`"
        )


def was_killed_early(root: Path, checkpoint_folders: list[str]) -> bool:
    """Tell whether a run was killed or failed before it had a checkpoint, so that it can only begin again.

    Its lock's file is still there then, or again: `mark_failure` leaves one. (That of a run that goes on is, too:
    `running` refuses a second one.)

    Args:
        root: The run's folder.
        checkpoint_folders: Further folders that the run keeps checkpoints in.
    """
    return lock_path(root / "fit").exists() and _has_nothing(root, checkpoint_folders)


def _has_nothing(root: Path, checkpoint_folders: list[str]) -> bool:
    """Tell whether a run has left nothing to go on from."""
    folders = [str(root / CHECKPOINTS), *checkpoint_folders]
    if any("://" in folder for folder in folders):
        return False
    has_adapter = any((root / name / ADAPTER_CONFIG).is_file() for name in ("adapter", "adapter_best"))
    return not _checkpoints(root, folders, "[!.]*.ckpt") and (_was_writing(folders) or not has_adapter)


def mark_failure(root: Path, checkpoint_folders: list[str]) -> None:
    """Have a training run that failed before its first checkpoint look like one that was killed.

    Args:
        root: The run's folder.
        checkpoint_folders: Further folders that the run keeps checkpoints in.
    """
    if _has_nothing(root, checkpoint_folders):
        with suppress(OSError):  # a disk that is full or cannot be written
            lock_path(root / "fit").touch()


def _checkpoints(root: Path, folders: list[str], names: str) -> list[Path]:
    """List checkpoints; a link whose checkpoint was deleted is listed by `glob`, but does not exist."""
    found = [path for folder in folders for path in Path(folder).glob(names) if path.exists()]
    return found + list(root.glob("hpc_ckpt_*.ckpt"))


def _was_writing(folders: list[str]) -> bool:
    """Tell whether a process was killed while it wrote a checkpoint."""
    return any(any(Path(folder).glob(f".*.ckpt.{kind}")) for folder in folders for kind in ("unfinished", "lock"))


def check_overwrite(root: Path, checkpoint: str | None) -> None:
    """Refuse `--overwrite` where it contradicts `ckpt_path`, where no folder is, and in a job that was restarted.

    Args:
        root: The run's folder.
        checkpoint: `ckpt_path`.

    Raises:
        ValueError: a checkpoint is given, the folder is a file, or the job was restarted and so the run is its own.
    """
    if checkpoint is not None:
        raise UserError(
            f"`--overwrite` begins a new run, `--ckpt_path {checkpoint}` goes on with one. Give one of them"
        )
    if root.exists() and not root.is_dir():
        raise UserError(f"`trainer.default_root_dir={str(root)!r}` is a file, expected a folder")
    for name in _RESTART_COUNTS:
        count = os.environ.get(name, "")
        if count.isdecimal() and int(count) > 0 and holds_run(root):
            raise UserError(
                f"`--overwrite` in a restarted job ({name}={count}) would remove what the job itself has trained in "
                f"{str(root)!r}. Give `--ckpt_path last` in place of `--overwrite`: without a checkpoint it begins "
                "from scratch"
            )


def check_outputs(root: Path, callbacks: Sequence[Callback], *, trains: bool) -> None:
    """Refuse callbacks that would write what another one writes, or over something that no run has written.

    Args:
        root: The run's folder.
        callbacks: Callbacks of the run; the names of what one writes there are its `run_files`.
        trains: Whether checkpoints and adapters are written, too.

    Raises:
        ValueError: names the callbacks, or the argument.
    """
    writers: dict[str, object] = {TENSORBOARD: "the logger", CHECKPOINTS: "a checkpoint"}
    for callback in callbacks:
        for name in getattr(callback, "run_files", ()):
            other = writers.setdefault(name.casefold(), callback)
            if other is not callback:
                raise UserError(
                    f"`trainer.callbacks`: {type(callback).__name__} writes {name!r} into the run's folder, and so "
                    f"does {other if isinstance(other, str) else type(other).__name__}. Leave one out, or give it "
                    "another name if it has an argument for that"
                )
    for callback in callbacks if trains else ():
        if isinstance(callback, AdapterCheckpoint | AdapterAverage):
            for name in callback.run_files:
                check_replaceable(root / name, ADAPTER_FILES)
        if isinstance(callback, ModelCheckpoint):
            _check_checkpoints(root, callback, callbacks)


def _check_checkpoints(root: Path, callback: ModelCheckpoint, callbacks: Sequence[Callback]) -> None:
    """Refuse to keep checkpoints in a folder that is something else's."""
    given = str(callback.dirpath)
    if "://" in given:
        return
    place = Path(given).resolve()
    for other in callbacks:
        if type(other) is type(callback) and other is not callback and Path(str(other.dirpath)).resolve() == place:
            raise UserError(f"`dirpath={given!r}`: two {type(callback).__name__} keep checkpoints there. Leave one out")
    for name in (TENSORBOARD, FIGURES, *(name for other in callbacks for name in getattr(other, "run_files", ()))):
        if place.is_relative_to((root / name).resolve()):
            raise UserError(f"`dirpath={given!r}` is in {name!r}, another output of the run. Choose another folder")
    if place.exists() and not place.is_dir():
        raise UserError(f"`dirpath={given!r}` is a file, expected a folder for checkpoints. Choose another")


def scratch_path(root: Path) -> Path:
    """Return the hidden folder that stands for a run's in a run of ``fast_dev_run``; `running` makes and removes it."""
    return partial_path(root / _SCRATCH)


@contextmanager
def running(trainer: Trainer, root: Path, command: str) -> Iterator[None]:
    """Keep a run's folder to one process of a command; what a killed one left there is removed.

    A run may be evaluated while it trains: other commands write other files.

    Args:
        trainer: Trainer, whose first process alone does this.
        root: The run's folder.
        command: Subcommand.

    Raises:
        ValueError: another process runs the same subcommand there.
    """
    if not trainer.is_global_zero:
        yield
        return
    shown = f"`trainer.default_root_dir={str(root)!r}`"
    advice = f"Wait until that {command} has ended, stop it, or choose another folder by `--trainer.default_root_dir`"
    with ExitStack() as stack:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # one of Lightning's untyped attributes
            stack.enter_context(scratch_folder(root / _SCRATCH))
        else:
            stack.enter_context(owned(root / command, shown, advice))
            if command == "fit":
                for folder in _checkpoint_folders(trainer):
                    stack.enter_context(owned(folder / command, f"`dirpath={str(folder)!r}`", advice))
                    restore_last(folder)
                    remove_leftovers(folder, r".+\.ckpt(?:\.\w+)?")
                _remove_leftovers(trainer, root)
        yield


def _checkpoint_folders(trainer: Trainer) -> set[Path]:
    """Return the folders of checkpoints on this machine, which other runs may share."""
    given = {str(saver.dirpath) for saver in trainer.checkpoint_callbacks if isinstance(saver, ModelCheckpoint)}
    return {Path(folder) for folder in given if "://" not in folder}


def _remove_leftovers(trainer: Trainer, root: Path) -> None:
    callbacks: list[Callback] = getattr(trainer, "callbacks", [])
    for name in {name for callback in callbacks for name in getattr(callback, "run_files", ())}:
        with suppress(InUseError), owned(root / name):  # an adapter that was being replaced comes back
            pass
    remove_leftovers(root, "|".join(map(re.escape, [*RUN_FILES, _SCRATCH])))
    remove_leftovers(root / LONG_CONTEXT, r"\w+\.(?:csv|json|png)")
    remove_leftovers(root / FIGURES, r"\w+\.(?:md|png)")


class Overwrite(Callback):
    """Removes the run that a new one replaces, once model, data and optimizer of the new one are made.

    Only files that a run writes are removed, only where a run is, and only those that were there when this callback
    was made: Lightning opens the loggers' files of the new run before `on_fit_start`.

    Args:
        root: The run's folder.
        adapter_folders: Names of the adapters' folders in it.
        inputs: Inputs of the new run: names of arguments, each with a path or a glob.

    Raises:
        ValueError: one of the inputs would be removed.
    """

    def __init__(self, root: Path, adapter_folders: list[str], inputs: Iterable[tuple[str, str]]) -> None:
        self._root, self._content = root, list(_content(root, adapter_folders)) if holds_run(root) else []
        removed = {place: path for path in self._content for place in _places(path)}
        for name, value in inputs if removed else ():
            for place in _input_places(value):
                for other, path in removed.items():
                    if place.is_relative_to(other) or other.is_relative_to(place):
                        relation = "is in" if place.is_relative_to(other) else "contains some of"
                        raise UserError(
                            f"`{name}={value!r}` {relation} what `--overwrite` would remove ({str(path)!r}). "
                            "Choose another `trainer.default_root_dir`"
                        )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove it, before anything of the new run is written."""
        if trainer.is_global_zero and self._content:
            for path in self._content:
                remove_path(path)
            for folder in map(self._root.joinpath, _CONTENT):
                if folder != self._root and folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()
            rank_zero_info(f"The run that was in {self._root} was removed")
        trainer.strategy.barrier("overwrite")


def _content(root: Path, adapter_folders: list[str]) -> Iterator[Path]:
    """Yield files and folders that a run has written."""
    for folder, patterns in _CONTENT.items():
        for pattern in patterns:
            yield from (root / folder).glob(pattern)
    for name in adapter_folders:
        if (root / name / ADAPTER_CONFIG).is_file():
            yield root / name


def _places(path: Path) -> set[Path]:
    """Return absolute paths of a file; what a link points to is another file."""
    return {Path(os.path.abspath(path)), path.parent.resolve() / path.name}


def _input_places(value: str) -> set[Path]:
    """Return absolute paths of what a path or a glob names, links followed and not."""
    path = Path(os.path.expanduser(value.removeprefix(LOCAL)))
    if is_url(str(path)):
        return set()
    files = match_glob(str(path), LeftOut()) if has_magic(str(path)) and not path.exists() else [path]
    return {place for file in files for place in (*_places(file), file.resolve())}
