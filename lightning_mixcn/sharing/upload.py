"""Put an adapter or an exported model on the Hugging Face hub: what is checked before, and what is sent."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # re-exported without saying so

from lightning_mixcn.errors import MissingFileError, NotAFolderError, UserError, one_line
from lightning_mixcn.files.written import in_units
from lightning_mixcn.model.checkpoints.folder import CONFIG_FILE, Checkpoint
from lightning_mixcn.model.export.card import CARD_NAME
from lightning_mixcn.model.find import ADAPTER_FOLDER
from lightning_mixcn.model.lora.adapter_file import CONFIG_NAME, AdapterFile

_PICKLES = (".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth")
# How pickles of protocol 2 and later begin, and torch's archives of them.
_PICKLED = re.compile(rb"\x80[\x02-\x05]|PK\x03\x04")


def push_folder(src: Path, name: str, *, private: bool, dry_run: bool) -> None:
    """Send a run's adapter, or an export.

    Args:
        src: Folder of a run, or one that `mixcn export` wrote.
        name: Repository, ``owner/name``; made where there is none.
        private: Only its owner may see the repository.
        dry_run: List what would be sent.

    Raises:
        FileNotFoundError: there is no such folder, or a file of it is missing.
        ValueError: the name cannot be one, the folder is not whole or holds pickles, there is no token, or the hub
            cannot be reached or refuses.
    """
    _check_name(name)
    folder = folder_to_push(src)
    files = files_to_push(folder)
    if not dry_run:
        _check_hub()
    for file in files:
        print(f"{in_units(file.stat().st_size):>8}  {file.relative_to(folder)}")
    total = in_units(sum(file.stat().st_size for file in files))
    if dry_run:
        print(f"{len(files)} files, {total}, would go from {folder} to {_address(name)}. Nothing was sent", flush=True)
        return
    with _refusals(name):
        _send(folder, files, name, private)
    print(f"{len(files)} files, {total}: {_address(name)}", flush=True)


def folder_to_push(src: Path) -> Path:
    """Return the folder to send: of a run its adapter's. Raises: FileNotFoundError, ValueError."""
    if not src.exists():
        raise MissingFileError(f"`src={str(src)!r}` is not there. Give the folder of a run or of an export")
    if not src.is_dir():
        raise NotAFolderError(f"`src={str(src)!r}` is a file. Give the folder of a run or of an export")
    for folder in (src, src / ADAPTER_FOLDER):
        if (folder / CONFIG_NAME).is_file():
            base = (
                AdapterFile(folder).config.base_model_name_or_path or ""
            )  # whole, or an error that says what is missing
            if Path(base).is_absolute():
                print(
                    f"{CONFIG_NAME} names the base by a folder of this machine, {base!r}: set base_model_name_or_path "
                    "there to its hub id for other tools",
                    file=sys.stderr,
                )
            return folder
    if (src / CONFIG_FILE).is_file():
        Checkpoint(str(src.resolve()))
        return src
    raise MissingFileError(
        f"`src={str(src)!r}` is neither a run with {ADAPTER_FOLDER}/ nor an export: it has no {CONFIG_NAME} and no "
        f"{CONFIG_FILE}. Give the folder that `mixcn fit` or `mixcn export` wrote"
    )


def files_to_push(folder: Path) -> list[Path]:
    """Return the files of a folder, hidden ones left out.

    Args:
        folder: Folder of an adapter or a model.

    Raises:
        FileNotFoundError: there is no model card.
        ValueError: there is a pickle, which can run code where it is loaded, by its name or its first bytes.
    """
    if not (folder / CARD_NAME).is_file():
        raise MissingFileError(
            f"{str(folder)!r} has no model card, {CARD_NAME}. Write one, or have `mixcn export` write the folder"
        )
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    files = [path for path in paths if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    for file in files:
        with file.open("rb") as content:
            is_pickle = file.suffix in _PICKLES or _PICKLED.match(content.read(4)) is not None
        if is_pickle:
            raise UserError(
                f"{str(file)!r} may be a pickle, which runs code where it is loaded: only safetensors are sent. Move "
                "it out of the folder"
            )
    return files


def _check_name(name: str) -> None:
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"`name={name!r}`: {one_line(error)}. Give owner/name, such as me/mixtral-zh") from error
    if name.count("/") != 1:
        raise UserError(f"`name={name!r}` has no owner. Give owner/name, such as me/mixtral-zh")


def _check_hub() -> None:
    """Refuse to begin where nothing could be sent."""
    if constants.HF_HUB_OFFLINE:
        raise UserError("`HF_HUB_OFFLINE` is set: nothing can be sent. Unset it, or list the files by `--dry_run`")
    if get_token() is None:
        raise UserError("there is no token of the hub. Log in with `hf auth login`, or set HF_TOKEN to one that writes")


def _send(folder: Path, files: list[Path], name: str, private: bool) -> None:
    api = HfApi(endpoint=constants.ENDPOINT)
    api.create_repo(name, private=private, exist_ok=True)
    if private and not api.repo_info(name).private:
        raise UserError(f"{name!r} is there already, and public. Choose another name, or leave out --private")
    names = [file.relative_to(folder).as_posix() for file in files]
    api.upload_folder(repo_id=name, folder_path=folder, allow_patterns=names, commit_message="Upload with mixcn push")


@contextmanager
def _refusals(name: str) -> Iterator[None]:
    """Say in one line what the hub, or the way to it, refuses."""
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise UserError(f"nothing can be sent: {one_line(error)}") from error
    except HfHubHTTPError as error:
        raise UserError(
            f"the hub refuses {name!r}: {one_line(error)} Check owner and name, and that the token may write there"
        ) from error
    except Exception as error:
        # Which library huggingface_hub connects with, and so whose error it is, changes with its version.
        if not (isinstance(error, OSError) or type(error).__module__.startswith(("httpx", "requests", "urllib3"))):
            raise
        raise UserError(
            f"{constants.ENDPOINT} cannot be reached: {one_line(error)}. Try again with a network, or list the files "
            "by `--dry_run`"
        ) from error


def _address(name: str) -> str:
    return f"{constants.ENDPOINT}/{name}"
