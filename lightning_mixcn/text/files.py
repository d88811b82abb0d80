"""Files of text, local or behind an URL: listed, opened and told apart from what they were before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

# What the fsspec drivers call the size, the time of the last change and the hash of a file's contents.
_IDENTITY_KEYS = (
    "size",
    "mtime",
    "created",
    "last_modified",
    "LastModified",
    "ETag",
    "etag",
    "md5Hash",
    "content_md5",
    "checksum",
    "generation",
    "blob_id",
)


def is_url(path: str | Path) -> bool:
    """Whether a path is to be opened by an fsspec driver, such as `s3://bucket/a.jsonl`."""
    return isinstance(path, str) and "://" in path


def match_urls(pattern: str, place: str, belongs: Callable[[Path], bool]) -> list[str]:
    """List the files of an URL: itself, the fitting files of a folder, or what a glob matches.

    Args:
        pattern: URL of a file, a folder or a glob.
        place: How the configuration names the source, for errors.
        belongs: Whether a file of a folder, by its path inside, is text of the source.

    Returns:
        At least one URL; those of folders and globs sorted.

    Raises:
        FileNotFoundError: Nothing matches.
        ValueError: The URL has no driver, or the driver cannot list it.
    """
    system, path = _file_system(pattern, f"{place}.path")
    try:
        if system.isfile(path):
            return [pattern]
        if system.isdir(path):
            inside = {str(name): str(name).removeprefix(path.rstrip("/") + "/") for name in system.find(path)}
            names = sorted(name for name, relative in inside.items() if belongs(Path(relative)))
        else:
            names = sorted(str(name) for name in system.glob(path) if system.isfile(name))
    except Exception as error:  # each driver has exceptions of its own
        raise ValueError(
            f"`{place}.path={pattern!r}` cannot be listed: {type(error).__name__}: {error}. "
            "Check the address, the network and the credentials of its driver"
        ) from error
    if not names:
        raise FileNotFoundError(
            f"`{place}.path={pattern!r}` matches no file with a known suffix, or cannot be reached. "
            "Give the URL of a file, a folder or a glob"
        )
    # A driver's paths lack the protocol, and with some the host: both stand before the path in the pattern.
    bare = pattern.rstrip("/")
    prefix = bare.removesuffix(path.rstrip("/"))
    return [prefix + name if prefix != bare else str(system.unstrip_protocol(name)) for name in names]


def open_file(path: str | Path) -> IO[bytes]:
    """Open a local file or an URL for reading its raw bytes."""
    if isinstance(path, Path):
        return path.open("rb")
    system, inside = _file_system(path, "path")
    opened: IO[bytes] = system.open(inside, "rb")
    return opened


def identify(path: str | Path) -> dict[str, int | str]:
    """Tell what changes when a file does.

    Args:
        path: Local file or URL.

    Returns:
        `size` in bytes (0 if a server does not say) and `mtime_ns`, or for an URL what its driver knows of size,
        times and hashes.

    Raises:
        FileNotFoundError: There is no such file.
    """
    if isinstance(path, Path):
        stat = path.stat()
        return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    system, inside = _file_system(path, "path")
    known = system.info(inside)
    identity: dict[str, int | str] = {key: str(known[key]) for key in _IDENTITY_KEYS if known.get(key) is not None}
    return {**identity, "size": int(known.get("size") or 0)}


def _file_system(url: str, argument: str) -> tuple[Any, str]:
    """Get the fsspec file system of an URL, and the path in it."""
    from fsspec.core import url_to_fs

    try:
        system, path = url_to_fs(url)
    except ImportError as error:
        raise ValueError(
            f"`{argument}={url!r}` needs a driver that is not installed: {_package_of(url)}. fsspec says: {error}"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"`{argument}={url!r}`: {error}. Give a local path, or an URL that fsspec knows, e.g. s3:// or https://"
        ) from error
    return system, path


def _package_of(url: str) -> str:
    """Say how to install the driver of an URL."""
    from fsspec.registry import known_implementations

    protocol = url.split("://")[0].split("::")[0]
    package = known_implementations.get(protocol, {"class": "fsspec"})["class"].split(".")[0]
    return f"pip install {package}" if package != "fsspec" else f"pip install 'fsspec[{protocol}]'"
