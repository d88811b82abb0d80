"""Who may import whom: read from the sources, so an import inside a function counts too."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_mixcn"

ALLOWED = {
    "text": set(),
    "metrics": set(),
    "model": set(),
    "data": {"text"},
    "modules": {"model", "metrics"},
    "studies": {"modules", "data", "model", "metrics", "text"},
    "callbacks": {"modules", "data", "studies", "metrics", "text", "model"},
    "demo": {"callbacks", "cli", "data", "metrics", "model", "modules", "studies", "text"},
    # What tests need; nothing else may import it, and the sets above do not name it.
    "testing": {"callbacks", "data", "metrics", "model", "modules", "studies", "text"},
    "configs": set(),
}


def layers() -> list[str]:
    return sorted(path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__")


def imported_layers(source: str, package: str) -> Iterator[str]:
    """Layers of lightning_mixcn that a module of ``package`` (dotted) imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # `from . import x` in lightning_mixcn.a.b is relative to lightning_mixcn.a.b itself, `..` to its parent.
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = [base] if base.count(".") else [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            root, _, rest = name.partition(".")
            if root == "lightning_mixcn" and rest and (PACKAGE / rest.split(".")[0]).is_dir():
                yield rest.split(".")[0]


def test_every_folder_is_in_the_table() -> None:
    assert set(layers()) <= set(ALLOWED)


@pytest.mark.parametrize("layer", layers())
def test_a_layer_imports_only_what_it_may(layer: str) -> None:
    wrong = []
    for path in sorted((PACKAGE / layer).rglob("*.py")):
        relative = path.relative_to(PACKAGE).parent
        package = ".".join(["lightning_mixcn", *relative.parts])
        for name in imported_layers(path.read_text(encoding="utf-8"), package):
            if name not in ALLOWED[layer] | {layer}:
                wrong.append(f"{path.relative_to(ROOT)} imports lightning_mixcn.{name}")
    assert not wrong, f"{layer} may import {sorted(ALLOWED[layer]) or 'no sibling'}: {wrong}"


@pytest.mark.parametrize(
    ("source", "package", "expected"),
    [
        ("import lightning_mixcn.model.nf4.codec", "lightning_mixcn.data", ["model"]),
        ("from lightning_mixcn import model", "lightning_mixcn.data", ["model"]),
        ("from lightning_mixcn.model import nf4", "lightning_mixcn.data", ["model"]),
        ("from ..model import nf4", "lightning_mixcn.data", ["model"]),
        ("from .. import model", "lightning_mixcn.data", ["model"]),
        ("from .rows import Row", "lightning_mixcn.data", ["data"]),
        ("from ..x import y", "lightning_mixcn.data.deep", ["data"]),
        ("def f():\n    from lightning_mixcn.model import nf4", "lightning_mixcn.data", ["model"]),
        ("import torch\nfrom lightning_mixcn import __version__", "lightning_mixcn.data", []),
    ],
)
def test_imports_are_read_right(source: str, package: str, expected: list[str]) -> None:
    assert list(imported_layers(source, package)) == expected
