"""Zip archives: each member is read as the file of its extension."""

import gzip
import logging
import random
import zipfile
from collections.abc import Callable
from pathlib import Path

import datasets
import fsspec
import pyarrow
import pytest
from pyarrow import feather, parquet

from lightning_mixcn.text import (
    ConversationSource,
    Corpus,
    DocumentOrigin,
    Source,
    read_corpus,
)
from lightning_mixcn.text.corpus.listings import LeftOut, list_files
from lightning_mixcn.text.corpus.reading import identify, open_file


def texts_of(corpus: Corpus) -> list[str]:
    return [corpus.text(index) for index in range(len(corpus))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Fill a folder with a file of each format."""
    (tmp_path / "in/deep").mkdir(parents=True)
    (tmp_path / "in/a.jsonl").write_text('{"text": "one"}\n{"text": "两"}\n')
    (tmp_path / "in/b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "three"}\n'))
    (tmp_path / "in/c.json").write_text('["four", {"text": "five"}]')
    (tmp_path / "in/deep/d.txt").write_bytes(b"\xef\xbb\xbfsix\n")
    parquet.write_table(pyarrow.table({"text": ["seven"] * 300}), tmp_path / "in/e.parquet", row_group_size=100)
    feather.write_feather(pyarrow.table({"text": ["eight", ""]}), str(tmp_path / "in/f.arrow"))
    (tmp_path / "in/readme.md").touch()
    (tmp_path / "in/.hidden.jsonl").touch()
    return tmp_path / "in"


def pack(folder: Path, archive: Path, method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(archive, "w", method) as packed:
        for path in folder.rglob("*"):
            packed.write(path, path.relative_to(folder))
    return archive


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_an_archive_has_what_its_folder_has(
    method: int, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(folder, tmp_path / "x.zip", method)
    monkeypatch.chdir(tmp_path)
    unpacked = read_corpus(Source("zh", str(folder)))
    memory = fsspec.filesystem("memory")
    memory.pipe("/packed/x.zip", (tmp_path / "x.zip").read_bytes())
    for path in ("x.zip", "*.zip", f"{tmp_path}/x.zip", f"file://{tmp_path}/x.zip", "memory://packed/x.zip"):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            corpus = read_corpus(Source("zh", path))
        assert sorted(texts_of(corpus)) == sorted(texts_of(unpacked))
        assert corpus.empty_records == 1
        (message,) = caplog.messages
        assert "6 files read, 2 left out: 1 hidden (`" in message
        assert "1 with another suffix (`" in message
    inside = f"zip://a.jsonl::{tmp_path}/x.zip"
    assert read_corpus(Source("zh", "x.zip")).origin(1) == DocumentOrigin("zh", inside, 2)
    assert identify(inside)["size"] == (folder / "a.jsonl").stat().st_size
    with open_file(inside) as opened:
        assert opened.read() == (folder / "a.jsonl").read_bytes()


def test_a_folder_with_archives(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    pack(folder, tmp_path / "data/x.zip")
    (tmp_path / "data/y.jsonl").write_text('{"text": "y"}\n')
    (tmp_path / "data/z.zip").symlink_to("x.zip")
    corpus = read_corpus(Source("zh", str(tmp_path / "data"), format="jsonl"))
    assert texts_of(corpus) == ["one", "两", "three", "y"]
    assert len(list_files(Source("zh", [f"{tmp_path}/data/*.zip", f"file://{tmp_path}/data/x.zip"]))) == 6


def test_members_are_chosen_by_a_glob(folder: Path, tmp_path: Path) -> None:
    archive = pack(folder, tmp_path / "x.zip")
    for pattern, names in {
        "*.jsonl*": ["a.jsonl", "b.jsonl.gz"],
        "**/*.txt": ["deep/d.txt"],
        "a.jsonl": ["a.jsonl"],
    }.items():
        found = [file.path for file in list_files(Source("zh", f"zip://{pattern}::{archive}"))]
        assert found == [f"zip://{name}::{archive}" for name in names]
    with pytest.raises(FileNotFoundError, match=r"path='zip://nothing::.*x.zip'` matches no file"):
        list_files(Source("zh", f"zip://nothing::{archive}"))


def test_conversations_and_saved_datasets(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"instruction": ["问"], "output": ["答"]})
    rows.save_to_disk(tmp_path / "ds")
    datasets.disable_progress_bars()
    datasets.load_from_disk(tmp_path / "ds").map(lambda row: {"length": 1})
    corpus = read_corpus(ConversationSource("zh", str(pack(tmp_path / "ds", tmp_path / "x.zip"))))
    assert texts_of(corpus) == ['[["user", "问"], ["assistant", "答"]]']


def test_a_changed_archive_is_read_again(tmp_path: Path) -> None:
    for text in ("one", "other"):
        with zipfile.ZipFile(tmp_path / "x.zip", "w") as packed:
            packed.writestr("a.jsonl", f'{{"text": "{text}"}}')
        assert texts_of(read_corpus(Source("zh", f"{tmp_path}/x.zip"))) == [text]


def flag(data: bytes, offset_local: int, offset_central: int, value: int) -> bytes:
    """Set a byte of the only member's headers."""
    changed = bytearray(data)
    changed[data.index(b"PK\3\4") + offset_local] = value
    changed[data.index(b"PK\1\2") + offset_central] = value
    return bytes(changed)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("a.jsonl", lambda data: flag(data, 6, 8, 1), r"`a.jsonl` in `.*x.zip` is encrypted. Unpack the archive"),
        ("a.jsonl", lambda data: flag(data, 8, 10, 9), r"`a.jsonl` in `.*x.zip` is compressed by method 9. Unpack"),
        ("b.zip", lambda data: data, r"`b.zip` in `.*x.zip` is an archive in an archive. Unpack the outer one"),
        ("a::b.jsonl", lambda data: data, r"`a::b.jsonl` in `.*x.zip` has `::` in its name. Unpack"),
        (
            "a.jsonl",
            lambda data: data[:-9],
            r"x.zip` is not a readable zip archive: .*. Get it again, or give a glob that leaves it out",
        ),
        ("a.md", lambda data: data, r"x.zip'` matches no file to be read, 1 left out: 1 with another suffix"),
    ],
    ids=["encrypted", "method", "nested", "name", "cut", "nothing"],
)
def test_archives_that_are_refused(name: str, change: Callable[[bytes], bytes], message: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as packed:
        packed.writestr(name, '{"text": "a"}')
    (tmp_path / "x.zip").write_bytes(change((tmp_path / "x.zip").read_bytes()))
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        read_corpus(Source("zh", f"{tmp_path}/x.zip"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.arrow"])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_damaged_member(name: str, method: int, tmp_path: Path) -> None:
    texts = [f"{random.Random(number).getrandbits(999):x}" for number in range(4000)]
    if name == "a.jsonl":
        (tmp_path / name).write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))
    elif name == "a.parquet":
        parquet.write_table(pyarrow.table({"text": texts}), tmp_path / name)
    else:
        feather.write_feather(pyarrow.table({"text": texts}), str(tmp_path / name))
    with zipfile.ZipFile(tmp_path / "x.zip", "w", method) as packed:
        packed.write(tmp_path / name, name)
        packed.writestr("b.jsonl", '{"text": "whole"}')
    data = bytearray((tmp_path / "x.zip").read_bytes())
    data[len(data) // 2 : len(data) // 2 + 99] = bytes(99)
    (tmp_path / "x.zip").write_bytes(data)
    source = Source("zh", f"{tmp_path}/x.zip")
    with pytest.raises(ValueError, match=rf"`zip://{name}::.*x.zip`"):
        read_corpus(source)
    corpus = read_corpus(source, on_bad_record="skip")
    assert corpus.bad_records
    assert corpus.text(len(corpus) - 1) == "whole"


@pytest.mark.parametrize("inside", ["", "x/", "other/"])
@pytest.mark.parametrize("form", ["folder", "list", "url"])
def test_an_archive_beside_its_own_files(
    form: str, inside: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A member that is beside the archive, or in a folder of the archive's name, is read once."""
    (tmp_path / "data/deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "deep/b.jsonl", "deep/c.jsonl"):
        (tmp_path / "data" / name).write_text(f'{{"text": "{name}"}}\n')
    pack(tmp_path / "data", tmp_path / "x.zip")
    for name in ("a.jsonl", "deep"):
        target = tmp_path / "data" / inside / name
        target.parent.mkdir(exist_ok=True)
        (tmp_path / "data" / name).rename(target)
    # Another text of this name is another document.
    (tmp_path / "data" / inside / "deep/c.jsonl").write_text('{"text": "longer than before"}\n')
    (tmp_path / "x.zip").rename(tmp_path / "data/x.zip")
    paths: dict[str, str | list[str]]
    paths = {"folder": "data", "list": ["data/x.zip", "data/**/*.jsonl"], "url": f"file://{tmp_path}/data"}
    left_out = LeftOut()
    files = list_files(Source("zh", paths[form]), "sources[0]", left_out)
    assert len(files) == (6 if inside == "other/" else 4)
    assert len(left_out) == 6 - len(files)
    assert len(files) == 6 or "2 in an archive and beside it" in str(left_out)
    assert len(list_files(Source("zh", "data/x.zip"))) == 3


def test_members_that_are_not_chosen_stop_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as packed:
        packed.writestr("picture.png", b"png")
        packed.writestr("a::b.png", b"png")
    whole = (tmp_path / "x.zip").read_bytes()
    for change in (flag(whole, 6, 8, 1), flag(whole, 8, 10, 9)):
        (tmp_path / "x.zip").write_bytes(change)
        left_out = LeftOut()
        assert len(list_files(Source("zh", str(tmp_path)), "sources[0]", left_out)) == 1
        assert "2 with another suffix" in str(left_out)


def test_a_damaged_archive_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "x.zip").write_bytes(b"no archive")
    message = r"`.*x.zip` is not a readable zip archive: .*. Get it again, or give a glob that leaves it out, e.g. .*\*"
    with pytest.raises(ValueError, match=message):
        read_corpus(Source("zh", str(tmp_path)), on_bad_record="skip")


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_members_of_one_name(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as packed:
        for text in ("one", "two"):
            packed.writestr("a.jsonl", f'{{"text": "{text}"}}')
            packed.writestr("a.md", text)
        packed.writestr("b.jsonl", '{"text": "b"}')
    with pytest.raises(ValueError, match=r"`a.jsonl` in `.*x.zip` is there twice. Unpack the archive"):
        read_corpus(Source("zh", f"{tmp_path}/x.zip"))
    assert texts_of(read_corpus(Source("zh", f"zip://b*::{tmp_path}/x.zip"))) == ["b"]
