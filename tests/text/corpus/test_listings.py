"""Which files a source has, compared with glob.glob and with what `datasets` itself loads."""

import glob
import json
import logging
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import datasets
import fsspec
import pytest

from lightning_mixcn.errors import UserError
from lightning_mixcn.text import (
    ConversationSource,
    Corpus,
    Source,
    read_corpus,
)
from lightning_mixcn.text.corpus.listings import LeftOut, list_files, match_glob


def line(text: str) -> str:
    return json.dumps({"text": text}) + "\n"


def texts_of(corpus: Corpus) -> list[str]:
    return [corpus.text(index) for index in range(len(corpus))]


def listed(path: Path | str | list[str], left_out: LeftOut | None = None) -> list[str]:
    patterns = path if isinstance(path, list) else str(path)
    return [str(file.path) for file in list_files(Source("zh", patterns), "sources[0]", left_out)]


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """Make a folder with a linked sub-folder, a linked file, and a file of another disk."""
    for name in ("data/real/a.jsonl", "disk2/deep/b.jsonl", "disk3/c.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(line(name))
    (tmp_path / "data/linked").symlink_to(tmp_path / "disk2")
    (tmp_path / "data/c.jsonl").symlink_to("../disk3/c.jsonl")
    return tmp_path / "data"


def test_a_folder_has_what_its_glob_has(linked: Path) -> None:
    expected = sorted(glob.glob(f"{linked}/**/*.jsonl", recursive=True))
    assert len(expected) == 3
    assert listed(linked) == listed(f"{linked}/**/*.jsonl") == expected
    assert listed(f"file://{linked}") == [f"file://{path}" for path in expected]


@pytest.mark.parametrize("target", [".", "..", "../data", "real"])
def test_circles_of_links_end(target: str, linked: Path) -> None:
    for name in ("one", "two", "real/three"):
        (linked / name).symlink_to(linked / target)
    for path in (str(linked), f"{linked}/**/*.jsonl", f"file://{linked}"):
        files = listed(path)
        assert len({os.path.realpath(file.removeprefix("file://")) for file in files}) == len(files)
        assert set(files) >= {f"{path.split('/**')[0]}/{name}" for name in ("c.jsonl", "real/a.jsonl")}


def test_a_real_file_is_read_once(linked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (linked / "again").symlink_to(linked / "real")
    (linked / "0.jsonl").symlink_to(linked / "real/a.jsonl")
    os.link(linked / "real/a.jsonl", linked / "hard.jsonl")
    monkeypatch.chdir(linked)
    left_out = LeftOut()
    # The path that is no link is kept, wherever it comes in the order.
    names = ["c.jsonl", "hard.jsonl", "linked/deep/b.jsonl"]
    assert listed(linked, left_out) == [str(linked / name) for name in names]
    assert len(left_out) == 3
    assert "3 already listed by another path or pattern" in str(left_out)
    patterns = ["real/a.jsonl", "./real/../real/*.jsonl", f"file://{linked}/hard.jsonl", "again", "real/a.jsonl"]
    left_out = LeftOut()
    assert listed(patterns, left_out) == ["real/a.jsonl"]
    assert len(left_out) == 4
    assert len(read_corpus(Source("zh", patterns))) == 1


def test_files_alike_are_two(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(line("the same"))
    assert len(read_corpus(Source("zh", str(tmp_path)))) == 2


PATTERNS = [
    "**",
    "**/*.jsonl",
    "*/**/*.txt",
    "**/a/**/*",
    "a/**",
    "**/.h/*",
    "**/*/a.jsonl",
    "*/*",
    "**/[ab].*",
    "?/**",
]


@pytest.mark.parametrize("seed", range(6))
def test_globs_are_those_of_python(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    names = ["a", "b", ".h", "a.jsonl", "b.txt", ".c.jsonl"]
    for _ in range(40):
        folder = tmp_path.joinpath(*rng.choices(names[:3], k=rng.randrange(4)))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / rng.choice(names[3:])).touch()
    (tmp_path / "link").symlink_to(tmp_path / rng.choice(["a", "b"]))
    monkeypatch.chdir(tmp_path)
    for pattern in PATTERNS:
        for whole in (pattern, f"{tmp_path}/{pattern}"):
            expected = sorted(Path(match) for match in glob.glob(whole, recursive=True) if os.path.isfile(match))
            # Of `a/**/b` glob.glob lists some paths several times.
            assert match_glob(whole, LeftOut()) == sorted(set(expected)), whole


def test_one_line_says_what_is_left_out(
    linked: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (linked / "readme.md").touch()
    (linked / ".hidden.jsonl").touch()
    (linked / ".git").mkdir()
    (linked / "gone.jsonl").symlink_to("nowhere")
    (linked / "loop").symlink_to(".")
    Path(os.fsdecode(os.fsencode(linked) + b"/\xd6\xd0.jsonl")).touch()
    with caplog.at_level(logging.INFO):
        read_corpus(Source("zh", str(linked)))
    (message,) = caplog.messages
    assert message.startswith("Source 'zh': 3 files read, 6 left out: ")
    assert message.endswith("; 3 documents")
    for part in (
        "2 hidden (`", "1 linked folder that holds itself",
        "1 with a name that is not UTF-8", r"\udcd6\udcd0.jsonl`", "1 with another suffix", "1 that links to nothing",
    ):  # fmt: skip
        assert part in message
    assert caplog.records[0].levelno == logging.WARNING
    caplog.clear()
    with caplog.at_level(logging.INFO):
        read_corpus(Source("zh", f"{linked}/real"))
    assert caplog.messages == ["Source 'zh': 1 files read, 0 left out; 1 documents"]
    monkeypatch.setenv("RANK", "1")
    read_corpus(Source("zh", str(linked)))
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("pattern", ["", "/**/*.jsonl", "/*/*.jsonl", "/lost/*.jsonl"])
def test_a_folder_that_cannot_be_opened_is_an_error(
    pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lost").mkdir()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.jsonl").write_text(line("a"))
    list_folder = os.listdir

    def listdir(path: Path) -> list[str]:
        if Path(path).name == "lost":
            raise PermissionError(13, "Permission denied")
        return list_folder(path)

    monkeypatch.setattr(os, "listdir", listdir)
    message = rf"^The folder `{tmp_path}/lost` cannot be opened: Permission denied\. Make it readable, or give a glob"
    with pytest.raises(UserError, match=message):
        listed(f"{tmp_path}{pattern}")
    assert listed(f"{tmp_path}/a/*.jsonl") == [f"{tmp_path}/a/x.jsonl"]


@pytest.mark.parametrize("pattern", ["", "/**/*.jsonl", "/*/*.jsonl"])
def test_the_top_of_a_disk_is_a_folder_like_others(
    pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lost+found").mkdir()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.jsonl").write_text(line("a"))
    list_folder = os.listdir

    def listdir(path: Path) -> list[str]:
        if Path(path).name == "lost+found":
            raise PermissionError(13, "Permission denied")
        return list_folder(path)

    monkeypatch.setattr(os, "listdir", listdir)
    assert listed(f"{tmp_path}{pattern}") == [f"{tmp_path}/a/x.jsonl"]


def test_a_path_without_files_says_what_was_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.md").touch()
    (tmp_path / ".b.jsonl").touch()
    with pytest.raises(FileNotFoundError, match=r"2 left out: 1 hidden \(.*b.jsonl`\), 1 with another suffix \(.*a.md"):
        listed(tmp_path)


@pytest.mark.parametrize("home", ["~", "~/", "~/*.jsonl", "~/zh.jsonl"])
def test_home_is_expanded(home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "zh.jsonl").write_text(line("a"))
    assert listed(home) == [f"{tmp_path}/zh.jsonl"]


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """Save texts with `datasets`, in some shards."""
    datasets.disable_progress_bars()

    def save(name: str, texts: list[str], **options: int) -> Path:
        datasets.Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / name, **options)
        return tmp_path / name

    return save


TEXTS = [f"document {number}" for number in range(10)]


@pytest.mark.parametrize("pattern", ["{}", "{}/*.arrow", "{}/**", "file://{}"])
def test_a_saved_dataset_has_what_datasets_loads(pattern: str, saved: Callable[..., Path]) -> None:
    folder = saved("ds", TEXTS, num_shards=3)
    loaded = datasets.load_from_disk(folder)
    loaded.map(lambda row: {"length": len(row["text"])})
    loaded.filter(lambda row: row["text"] > "document 4")
    assert len(list(folder.glob("cache-*.arrow"))) >= 2
    corpus = read_corpus(Source("zh", pattern.format(folder)))
    assert texts_of(corpus) == loaded["text"][:] == TEXTS


def test_datasets_in_a_folder_of_others(saved: Callable[..., Path], tmp_path: Path) -> None:
    saved("deep/one", TEXTS[:3])
    datasets.load_from_disk(saved("deep/two", TEXTS[3:])).map(lambda row: {"length": 1})
    (tmp_path / "deep/more.jsonl").write_text(line("more"))
    assert texts_of(read_corpus(Source("zh", str(tmp_path / "deep")))) == ["more", *TEXTS]


def test_splits_of_a_dataset(saved: Callable[..., Path], tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"text": TEXTS})
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "one")
    assert texts_of(read_corpus(Source("zh", f"{tmp_path}/one"))) == TEXTS
    datasets.DatasetDict({"train": rows, "test": rows.select([3])}).save_to_disk(tmp_path / "two")
    for path in (tmp_path / "two", tmp_path):
        with pytest.raises(ValueError, match=r"two` is a DatasetDict with the splits train, test. Name .*two/train"):
            listed(path)
    assert texts_of(read_corpus(Source("zh", f"{tmp_path}/two/test"))) == [TEXTS[3]]
    both = read_corpus(Source("zh", [f"{tmp_path}/two/test", f"{tmp_path}/two/train"]))
    assert texts_of(both) == [TEXTS[3], *TEXTS]


def test_a_dataset_that_is_not_whole(saved: Callable[..., Path]) -> None:
    folder = saved("ds", TEXTS, num_shards=2)
    shard = next(folder.glob("data-00001*.arrow"))
    shard.rename(folder.parent / "away")
    with pytest.raises(
        FileNotFoundError, match=r"ds/state.json` lists `data-00001-of-00002.arrow`, which is not there"
    ):
        listed(folder)
    (folder.parent / "away").rename(shard)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"_indices_data_files": [{"filename": "indices.arrow"}]}))
    with pytest.raises(ValueError, match=r"chosen by a list of indices. Save the dataset again"):
        listed(folder)


def test_the_cache_of_datasets(tmp_path: Path) -> None:
    """A folder of the cache has no state.json."""
    (tmp_path / "raw.jsonl").write_text("".join(map(line, TEXTS)))
    loaded = datasets.load_dataset("json", data_files=f"{tmp_path}/raw.jsonl", split="train", cache_dir=tmp_path / "hf")
    loaded.map(lambda row: {"length": 1})
    assert list((tmp_path / "hf").rglob("cache-*.arrow"))
    assert texts_of(read_corpus(Source("zh", f"{tmp_path}/hf"))) == TEXTS


def test_records_named_as_metadata_are_read(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text('["Ohio", "Utah"]')
    assert texts_of(read_corpus(Source("zh", str(tmp_path)))) == ["Ohio", "Utah"]
    shutil.copy(tmp_path / "state.json", tmp_path / "dataset_info.json")
    assert len(read_corpus(Source("zh", str(tmp_path)))) == 4


def test_folders_that_a_glob_matches_are_counted(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for name in ("a.jsonl", "sub/b.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(line(name))
        memory.pipe(f"/globbed/{name}", b"")
    for root in (str(tmp_path), f"file://{tmp_path}", "memory://globbed"):
        left_out = LeftOut()
        assert listed(f"{root}/*", left_out) == [f"{root}/a.jsonl"]
        assert "1 left out: 1 matched as a folder, in which a glob does not look; write ** (`" in str(left_out)
        assert "/sub`" in str(left_out)
        left_out = LeftOut()
        assert len(listed(f"{root}/**/*.jsonl", left_out)) == 2
        assert not len(left_out)
    with pytest.raises(FileNotFoundError, match=r"matches no file to be read, 1 left out: 1 matched as a folder"):
        listed(f"{tmp_path}/su*")


OBJECTS = {"config.json": '{"a": 1}', "deep/metadata.json": '\n {\n "version": 2\n}\n'}


@pytest.mark.parametrize("others", ["a.jsonl", "a.json", "a.jsonl.gz"])
def test_json_that_is_no_array_is_left_out_of_a_folder(others: str, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "deep").mkdir(parents=True)
    for name, content in {**OBJECTS, others: "\ufeff []"}.items():
        (folder / name).write_text(content)
    shutil.make_archive(str(tmp_path / "packed"), "zip", folder)
    for kind in (Source, ConversationSource):
        for path in (str(folder), f"{tmp_path}/packed.zip", f"file://{folder}"):
            left_out = LeftOut()
            (file,) = list_files(kind("zh", path), "sources[0]", left_out)
            assert others in str(file.path)
            assert "2 left out: 2 JSON that is no array (`" in str(left_out)


def test_json_objects_that_are_all_there_is_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"a": 1}')
    for kind in (Source, ConversationSource):
        with pytest.raises(ValueError, match=r"config.json` is a JSON object: expected an array of records. Set the "):
            read_corpus(kind("zh", str(tmp_path)))
    # One record a line is data: it is not left out for its name.
    (tmp_path / "config.json").write_text('{"text": "a"}\n{"text": "b"}\n')
    (tmp_path / "a.jsonl").write_text(line("a"))
    with pytest.raises(ValueError, match=r"config.json` is a JSON object: expected an array of records. Set the "):
        read_corpus(Source("zh", str(tmp_path)))
