"""Fixtures of all tests."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Without a GPU, Triton's kernels run in its interpreter. It reads this once, when something first imports it, and
# bitsandbytes does; nothing else here uses Triton on a CPU.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


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
