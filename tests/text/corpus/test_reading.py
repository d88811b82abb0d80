import random
from pathlib import Path

import fsspec
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from lightning_mixcn.text.corpus.reading import (
    CHUNK_BYTES,
    identify,
    is_url,
    match_urls,
    open_file,
    read_chunks,
    split_lines,
)


def test_urls_are_told_from_paths() -> None:
    assert [is_url(path) for path in ("s3://b/x", "data/x", Path("s3://b/x"), "C:/x")] == [True, False, False, False]


def test_a_local_file_and_its_url(tmp_path: Path) -> None:
    file = tmp_path / "x y?.jsonl"
    file.write_bytes(b"abc")
    for path in (file, f"file://{file}"):
        assert identify(path)["size"] == 3
        with open_file(path) as opened:
            assert opened.read() == b"abc"
        before = identify(path)
        assert identify(path) == before
    file.write_bytes(b"abcd")
    assert identify(f"file://{file}") != before


def test_globs_and_folders(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for name in ("b.jsonl", "a.jsonl", "c.md", "deep/d.jsonl"):
        memory.pipe(f"/listed/{name}", b"")

    def listed(url: str) -> list[str]:
        return match_urls(url, "sources[0]", lambda names, _: [name for name in names if name.endswith(".jsonl")])

    assert listed("memory://listed/c.md") == ["memory://listed/c.md"]
    assert listed("memory://listed/*.jsonl") == ["memory://listed/a.jsonl", "memory://listed/b.jsonl"]
    assert listed("memory://listed") == [f"memory://listed/{name}.jsonl" for name in ("a", "b", "deep/d")]
    with pytest.raises(FileNotFoundError, match=r"`sources\[0\].path='memory://listed/\*.txt'` matches no file"):
        listed("memory://listed/*.txt")


def test_a_driver_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> bool:
        raise RuntimeError("no credentials")

    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "isfile", fail)
    with pytest.raises(ValueError, match=r"path='memory://x'` cannot be listed: RuntimeError: no credentials. Check"):
        match_urls("memory://x", "sources[0]", lambda names, _: names)


def test_a_driver_that_fails_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one whose credentials expire between listing and reading."""

    def fail(*arguments: object, **options: object) -> bool:
        raise RuntimeError("expired")

    with pytest.raises(FileNotFoundError, match="`memory://none` is not there, or cannot be reached"):
        identify("memory://none")
    for name in ("info", "open"):
        monkeypatch.setattr(fsspec.get_filesystem_class("memory"), name, fail)
    with pytest.raises(ValueError, match=r"^`memory://x` cannot be read: RuntimeError: expired"):
        identify("memory://x")
    with (
        pytest.raises(ValueError, match=r"^`memory://x` cannot be read: RuntimeError: expired"),
        open_file("memory://x"),
    ):
        pass


@given(st.lists(st.binary(max_size=5) | st.sampled_from([b"\n", b"a\r\nb", b"\n\n"])))
def test_lines_do_not_depend_on_the_pieces(chunks: list[bytes]) -> None:
    text = b"".join(chunks)
    lines = text.split(b"\n" if b"\n" in text else b"\r")
    if not lines[-1]:
        lines.pop()
    assert list(split_lines(chunks, 1 << 20)) == list(enumerate(lines, start=1))


@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("a\rbb\r\rc", ["a", "bb", "", "c"]),
        ("a\rbb\r", ["a", "bb"]),
        ("1\r2\nb\r\n", ["1\r2", "b\r"]),
        ("aaaaaa\nb\naaaaaaa", [None, "b", None]),
        ("aaaaa\rb\raaaaaaa\rc", ["aaaaa", "b", None, "c"]),
    ],
)
def test_line_ends_and_lines_that_are_too_long(text: str, lines: list[str | None], size: int) -> None:
    chunks = [text[place : place + size].encode() for place in range(0, len(text), size)]
    expected = [line if line is None else line.encode() for line in lines]
    assert [line for _, line in split_lines(chunks, 5)] == expected


def test_chunks_are_of_bounded_size(tmp_path: Path) -> None:
    data = bytes(300_000_000)
    (tmp_path / "x.zst").write_bytes(zstandard.compress(data))
    assert (tmp_path / "x.zst").stat().st_size < 40_000
    (tmp_path / "x").write_bytes(random.Random(0).randbytes(3_000_000))
    assert max(len(chunk) for chunk in read_chunks(tmp_path / "x")) == 1 << 20
    assert sum(len(chunk) for chunk in read_chunks(tmp_path / "x.zst")) == len(data)


def test_what_the_file_system_says_is_no_damage(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        list(read_chunks(tmp_path))


def test_a_line_end_may_be_cut_between_two_pieces() -> None:
    line = b"a" * (CHUNK_BYTES - 1)
    assert list(split_lines([line + b"\r", b"\nb\r\n"], 1 << 30)) == [(1, line + b"\r"), (2, b"b\r")]
