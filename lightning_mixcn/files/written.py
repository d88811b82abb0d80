"""Say what a command has written: where, how large, and what reads it."""

from pathlib import Path

_UNITS = ("B", "kB", "MB", "GB", "TB")


def say_written(path: Path, what: str) -> None:
    """Print a line on standard output.

    Args:
        path: The file or folder.
        what: What it is, and what reads it.
    """
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    print(f"{path} ({in_units(sum(file.stat().st_size for file in files))}): {what}", flush=True)


def in_units(size: float) -> str:
    """Write a number of bytes in its decimal unit.

    >>> in_units(1_234_567_890)
    '1.23 GB'
    """
    power = 0
    while size >= 999.5 and power < len(_UNITS) - 1:
        size, power = size / 1000, power + 1
    return f"{size:.3g} {_UNITS[power]}"
