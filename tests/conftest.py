"""Fixtures of all tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder of unpacked texts, so that no test reads or writes the cache of whoever runs it."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIXCN_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random Mixtral with a tokenizer of bytes, as stock transformers writes it. Read only."""
    from lightning_mixcn.testing import save_tiny_mixtral

    return save_tiny_mixtral(tmp_path_factory.mktemp("tiny") / "base")
