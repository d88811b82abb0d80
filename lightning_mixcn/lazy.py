"""Import a package's public names when they are first used (PEP 562): a command's help must not wait for torch."""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from sys import modules


def lazy_names(
    package: str, homes: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """Make a package's ``__getattr__`` and ``__dir__``.

    Args:
        package: Name of the package, ``__name__`` in its ``__init__.py``.
        homes: Names by the module that has them, relative to the package.

    Returns:
        The two functions. The first raises AttributeError for any other name.
    """
    home_of = {name: home for home, names in homes.items() for name in names}

    def get(name: str) -> object:
        if name not in home_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}; it has {', '.join(sorted(home_of))}")
        value: object = getattr(import_module(home_of[name], package), name)
        setattr(modules[package], name, value)
        return value

    def names() -> list[str]:
        return sorted({*vars(modules[package]), *home_of})

    return get, names
