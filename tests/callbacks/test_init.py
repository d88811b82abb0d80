"""The package has one name only."""

import importlib.util
from pathlib import Path

import pytest


def test_it_cannot_be_imported_as_callbacks() -> None:
    path = Path(__file__).parents[2] / "callbacks" / "__init__.py"
    spec = importlib.util.spec_from_file_location("callbacks", path)
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(
        ImportError, match=r"this package is lightning_mixcn.callbacks, but was imported as 'callbacks'"
    ):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
