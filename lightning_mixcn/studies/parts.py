"""Results of a long study kept part by part, so that a study that was killed goes on where it was."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_mixcn.errors import ExistingFileError
from lightning_mixcn.files.atomic import check_output, new_file, remove_path, unfinished_path, write_json
from lightning_mixcn.masking import without_secrets

Arrays = dict[str, NDArray[Any]]
_SETTINGS = "settings.json"


class StudyParts:
    """Finished parts in a hidden folder beside the study's output.

    Args:
        out: The output folder, which is made when the study is finished.
        settings: All that the results depend on, as JSON has it.

    Attributes:
        folder: The hidden folder.

    Raises:
        FileExistsError: ``out`` is not free, or the parts belong to a study with other settings.
    """

    def __init__(self, out: Path, settings: dict[str, Any]) -> None:
        """Open the parts of the same study; of a new one nothing is written yet."""
        check_output(out)
        self.folder, self._settings = unfinished_path(out), without_secrets(settings)
        file = self.folder / _SETTINGS
        if file.is_file():
            check_settings(json.loads(file.read_text(encoding="utf-8")), self._settings, self.folder)

    def __contains__(self, name: str) -> bool:
        """Tell whether a part is finished."""
        return self._path(name).is_file()

    def save(self, name: str, arrays: Arrays) -> None:
        """Keep a part; it is there whole or not at all.

        Raises:
            OSError: the disk is full, or the folder cannot be written.
        """
        self._begin()
        with new_file(self._path(name), replace=True) as unfinished:
            np.savez(unfinished, **arrays)  # type: ignore[arg-type]  # it takes any names

    def folder_of(self, name: str) -> Path:
        """Return the path of a part that is a folder of its own, such as a model; write it in one step."""
        self._begin()
        return self.folder / name

    def load(self, name: str) -> Arrays:
        """Return what was saved."""
        with np.load(self._path(name), allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}

    def delete(self) -> None:
        """Remove all parts, once the output is there."""
        remove_path(self.folder, _SETTINGS)

    def _begin(self) -> None:
        if not (self.folder / _SETTINGS).is_file():
            write_json(self.folder / _SETTINGS, self._settings)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.npz"


def check_settings(there: dict[str, Any], asked: dict[str, Any], folder: Path) -> None:
    """Raise FileExistsError if a folder's study is not the one that is asked for, naming what differs."""
    for key in sorted({*there, *asked}):
        if there.get(key) != asked.get(key):
            raise ExistingFileError(
                f"{str(folder)!r} holds a study with `{key}={there.get(key)!r}`, but now it is {asked.get(key)!r}. "
                "Give the former to go on with it, choose another `--out`, or delete that folder"
            )


def finished_before(folder: Path, report: str, settings: dict[str, Any], *, table: str | None = None) -> bool:
    """Tell whether this very study is there already; its table is printed again.

    Args:
        folder: Output folder of the study.
        report: Name of the JSON file there that holds ``settings``.
        settings: Settings of the study that is asked for.
        table: Name of the text file there to print.

    Raises:
        FileExistsError: the folder holds a study with other settings.
    """
    if not (folder / report).is_file():
        return False
    there = json.loads((folder / report).read_text(encoding="utf-8")).get("settings", {})
    check_settings(there, settings, folder)
    if table is not None:
        print((folder / table).read_text(encoding="utf-8"))
    forget_parts(folder)
    say(f"{folder} was finished before.")
    return True


def forget_parts(out: Path) -> None:
    """Remove the parts of a study whose output is there: a kill may have come between the two."""
    if (unfinished_path(out) / _SETTINGS).is_file():
        remove_path(unfinished_path(out), _SETTINGS)


def say(text: str) -> None:
    """Print what is no result, to standard error."""
    print(text, file=sys.stderr, flush=True)
