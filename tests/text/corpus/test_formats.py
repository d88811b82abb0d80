import bz2
import gzip
import json
import lzma
import random
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
import zstandard
from pyarrow import feather, parquet

from lightning_mixcn.text.corpus import formats
from lightning_mixcn.text.corpus.formats import iterate_documents
from lightning_mixcn.text.corpus.sources import DocumentUnit, SourceFile, TextFormat
from lightning_mixcn.text.corpus.store import RecordTally

TEXTS = ["first", "zweitens: ünïcode 中文 😀", "", "line\nbreak\r\n\u2028 and \x00 NUL"]
# Without text there is nothing to learn from: such a record is counted, and left out.
KEPT = [(number, text) for number, text in enumerate(TEXTS, start=1) if text]
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}


def read(
    path: Path, format_: TextFormat = "jsonl", text_key: str = "text", unit: DocumentUnit = "file"
) -> list[tuple[int, str]]:
    documents = iterate_documents(SourceFile(path, format_, text_key, unit))
    return [(record, encoded.decode()) for record, encoded in documents]


def lines_of(texts: list[str]) -> bytes:
    return "".join(json.dumps({"id": 1, "text": text}, ensure_ascii=False) + "\n" for text in texts).encode()


@pytest.mark.parametrize("suffix", COMPRESS)
def test_json_lines(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"x.jsonl{suffix}"
    file.write_bytes(COMPRESS[suffix](lines_of(TEXTS)))
    assert read(file) == KEPT


def test_concatenated_frames(tmp_path: Path) -> None:
    for suffix in (".gz", ".zst"):
        file = tmp_path / f"x.jsonl{suffix}"
        file.write_bytes(b"".join(COMPRESS[suffix](lines_of([text])) for text in TEXTS))
        assert read(file) == KEPT


def test_long_lines_over_many_chunks(tmp_path: Path) -> None:
    texts = ["长" * 900_000, "short", "x" * 3_000_000]
    (tmp_path / "x.jsonl").write_bytes(lines_of(texts))
    assert [text for _, text in read(tmp_path / "x.jsonl")] == texts


def test_blank_lines_are_no_records(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'\n{"text": "a"}\r\n  \n{"text": "b"}')
    assert read(tmp_path / "x.jsonl") == [(2, "a"), (4, "b")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', r"x.jsonl` line 3 is not JSON: .*Mend the line"),
        (b'["a"]', r"line 3: expected a JSON object such as {\"text\": \"…\"}, got a list"),
        (b'{"body": "a", "id": 1}', r"line 3 has no key 'text'. .*`text_key` to one of its keys: 'body', 'id'"),
        (b"{}", r"line 3 has no key 'text'. .* its keys: none"),
        (b'{"text": null}', r"line 3: expected a string under `text_key` 'text', got NoneType"),
        (b'{"text": "\xff"}', r"line 3 is not UTF-8: byte 0xff at 10. Convert"),
        (b'{"text": "\\ud83d"}', r"line 3: the text is not valid Unicode: surrogates not allowed"),
        (b"[" * 100_000, r"line 3 is not JSON"),
    ],
    ids=["cut", "list", "key", "empty", "null", "utf8", "surrogate", "deep"],
)
def test_bad_line(line: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(lines_of(["a", "b"]) + line + b"\n" + lines_of(["c"]))
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "x.jsonl")


def test_other_key(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"zh": "一", "text": "x"}')
    assert read(tmp_path / "x.jsonl", text_key="zh") == [(1, "一")]


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "other"])
def test_damaged_archive(suffix: str, damage: str, tmp_path: Path) -> None:
    data = bytearray(COMPRESS[suffix](lines_of([f"{number} {number**7}" for number in range(2000)])))
    if damage == "cut":
        data = data[: len(data) // 2]
    elif damage == "flipped":
        data[len(data) // 2 : len(data) // 2 + 9] = bytes(9)
    else:
        data = bytearray(lines_of(TEXTS))
    file = tmp_path / f"x.jsonl{suffix}"
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"x.jsonl.*(is|damaged|cut off).*(Get it again|Mend|Convert)"):
        read(file)


def test_text_file_is_one_document(tmp_path: Path) -> None:
    text = "a\r\n\r\nb\n 中\n"
    (tmp_path / "x.txt").write_bytes(text.encode())
    assert read(tmp_path / "x.txt", "text") == [(1, text)]


def test_text_lines(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(" a\u2028a \r\n\n \nb\n中".encode())
    assert read(tmp_path / "x.txt", "text", unit="line") == [(1, " a\u2028a "), (4, "b"), (5, "中")]


def test_text_blocks(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes("\n\na\nb\r\n \n\n  中\n".encode())
    assert read(tmp_path / "x.txt", "text", unit="blank-line") == [(3, "a\nb"), (7, "  中")]


@pytest.mark.parametrize("unit", ["file", "line", "blank-line"])
def test_text_not_utf8(unit: DocumentUnit, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"a\n" + "中文".encode("gbk"))
    with pytest.raises(ValueError, match=r"x.txt` line 2 is not UTF-8: byte 0xd6"):
        read(tmp_path / "x.txt", "text", unit=unit)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "x.jsonl")


def skipped(
    path: Path, format_: TextFormat = "jsonl", unit: DocumentUnit = "file"
) -> tuple[list[str], list[ValueError]]:
    flaws = list[ValueError]()
    documents = iterate_documents(SourceFile(path, format_, "text", unit), flaws.append)
    return [encoded.decode() for _, encoded in documents], flaws


def test_bad_lines_are_left_out(tmp_path: Path) -> None:
    bad = [b'{"text": "cut', b"[]", b"{}", b'{"text": 1}', b'{"text": "\xff"}', b'{"text": "\\ud83d"}']
    bad += [b'{"text": "\\u0000\\u0000"}', b"\0" * 99, b"[" * 100_000]
    lines = [line + b"\n" + lines_of([str(number)]) for number, line in enumerate(bad)]
    (tmp_path / "x.jsonl").write_bytes(b"".join(lines))
    texts, flaws = skipped(tmp_path / "x.jsonl")
    assert texts == [str(number) for number in range(len(bad))]
    assert [f"line {2 * number + 1}" in str(flaw) for number, flaw in enumerate(flaws)] == [True] * len(bad)


@pytest.mark.parametrize(("unit", "kept"), [("line", ["a", "b", "e"]), ("blank-line", ["a", "e"]), ("file", [])])
def test_bad_text_is_left_out(unit: DocumentUnit, kept: list[str], tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"a\n\nb\n\xff\n\n\0\0\n\ne\n")
    texts, flaws = skipped(tmp_path / "x.txt", "text", unit)
    assert (texts, len(flaws)) == (kept, 1 if unit == "file" else 2)


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_what_comes_before_damage_is_kept(suffix: str, tmp_path: Path) -> None:
    rng = random.Random(0)
    texts = [f"{number} {rng.getrandbits(4000):x}" for number in range(2500)]
    data = COMPRESS[suffix](lines_of(texts))
    (tmp_path / f"x.jsonl{suffix}").write_bytes(data[: len(data) * 3 // 4])
    kept, flaws = skipped(tmp_path / f"x.jsonl{suffix}")
    assert 0 < len(kept) < len(texts)
    assert kept == texts[: len(kept)]
    assert len(flaws) == 1
    assert re.search("damaged|cut off", str(flaws[0]))


def test_progress_is_that_of_the_file(tmp_path: Path) -> None:
    texts = [f"{number} {number**7}" for number in range(10_000)]
    feather.write_feather(pyarrow.table({"text": texts}), str(tmp_path / "x.arrow"), chunksize=1000)
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "x.parquet")
    for suffix, compress in COMPRESS.items():
        (tmp_path / f"x.jsonl{suffix}").write_bytes(compress(lines_of(texts)))
    formats: dict[str, TextFormat] = {".arrow": "arrow", ".parquet": "parquet"}
    for path in tmp_path.iterdir():
        format_ = formats.get(path.suffix, "jsonl")
        seen = list[int]()
        for _ in iterate_documents(SourceFile(path, format_, "text", "file"), on_read=seen.append):
            pass
        assert min(seen) >= 0
        assert path.stat().st_size * 0.98 <= sum(seen) <= path.stat().st_size


@pytest.mark.slow
def test_a_record_of_100_megabytes(tmp_path: Path) -> None:
    text = "长 x" * 20_000_000
    (tmp_path / "x.jsonl").write_bytes(lines_of(["a", text, "b"]))
    documents = iterate_documents(SourceFile(tmp_path / "x.jsonl", "jsonl", "text", "file", max_document_bytes=1 << 28))
    assert [(record, encoded.decode()) for record, encoded in documents] == [(1, "a"), (2, text), (3, "b")]


def bounded(file: Path, format_: TextFormat, unit: DocumentUnit, limit: int) -> tuple[list[str], list[str]]:
    """Read a file with a bound, and list texts and errors."""
    errors = list[ValueError]()
    source = SourceFile(file, format_, "text", unit, max_document_bytes=limit)
    texts = [encoded.decode() for _, encoded in iterate_documents(source, errors.append)]
    return texts, [str(error) for error in errors]


@pytest.mark.parametrize(
    ("format_", "unit", "content", "texts", "where"),
    [
        ("jsonl", "file", lines_of(["a", "b" * 99, "c"]), ["a", "c"], " line 2"),
        ("json", "file", b'["a",\n"' + b"b" * 99 + b'",\n"c"]', ["a", "c"], " line 2"),
        ("text", "line", b"a\n" + b"b" * 99 + b"\nc\n", ["a", "c"], " line 2"),
        ("text", "blank-line", b"a\n\nb\n" + b"b\n" * 50 + b"\nc\n", ["a", "c"], " line 3"),
        ("text", "blank-line", b"a\n\nb\n" + b"b" * 99 + b"\nb\n\nc\n", ["a", "c"], " line 4"),
        ("text", "file", b"b" * 99, [], ""),
    ],
)
def test_a_document_that_is_too_large(
    format_: TextFormat, unit: DocumentUnit, content: bytes, texts: list[str], where: str, tmp_path: Path
) -> None:
    (tmp_path / "x").write_bytes(content)
    got, errors = bounded(tmp_path / "x", format_, unit, 40)
    assert got == texts
    (error,) = errors
    assert error.startswith(f"`{tmp_path}/x`{where} is larger than `max_document_bytes=40`")
    assert "aise" in error, "it says what to do"
    assert bounded(tmp_path / "x", format_, unit, 200)[1] == []


@pytest.mark.parametrize("rows", [["a", "b" * 99, "c"]])
def test_a_row_that_is_too_large(rows: list[str], tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"text": rows}), tmp_path / "x.parquet")
    texts, (error,) = bounded(tmp_path / "x.parquet", "parquet", "file", 40)
    assert texts == ["a", "c"]
    assert error.startswith(f"`{tmp_path}/x.parquet` row 1 is larger than")


@pytest.mark.parametrize(("name", "unit"), [("x.jsonl.zst", "file"), ("x.txt.zst", "file"), ("x.json.zst", "file")])
def test_a_bomb_is_not_held_in_memory(name: str, unit: DocumentUnit, tmp_path: Path) -> None:
    compressor = zstandard.ZstdCompressor()
    with (tmp_path / name).open("wb") as file, compressor.stream_writer(file) as stream:
        for _ in range(200):
            stream.write(bytes(1 << 20))
    tracemalloc.start()
    format_: TextFormat = {"jsonl": "jsonl", "txt": "text", "json": "json"}[name.split(".")[1]]  # type: ignore[assignment]  # of literals
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "_ARRAY_BYTES", 1 << 20)
        texts, errors = bounded(tmp_path / name, format_, unit, 1 << 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert texts == []
    assert len(errors) == 1
    assert peak < 128 << 20


def test_lines_of_an_old_mac(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes("一\r二\r\r三\r".encode())
    assert read(tmp_path / "x.txt", "text", unit="line") == [(1, "一"), (2, "二"), (4, "三")]
    assert read(tmp_path / "x.txt", "text", unit="blank-line") == [(1, "一\n二"), (4, "三")]
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "a"}\r{"text": "b"}\r')
    assert read(tmp_path / "x.jsonl") == [(1, "a"), (2, "b")]


MARK = b"\xef\xbb\xbf"
MARKED = "一\ufeff二 \ufeff"


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize(
    ("format_", "unit", "content", "expected"),
    [
        ("jsonl", "file", lines_of([MARKED, "b"]), [MARKED, "b"]),
        ("json", "file", json.dumps([MARKED, {"text": "b"}]).encode(), [MARKED, "b"]),
        ("text", "file", f"{MARKED}\nb\n".encode(), [f"{MARKED}\nb\n"]),
        ("text", "line", f"{MARKED}\nb\n".encode(), [MARKED, "b"]),
        ("text", "blank-line", f"{MARKED}\n\nb\n".encode(), [MARKED, "b"]),
        ("text", "file", b"a", ["a"]),
        ("text", "file", b"", []),
        ("jsonl", "file", b"", []),
    ],
)
def test_a_byte_order_mark_is_no_text(
    format_: TextFormat, unit: DocumentUnit, content: bytes, expected: list[str], suffix: str, tmp_path: Path
) -> None:
    file = tmp_path / f"x{suffix}"
    for data in (content, MARK + content):
        file.write_bytes(COMPRESS[suffix](data))
        assert [text for _, text in read(file, format_, unit=unit)] == expected


@pytest.mark.parametrize(
    ("unit", "expected"),
    [("line", ["one", "two", "three"]), ("blank-line", ["one", "two\nthree"]), ("file", ["one\n\n\ufefftwo\nthree\n"])],
)
def test_marks_of_joined_text_files(unit: DocumentUnit, expected: list[str], tmp_path: Path) -> None:
    """At its beginning a mark is no text of a document; inside of one it is left as it is."""
    (tmp_path / "x.txt").write_bytes(MARK + MARK + b"one\n\n" + MARK + b"two\nthree\n")
    assert [text for _, text in read(tmp_path / "x.txt", "text", unit=unit)] == expected


def test_marks_of_joined_json_lines(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes((MARK + lines_of(["\ufeffone", "two"])) * 2 + MARK + b"\n")
    assert read(tmp_path / "x.jsonl") == [(1, "one"), (2, "two"), (3, "one"), (4, "two")]


@pytest.mark.parametrize("unit", ["file", "line", "blank-line"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf16_without_a_mark_is_refused(encoding: str, unit: DocumentUnit, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes("hello\nworld\n".encode(encoding))
    with pytest.raises(ValueError, match=r"x.txt`( line 1)? has NUL bytes: UTF-16 without a mark\? Convert the file"):
        read(tmp_path / "x.txt", "text", unit=unit)
    texts, flaws = skipped(tmp_path / "x.txt", "text", unit)
    assert not texts
    assert flaws
    (tmp_path / "x.jsonl").write_bytes('{"text": "hello"}\n'.encode(encoding))
    with pytest.raises(ValueError, match=r"x.jsonl` line 1 has NUL bytes: UTF-16 without a mark\? Convert"):
        read(tmp_path / "x.jsonl")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("format_", ["jsonl", "json", "text"])
def test_other_encodings_are_refused(format_: TextFormat, encoding: str, tmp_path: Path) -> None:
    mark = "\ufeff" if encoding.endswith("be") else ""
    for suffix in ("", ".gz"):
        file = tmp_path / f"x.{format_}{suffix}"
        file.write_bytes(COMPRESS[suffix](f'{mark}["中文"]\n'.encode(encoding)))
        name = encoding[:6].upper()
        with pytest.raises(ValueError, match=rf"x.{format_}.*` is {name}, as its byte order mark says. Convert"):
            read(file, format_)
        texts, flaws = skipped(file, format_)
        assert (texts, len(flaws)) == ([], 1)


BLANK = ["", " ", "\n", "\t\r\n", "\u3000", "\u00a0\u2003\n", "\u2028", "\x1c"]
BLANK += ["\u200b", "\ufeff", "\u200c \u200d", "\n\u2060", "\ufeff\ufeff\n"]
# No text begins or ends with less for being white space there.
NOT_BLANK = [" a", "\u3000　中", "\u200b中\u200b", "می\u200cخواهم", ".", "\n\n1", "\n\ufeffa"]


@pytest.mark.parametrize("format_", ["jsonl", "json", "parquet", "arrow", "text"])
def test_white_space_alone_is_counted_and_left_out(format_: TextFormat, tmp_path: Path) -> None:
    texts = [text for pair in zip(BLANK, NOT_BLANK * 2, strict=False) for text in pair]
    tally = RecordTally()
    files = [tmp_path / f"{number}.txt" for number in range(len(texts))] if format_ == "text" else [tmp_path / "x"]
    if format_ == "text":
        for file, text in zip(files, texts, strict=True):
            file.write_bytes(text.encode())
    elif format_ == "jsonl":
        files[0].write_bytes(lines_of(texts))
    elif format_ == "json":
        files[0].write_text(json.dumps(texts))
    elif format_ == "parquet":
        parquet.write_table(pyarrow.table({"text": texts}), files[0])
    else:
        feather.write_feather(pyarrow.table({"text": texts}), str(files[0]))
    kept = [
        encoded.decode()
        for file in files
        for _, encoded in iterate_documents(SourceFile(file, format_, "text", "file"), tally=tally)
    ]
    assert kept == [text for text in texts if text in NOT_BLANK]
    assert tally.empty_records == len(texts) - len(kept)


def test_a_json_array_of_records_and_texts(tmp_path: Path) -> None:
    text = '\n[ {"text": "a", "id": 1},\n\n "b\\n😀", {"text": "c"}\n]\n'
    (tmp_path / "x.json").write_text(text)
    assert read(tmp_path / "x.json", "json") == [(2, "a"), (4, "b\n😀"), (4, "c")]
    (tmp_path / "x.json").write_text(json.dumps([{"body": text} for text in TEXTS], indent=1))
    assert [text for _, text in read(tmp_path / "x.json", "json", text_key="body")] == [text for _, text in KEPT]


@pytest.mark.parametrize(
    ("element", "message"),
    [
        ("3", r"x.json` line 2: expected a JSON object such as .*, got a int"),
        (
            '{"body": "x"}',
            r"line 2 has no key 'text'. Set the source's `columns.text` or `text_key` to one of .*: 'body'",
        ),
        ('{"text": null}', r"line 2: expected a string under `text_key` 'text', got NoneType"),
        (r'"\ud83d"', r"line 2: the text is not valid Unicode: surrogates not allowed"),
        ('{"text"}', r"x.json` is not JSON: Expecting ':' delimiter.*. Mend the file"),
    ],
)
def test_bad_elements_of_a_json_array(element: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(f'["a",\n{element},\n"b"]')
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "x.json", "json")
    texts, flaws = skipped(tmp_path / "x.json", "json")
    assert (texts, len(flaws)) == (["a"] if element == '{"text"}' else ["a", "b"], 1)


def test_json_lines_named_json_are_told(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(lines_of(["a", "b"]))
    with pytest.raises(ValueError, match=r"x.json` is a JSON object: expected an array of records. Set the source's "):
        read(tmp_path / "x.json", "json")
