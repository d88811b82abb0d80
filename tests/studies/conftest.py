"""Models and texts that the tests of this folder share."""

import json
from pathlib import Path

import pytest

from lightning_mixcn.studies.experts import report as expert_report
from lightning_mixcn.testing import save_tiny_mixtral
from tests.studies.experts.stock_experts import write_texts

SHARED = Path(__file__).parents[2].parent / "shared" / "data"


@pytest.fixture(scope="session")
def routed_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny Mixtral whose experts differ; three layers, so that one has layers below and above."""
    folder = tmp_path_factory.mktemp("routed") / "base"
    return save_tiny_mixtral(folder, initializer_range=0.25, num_hidden_layers=3)


@pytest.fixture(scope="session")
def stories_base() -> Path:
    """Return a real pretrained Mixtral of 757,000 parameters."""
    folder = SHARED / "models" / "stories260K-mixtral-4e"
    if not folder.is_dir():
        pytest.skip("the pretrained fixture stories260K-mixtral-4e lies outside the project and is not here")
    return folder


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two small sources."""
    folder = tmp_path_factory.mktemp("texts")
    return [
        write_texts(folder / "zh.jsonl", "中文大小人天地", 12),
        write_texts(folder / "en.jsonl", "the quick brown fox ", 40, seed=1),
    ]


@pytest.fixture(scope="session")
def stories_texts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two sources of English, as the pretrained fixture knows it."""
    folder = tmp_path_factory.mktemp("stories")
    tales = [
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. ",
        "One day, Tom saw a big dog. The dog was very happy and wanted to play with the ball. ",
        'The sun was hot. Mom said, "Let\'s go home and eat some cake!" They were all very happy. ',
        "A small bird sat in a tree. It was sad because it could not find its mom. Then a boy came to help. ",
    ]
    other = ["To be, or not to be, that is the question. ", "The committee approved its annual report. "]
    for name, sentences in (("tales", tales), ("other", other * 2)):
        lines = (json.dumps({"text": sentence}) + "\n" for sentence in sentences)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return [folder / "tales.jsonl", folder / "other.jsonl"]


@pytest.fixture
def pictures() -> None:
    """Pictures are drawn, which takes longer than all the rest."""


@pytest.fixture
def no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "pictures" not in request.fixturenames:
        for name in ("save_heatmaps", "save_matrices"):
            monkeypatch.setattr(expert_report, name, lambda path, *_: path.touch())
