"""Benchmark data on this machine in place of the hub's: datasets as the hub lays them out, or as their authors do.

The harness asks the ``datasets`` library for a hub dataset by its id. While `BenchmarkFiles.in_place_of_hub` is
entered, that id is answered from a folder, and the network is not touched.
"""

import csv
import hashlib
import io
import json
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from lightning_mixcn.errors import MissingFileError, UserError
from lightning_mixcn.files.atomic import new_folder, remove_leftovers
from lightning_mixcn.text.corpus.unpack import cache_folder

Rows = list[dict[str, Any]]
_TABLE = re.compile(r"(?:.*/)?(dev|val|test)/([^/]+?)(?:_\1)?\.csv")
# Changes when converted files would: what an older release made is not used then.
_LAYOUT = "1"


@dataclass(frozen=True)
class Release:
    """A benchmark as its authors publish it.

    Args:
        names: Archives, folders or files, the first that is there is taken.
        schema: Columns of the hub's dataset. Strings stay strings: the readers of ``datasets`` would make numbers of
            choices such as "10" and nothing of "NA".
        row: Makes a row of a record, given the subject.
        splits: The release's names of splits and the hub's.
        header: True if a CSV file begins with the names of its columns.
        configuration: The hub's name of the only configuration, where the files are JSONL.
    """

    names: tuple[str, ...]
    schema: pa.Schema
    row: Callable[[Any, str], dict[str, Any]]
    splits: dict[str, str]
    header: bool = True
    configuration: str = ""


def _columns(*names: str, **others: Any) -> pa.Schema:
    return pa.schema([(name, pa.string()) for name in names] + list(others.items()))


_CEVAL = ("id", "question", "A", "B", "C", "D", "answer", "explanation")
_CMMLU = ("Question", "A", "B", "C", "D", "Answer")
_XCOPA = ("premise", "choice1", "choice2", "question", "label", "idx", "changed")
_HELLASWAG = ("activity_label", "ctx_a", "ctx_b", "ctx", "label")

RELEASES: dict[str, Release] = {
    "ceval/ceval-exam": Release(
        ("ceval-exam.zip", "ceval.zip", "ceval-exam", "ceval"),
        _columns(*_CEVAL),
        lambda record, subject: {name: record.get(name) or "" for name in _CEVAL},
        {"dev": "dev", "val": "val", "test": "test"},
    ),
    "haonan-li/cmmlu": Release(
        ("cmmlu_v1_0_1.zip", "cmmlu.zip", "cmmlu"),
        _columns(*_CMMLU),
        lambda record, subject: {name: record.get(name) or "" for name in _CMMLU},
        {"dev": "dev", "test": "test"},
    ),
    "cais/mmlu": Release(
        ("mmlu.zip", "mmlu", "data"),
        _columns("question", "subject", choices=pa.list_(pa.string()), answer=pa.int64()),
        lambda record, subject: {
            "question": record[0], "subject": subject, "choices": record[1:5], "answer": "ABCD".index(record[5])
        },
        {"dev": "dev", "val": "validation", "test": "test"},
        header=False,
    ),
    "openai/gsm8k": Release(
        ("gsm8k_{split}.jsonl", "gsm8k/{split}.jsonl", "{split}.jsonl"),
        _columns("question", "answer"),
        lambda record, subject: {"question": record["question"], "answer": record["answer"]},
        {"train": "train", "test": "test"},
        configuration="main",
    ),
    "Rowan/hellaswag": Release(
        ("hellaswag_{split}.jsonl", "hellaswag/hellaswag_{split}.jsonl"),
        _columns(*_HELLASWAG, endings=pa.list_(pa.string())),
        lambda record, subject: {name: str(record.get(name, "")) for name in _HELLASWAG}
        | {"endings": list(map(str, record["endings"]))},
        {"train": "train", "val": "validation", "test": "test"},
        configuration="default",
    ),
    "cambridgeltl/xcopa": Release(
        ("xcopa_zh_{split}.jsonl", "{split}.zh.jsonl", "xcopa/data/zh/{split}.zh.jsonl"),
        _columns("premise", "choice1", "choice2", "question", label=pa.int32(), idx=pa.int32(), changed=pa.bool_()),
        lambda record, subject: {name: record[name] for name in _XCOPA},
        {"val": "validation", "test": "test"},
        configuration="zh",
    ),
}  # fmt: skip


class BenchmarkFiles:
    """A folder of benchmark data.

    Args:
        path: Folder with datasets of the hub as ``OWNER/NAME/`` (what ``hf download --repo-type dataset`` fetches), or
            with releases of C-Eval, CMMLU, MMLU (archives or folders of CSV files), GSM8K, HellaSwag and XCOPA's
            Chinese (JSONL), which are converted once into the cache folder.

    Raises:
        FileNotFoundError: no such folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        if not self.path.is_dir():
            raise MissingFileError(
                f"`data_dir={str(path)!r}` is not a folder. Give one with datasets as OWNER/NAME/, or leave it out to "
                "take them from the hub"
            )

    def find(self, dataset: str) -> Path:
        """Return the local folder of a dataset, converted where its authors' files are there.

        Args:
            dataset: Its id on the hub, or a folder, which is its own.

        Raises:
            FileNotFoundError: it is not in the folder.
            ValueError: a release of which no file can be read.
        """
        for folder in (self.path / dataset, Path(dataset)):
            if folder.is_dir():
                return folder.resolve()
        release = RELEASES.get(dataset)
        found = _release_files(self.path, release) if release else []
        if not release or not found:
            expected = [f"{self.path / dataset}/"] + [
                str(self.path / name) for name in (release.names if release else ())
            ]
            raise MissingFileError(
                f"`data_dir={str(self.path)!r}` has no dataset {dataset}. Expected {' or '.join(expected)}"
            )
        return _converted(dataset, release, found)

    @contextmanager
    def in_place_of_hub(self) -> Iterator[None]:
        """Have `datasets.load_dataset` read from here, with the network switched off."""
        import datasets
        from huggingface_hub import constants

        original = datasets.load_dataset

        def load_dataset(path: str, *args: Any, **kwargs: Any) -> Any:
            folder = self.find(path)
            # The library's own cache does not notice that files have changed.
            kwargs["cache_dir"] = str(_cache("arrow", [_stamp(file) for file in sorted(folder.rglob("*"))]))
            return original(str(folder), *args, **kwargs)

        switches: list[tuple[Any, str]] = [
            (constants, "HF_HUB_OFFLINE"), (datasets.config, "HF_HUB_OFFLINE"), (datasets.config, "HF_DATASETS_OFFLINE")
        ]  # fmt: skip
        before = [getattr(module, name) for module, name in switches]
        datasets.load_dataset = load_dataset
        for module, name in switches:
            setattr(module, name, True)
        with_bars = not datasets.utils.are_progress_bars_disabled()
        datasets.disable_progress_bars()  # three for each task
        try:
            yield
        finally:
            if with_bars:
                datasets.enable_progress_bars()
            datasets.load_dataset = original
            for (module, name), value in zip(switches, before, strict=True):
                setattr(module, name, value)


class _Part(NamedTuple):
    """One file of a release."""

    split: str
    subject: str
    read: Callable[[], bytes]
    stamp: tuple[str, int, int]


def _release_files(folder: Path, release: Release) -> list[_Part]:
    """Return the files of the first of a release's names that is there."""
    for name in release.names:
        if "{split}" in name:
            paths = {split: folder / name.format(split=split) for split in release.splits}
            found = [
                _Part(split, release.configuration, at.read_bytes, _stamp(at))
                for split, at in paths.items()
                if at.is_file()
            ]
        elif (path := folder / name).is_file():
            found = _tables(release, _members(path), partial(_member, path), path)
        elif path.is_dir():
            names = [str(file.relative_to(path)) for file in sorted(path.rglob("*.csv"))]
            found = _tables(release, names, partial(_file, path), path)
        else:
            continue
        if found:
            return found
    return []


def _tables(release: Release, names: Sequence[str], read: Callable[[str], bytes], place: Path) -> list[_Part]:
    parts = []
    for name in names:
        if (match := _TABLE.fullmatch(name)) and match[1] in release.splits:
            stamp = _stamp(place if place.is_file() else place / name)
            parts.append(_Part(match[1], match[2], partial(read, name), stamp))
    return parts


def _members(archive: Path) -> list[str]:
    try:
        with zipfile.ZipFile(archive) as opened:
            return opened.namelist()
    except zipfile.BadZipFile as error:
        raise UserError(f"{str(archive)!r} is not a zip archive ({error}). Download it again") from error


def _file(folder: Path, name: str) -> bytes:
    return (folder / name).read_bytes()


def _member(archive: Path, name: str) -> bytes:
    with zipfile.ZipFile(archive) as opened:
        return opened.read(name)


def _stamp(path: Path) -> tuple[str, int, int]:
    state = path.stat()
    return str(path.resolve()), state.st_size, state.st_mtime_ns


def _cache(kind: str, stamps: Sequence[tuple[str, int, int]]) -> Path:
    """Return a folder of the cache that belongs to files as they are now."""
    digest = hashlib.blake2b(json.dumps([_LAYOUT, *stamps]).encode(), digest_size=16).hexdigest()
    return cache_folder().parent / "benchmarks" / kind / digest


def _converted(dataset: str, release: Release, parts: Sequence[_Part]) -> Path:
    """Write the dataset as the hub has it, parquet and a README that names its configurations, to the cache."""
    target = _cache("hub", sorted({part.stamp for part in parts})) / dataset
    if target.is_dir():
        remove_leftovers(target.parent, re.escape(target.name))
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(target) as folder:
        configurations: dict[str, list[str]] = {}
        for part in parts:
            split = release.splits[part.split]
            rows = _rows(release, part)
            if rows:  # the datasets library cannot read a table without rows
                (folder / part.subject).mkdir(exist_ok=True)
                pq.write_table(pa.Table.from_pylist(rows, release.schema), folder / part.subject / f"{split}.parquet")
                configurations.setdefault(part.subject, []).append(split)
        (folder / "README.md").write_text(_card(configurations), encoding="utf-8")
    return target


def _rows(release: Release, part: _Part) -> Rows:
    try:
        text = part.read().decode("utf-8-sig")
        records: Any
        if release.configuration:
            records = [json.loads(line) for line in text.split("\n") if line.strip()]
        else:
            records = (csv.DictReader if release.header else csv.reader)(io.StringIO(text, newline=""))
        return [release.row(record, part.subject) for record in records]
    except (ValueError, LookupError, TypeError, csv.Error) as error:
        raise UserError(
            f"{part.stamp[0]}: the {part.split} split of {part.subject} is not as published ({error}). "
            "Download it again"
        ) from error


def _card(configurations: dict[str, list[str]]) -> str:
    lines = ["---", "configs:"]
    for subject, splits in configurations.items():
        lines += [f"- config_name: {subject}", "  data_files:"]
        for split in splits:
            lines += [f"  - split: {split}", f"    path: {subject}/{split}.parquet"]
    return "\n".join([*lines, "---", ""])
