"""Which base something was made from, in a file beside it: PEFT's own configuration has a path, but no content."""

import json
from pathlib import Path

from .checkpoint import Checkpoint

IDENTITY_FILE = "base_identity.json"


def base_identity(path: str | Path) -> dict[str, str]:
    """What identifies a base: its path as given and a hash of its content.

    The hash covers the configuration, every tensor's name, shape and type, and a sample of the content, so it takes
    seconds for any size.
    """
    return {"path": str(path), "sha256": Checkpoint(path).identity()}


def write_identity(folder: Path, identity: dict[str, str]) -> None:
    """Write ``base_identity.json``.

    Args:
        folder: Of the adapter, or of the 4-bit model.
        identity: ``{"path", "sha256"}`` of the base, see `base_identity`.
    """
    (folder / IDENTITY_FILE).write_text(json.dumps(identity, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_identity(folder: Path) -> dict[str, str] | None:
    """What `write_identity` wrote there; ``None`` where it did not.

    Raises:
        ValueError: the file is broken.
    """
    file = folder / IDENTITY_FILE
    if not file.is_file():
        return None
    try:
        identity = json.loads(file.read_text(encoding="utf-8"))
        return {key: str(identity[key]) for key in ("path", "sha256")}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{str(file)!r} does not hold a base's path and sha256. Copy it again, or delete it"
        ) from error


def check_made_from(folder: Path, base: str | Path) -> None:
    """Check that what is in a folder was made from a base; its folder may have moved.

    A 4-bit base counts as the base that it was quantised from.

    Args:
        folder: With ``base_identity.json``; without it there is nothing to check.
        base: Folder or hub id.

    Raises:
        ValueError: it is another base.
    """
    recorded = read_identity(folder)
    if recorded is None:
        return
    checkpoint = Checkpoint(base)
    present, original = checkpoint.identity(), read_identity(checkpoint.path)
    if recorded["sha256"] not in (present, original and original["sha256"]):
        raise ValueError(
            f"{str(folder)!r} was made from the base {recorded['path']} (sha256 {recorded['sha256'][:12]}…), but "
            f"{base} is another one (sha256 {present[:12]}…). Give the former, or move it back to its place"
        )
