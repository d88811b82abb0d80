from pathlib import Path

import pytest

from lightning_mixcn.demo.base import digest_of_sources, reuse_or_make


class Maker:
    """Fills a folder and counts how often."""

    def __init__(self, content: str) -> None:
        self.content, self.calls = content, 0

    def __call__(self, folder: Path) -> None:
        self.calls += 1
        (folder / "content").write_text(self.content, encoding="utf-8")


def test_a_result_is_made_once_and_again_for_other_inputs(tmp_path: Path) -> None:
    result, first, second = tmp_path / "deep" / "result", Maker("one"), Maker("two")
    assert reuse_or_make(result, {"input": "a"}, first) is False
    assert reuse_or_make(result, {"input": "a"}, first) is True
    assert first.calls == 1
    assert reuse_or_make(result, {"input": "b"}, second) is False
    assert (result / "content").read_text(encoding="utf-8") == "two"
    assert [path.name for path in result.parent.iterdir()] == ["result"]


def test_a_failure_leaves_the_older_result_and_does_not_stand_in_the_way(tmp_path: Path) -> None:
    result = tmp_path / "result"
    reuse_or_make(result, {"input": "a"}, Maker("one"))

    def fail(folder: Path) -> None:
        Maker("half")(folder)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        reuse_or_make(result, {"input": "b"}, fail)
    assert (result / "content").read_text(encoding="utf-8") == "one"
    assert reuse_or_make(result, {"input": "b"}, Maker("two")) is False
    assert (result / "content").read_text(encoding="utf-8") == "two"


def test_sources_have_another_digest_when_one_changes(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1", encoding="utf-8")
    before = digest_of_sources(tmp_path)
    (tmp_path / "notes.txt").write_text("not code", encoding="utf-8")
    assert digest_of_sources(tmp_path) == before
    (tmp_path / "a.py").write_text("x = 2", encoding="utf-8")
    assert digest_of_sources(tmp_path) != before
