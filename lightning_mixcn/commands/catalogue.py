"""The classes that a configuration may name, by kind and by their short names; found in sources, without torch."""

import re
from collections.abc import Iterator

from lightning_mixcn.errors import nearest

from .classes import base_names, documentation, exported_names, find_class, is_abstract

# By the name of a kind: the class that all of it derive from, and the packages that have them, ours first.
KINDS = {
    "modules": ("LightningModule", ("lightning_mixcn",)),
    "data_modules": ("LightningDataModule", ("lightning_mixcn",)),
    "callbacks": ("Callback", ("lightning_mixcn.callbacks", "lightning.pytorch.callbacks")),
    "strategies": ("Strategy", ("lightning_mixcn.modules", "lightning.pytorch.strategies")),
    "optimizers": ("Optimizer", ("torch.optim", "bitsandbytes.optim")),
    "schedules": ("LRScheduler", ("lightning_mixcn.modules", "torch.optim.lr_scheduler")),
    "loggers": ("Logger", ("lightning.pytorch.loggers",)),
}
_NAMED = tuple(dict.fromkeys(package for _, packages in KINDS.values() for package in packages))
# The last one has the types of the modules' arguments, and much that no configuration names.
_PACKAGES = (
    *_NAMED,
    "lightning_mixcn.data",
    "lightning_mixcn.text",
    "lightning.pytorch",
    "lightning_mixcn.modules.causal_lm",
)


def class_path(name: str) -> str | None:
    """Return the import path of a class.

    Args:
        name: Its name, or its path.

    Returns:
        The path; None where there is no such class.
    """
    paths = [name] if "." in name else [f"{package}.{name}" for package in _PACKAGES]
    return next((path for path in paths if find_class(path) is not None), None)


def nearest_class(name: str) -> str | None:
    """Return the class that was probably meant, as a configuration writes it: an optimizer by its full path.

    Args:
        name: A name or a path of no class.

    >>> nearest_class("ExpertLoadMonitr"), nearest_class("torch.optim.AdanW")
    ('ExpertLoadMonitor', 'torch.optim.AdamW')
    """
    found = nearest(name.rpartition(".")[2], [each for package in _NAMED for each in exported_names(package)])
    path = None if found is None else class_path(found)
    # Both packages of optimizers have an AdamW, and jsonargparse refuses the bare name.
    return path if path is not None and path.startswith(KINDS["optimizers"][1]) else found


def members(kind: str) -> Iterator[tuple[str, dict[str, str]]]:
    """List the classes of a kind.

    Args:
        kind: Name in `KINDS`.

    Yields:
        A package, and a line about each of its classes by name; bases that cannot be used are left out.
    """
    base, packages = KINDS[kind]
    for package in packages:
        lines = {}
        for name in sorted(exported_names(package), key=str.lower):
            found = find_class(f"{package}.{name}")
            if found is not None and base in base_names(found) and not is_abstract(found):
                lines[name] = first_sentence(documentation(found).short_description or "")
        if lines:
            yield package, lines


def first_sentence(text: str) -> str:
    """Return the first sentence of a docstring, without its end."""
    return re.split(r"(?<=[.;])\s", " ".join(text.split()), maxsplit=1)[0].rstrip(".;")
