"""Nobody pays for Triton who has no GPU: only functions import the kernels."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[3] / "lightning_mixcn"
# The kernels' `__init__` is one of these: it tells whether there is Triton and has no need of it.
OTHERS = [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent.name != "kernels" or path.name == "__init__.py"]


def imported_at_once(source: str) -> list[str]:
    """Names of the modules that a source imports outside functions."""
    names: list[str] = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module or ''}.{alias.name}" for alias in node.names]
    return names


def is_of_kernels(name: str) -> bool:
    return not name.endswith(".kernels.has_triton") and bool({"triton", "kernels"} & set(name.split(".")))


def test_kernels_are_imported_by_functions_only() -> None:
    found = [f"{path.name}: {name}" for path in OTHERS for name in imported_at_once(path.read_text(encoding="utf-8"))]
    assert not [entry for entry in found if is_of_kernels(entry.split(": ")[1])]


@pytest.mark.parametrize(
    "source", ["import triton", "from .kernels.swiglu import swiglu_kernel", "from . import kernels"]
)
def test_imports_are_read_right(source: str) -> None:
    assert any(is_of_kernels(name) for name in imported_at_once(source))
