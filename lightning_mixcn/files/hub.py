"""From what a person names — a folder or a hub id — to a folder on this machine."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from lightning_mixcn.errors import MissingFileError, NotAFolderError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

# Never pickles. `consolidated.*` is Mistral's own second copy of the weights.
_ALLOWED_FILES = ["*.safetensors", "*.json", "tokenizer*", "*.model", "merges.txt", "vocab.txt", "*.jinja", "README.md"]
_IGNORED_FILES = ["consolidated*", "original/*", "*.bin", "*.pt", "*.pth", "*.pkl"]


def cache_root() -> Path:
    """Get the cache folder: `$MIXCN_CACHE`, or `lightning_mixcn` in `$XDG_CACHE_HOME` or `~/.cache`."""
    if own := os.environ.get("MIXCN_CACHE"):
        return Path(os.path.expanduser(own)).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")).absolute() / "lightning_mixcn"


def public_name(path: str | Path) -> str:
    """Name a model for files that leave this machine: a hub id as it is, a folder without the path to it."""
    folder = Path(path).expanduser()
    return folder.resolve().name if folder.is_dir() else folder.name if folder.is_absolute() else str(path)


def local_folder(
    path: str | Path, files: Sequence[str] = _ALLOWED_FILES, *, holding: str = "config.json and *.safetensors"
) -> Path:
    """Resolve a checkpoint's name to a folder, downloading it from the hub only if it looks like ``owner/name``.

    Args:
        path: A folder, or a hub id.
        files: Patterns of the files to fetch of a hub model; safetensors, JSON and tokenizer files if left out.
        holding: Files that the folder is wanted for, in errors.

    Returns:
        The folder (for a hub id: in huggingface_hub's cache).

    Raises:
        FileNotFoundError: no such folder, and no such hub model or no way to reach it.
        NotADirectoryError: it is a file.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise NotAFolderError(f"{str(path)!r} is a file, expected a folder with {holding}")
    if not _HUB_ID.fullmatch(str(path)):
        raise MissingFileError(f"{str(path)!r} is not there. Give a folder with {holding}, or a hub id owner/name")
    return _from_hub(str(path), files)


def _from_hub(hub_id: str, files: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=[*files], ignore_patterns=_IGNORED_FILES))
    except HfHubHTTPError as error:
        raise MissingFileError(
            f"{hub_id!r} is neither a folder nor a hub model that can be read ({type(error).__name__}). "
            "Check the name, log in with `hf auth login` if the model is gated, or give a local folder"
        ) from error
    except (LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise MissingFileError(
            f"{hub_id!r} is not a folder, and not in the local hub cache, and the hub cannot be reached "
            f"({type(error).__name__}). Give a local folder"
        ) from error
