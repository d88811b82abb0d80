"""Files that are damaged in any way end in documents or in an error that names them."""

import bz2
import gzip
import json
import lzma
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
import zstandard
from pyarrow import feather, parquet

from lightning_mixcn.text.corpus.formats import iterate_documents, refuse
from lightning_mixcn.text.corpus.sources import DocumentUnit, SourceFile, TextFormat

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}
UNITS: tuple[DocumentUnit, ...] = ("file", "line", "blank-line")


def random_text(rng: random.Random) -> str:
    kind = rng.randrange(4)
    if kind == 0:
        return "".join(chr(rng.choice((rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)))) for _ in range(50))
    return rng.choice(("", "a", "中文 ", "\0", "\n\n", "\u3000\n", "😀")) * rng.choice((0, 1, 7, 99))


def random_json(rng: random.Random, depth: int = 0) -> object:
    kind = rng.randrange(7 if depth < 4 else 4)
    if kind < 4:
        return (random_text(rng), rng.randrange(-(10**20), 10**20), None, rng.random())[kind]
    if kind == 4:
        return [random_json(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {rng.choice(("text", "id", "文")): random_json(rng, depth + 1) for _ in range(rng.randrange(4))}


def random_lines(rng: random.Random) -> bytes:
    lines = [json.dumps(random_json(rng), ensure_ascii=rng.random() < 0.5).encode() for _ in range(rng.randrange(30))]
    lines += [json.dumps({"text": random_text(rng)}).encode() for _ in range(rng.randrange(30))]
    if rng.random() < 0.1:
        lines.append(b'{"text": "' + b"x" * rng.randrange(3_000_000) + rng.choice((b'"}', b"")))
    if rng.random() < 0.1:
        lines.append(rng.choice((b"[", b'{"text":', b"9")) * rng.randrange(100_000))
    rng.shuffle(lines)
    return rng.choice((b"\n", b"\r\n", b"\n\n")).join(lines)


def random_table(rng: random.Random, folder: Path, format_: TextFormat) -> bytes:
    texts = [random_text(rng) if rng.random() < 0.99 else None for _ in range(rng.randrange(300))]
    kind = rng.choice((pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int8(), pyarrow.string())))
    numbers = pyarrow.array(range(len(texts)))
    if len(set(texts)) > 100:
        kind = pyarrow.string()
    table = pyarrow.table({"id": numbers, "text": pyarrow.array(texts, pyarrow.string()).cast(kind)})
    path = folder / "table"
    if format_ == "parquet":
        parquet.write_table(table, path, compression=rng.choice(("snappy", "zstd", "none")), row_group_size=50)
    elif rng.random() < 0.5:
        feather.write_feather(table, str(path), compression=rng.choice(("uncompressed", "zstd", "lz4")), chunksize=50)
    else:
        with pyarrow.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=50)
    return path.read_bytes()


def damage(data: bytes, rng: random.Random) -> bytes:
    """Cut, overwrite, mix or leave as it is."""
    mutable = bytearray(data)
    for _ in range(rng.randrange(3)):
        start, length = rng.randrange(len(mutable) + 1), rng.choice((1, 4, 50))
        kind = rng.randrange(5)
        if kind == 0:
            del mutable[start:]
        elif kind == 1:
            mutable[start : start + length] = rng.randbytes(min(length, len(mutable) - start))
        elif kind == 2:
            mutable[start : start + length] = bytes(length)
        elif kind == 3:
            mutable[start:start] = "中文，编码".encode(rng.choice(("gbk", "utf-16", "gb18030", "utf-8-sig")))
        else:
            del mutable[start : start + length]
    return bytes(mutable)


def fuzzed_file(seed: int, folder: Path) -> SourceFile:
    rng = random.Random(seed)
    suffix = ""
    format_: TextFormat = rng.choice(("jsonl", "jsonl", "text", "parquet", "arrow"))
    if format_ in ("parquet", "arrow"):
        data = random_table(rng, folder, format_)
    else:
        data = damage(rng.choice((random_lines(rng), rng.randbytes(rng.randrange(3000)))), rng)
        if rng.random() < 0.6:
            suffix = rng.choice(list(COMPRESS))
            data = b"".join(COMPRESS[suffix](data) for _ in range(rng.randrange(1, 3)))
    path = folder / f"fuzzed.{format_}{suffix}"
    path.write_bytes(damage(data, rng) if rng.random() < 0.9 else rng.randbytes(rng.randrange(3000)))
    return SourceFile(path, format_, "text", rng.choice(UNITS))


def read(file: SourceFile, on_bad_record: Callable[[ValueError], None]) -> tuple[list[tuple[int, bytes]], str]:
    """Read what can be, and the message of the error at the end, if there is one."""
    found = list[tuple[int, bytes]]()
    try:
        for record, encoded in iterate_documents(file, on_bad_record):
            found.append((record, encoded))
    except ValueError as error:
        return found, str(error)
    return found, ""


def check(seed: int, folder: Path) -> None:
    file = fuzzed_file(seed, folder)
    flaws = list[ValueError]()
    strict, stopped = read(file, refuse)
    kept, setting = read(file, flaws.append)
    for message in filter(None, [stopped, setting, *map(str, flaws)]):
        assert file.path.name in message, seed  # type: ignore[union-attr]  # a local file's path
        assert "\n" not in message, seed
    for found in (strict, kept):
        assert all(encoded.decode().encode() == encoded for _, encoded in found)
        assert [record for record, _ in found] == sorted(record for record, _ in found), seed
    # Nothing but a wrong setting stops the other mode: here a column that the damage renamed.
    assert not setting or "has no column" in setting, seed
    assert kept[: len(strict)] == strict, seed
    assert bool(stopped) == bool(setting or flaws), seed


@pytest.mark.parametrize("block", range(4))
def test_fuzzed_files(block: int, tmp_path: Path) -> None:
    for seed in range(block * 25, block * 25 + 25):
        check(seed, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(1, 11))
def test_many_fuzzed_files(block: int, tmp_path: Path) -> None:
    for seed in range(block * 100, block * 100 + 100):
        check(seed, tmp_path)
