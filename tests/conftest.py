"""Fixtures of all tests."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random Mixtral with a tokenizer of bytes, as stock transformers writes it. Read only."""
    from lightning_mixcn.testing import save_tiny_mixtral

    return save_tiny_mixtral(tmp_path_factory.mktemp("tiny") / "base")
