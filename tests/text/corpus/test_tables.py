from pathlib import Path

import pyarrow
import pytest
from pyarrow import feather, parquet

from lightning_mixcn.text.corpus.formats import iterate_documents
from lightning_mixcn.text.corpus.sources import SourceFile, TextFormat

TEXTS = ["first", "zweitens: ünïcode 中文 😀", "", "line\nbreak\r\n\u2028 and \x00 NUL"]


def read(path: Path, format_: TextFormat = "parquet", text_key: str = "text") -> list[tuple[int, str]]:
    documents = iterate_documents(SourceFile(path, format_, text_key, "file"))
    return [(record, encoded.decode()) for record, encoded in documents]


def kept(texts: list[str]) -> list[tuple[int, str]]:
    """List the rows with text: others are counted, and left out."""
    return [(row, text) for row, text in enumerate(texts) if text]


def skipped(path: Path, format_: TextFormat) -> tuple[list[str], list[ValueError]]:
    flaws = list[ValueError]()
    documents = iterate_documents(SourceFile(path, format_, "text", "file"), flaws.append)
    return [encoded.decode() for _, encoded in documents], flaws


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string()])
def test_parquet(kind: pyarrow.DataType, tmp_path: Path) -> None:
    table = pyarrow.table({"id": [1, 2, 3, 4], "zh": pyarrow.array(TEXTS, type=kind)})
    parquet.write_table(table, tmp_path / "x.parquet", row_group_size=2)
    assert read(tmp_path / "x.parquet", "parquet", text_key="zh") == kept(TEXTS)


def test_parquet_errors(tmp_path: Path) -> None:
    file = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.table({"id": [1, 2], "zh": ["a", None]}), file)
    with pytest.raises(ValueError, match=r"x.parquet` has no column 'text'. .*one of its columns: 'id', 'zh'"):
        read(file, "parquet")
    with pytest.raises(ValueError, match=r"x.parquet` row 1: expected a string in column 'zh', got NoneType"):
        read(file, "parquet", text_key="zh")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"x.parquet` is not a readable parquet file"):
        read(file, "parquet", text_key="zh")


def test_parquet_with_bytes_that_are_no_text(tmp_path: Path) -> None:
    raw = pyarrow.array([b"\xff\xfe"], type=pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": raw}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"x.parquet` row 0 is not UTF-8"):
        read(tmp_path / "x.parquet", "parquet")


def test_bad_rows_are_left_out(tmp_path: Path) -> None:
    column = pyarrow.array([b"a", None, b"\xff", b"\0", b"b"], type=pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "x.parquet")
    feather.write_feather(pyarrow.table({"text": column}), str(tmp_path / "x.arrow"))
    formats: tuple[TextFormat, ...] = ("parquet", "arrow")
    for format_ in formats:
        texts, flaws = skipped(tmp_path / f"x.{format_}", format_)
        assert texts == ["a", "b"]
        assert [f"row {row}" in str(flaw) for row, flaw in enumerate(flaws, start=1)] == [True] * 3


@pytest.mark.parametrize("is_stream", [False, True], ids=["file", "stream"])
@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize(
    "kind",
    [
        pyarrow.string(),
        pyarrow.large_string(),
        pyarrow.string_view(),
        pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
    ],
    ids=str,
)
def test_arrow(is_stream: bool, compression: str | None, kind: pyarrow.DataType, tmp_path: Path) -> None:
    texts = TEXTS * 50
    table = pyarrow.table({"id": list(range(len(texts))), "zh": pyarrow.array(texts).cast(kind)})
    new = pyarrow.ipc.new_stream if is_stream else pyarrow.ipc.new_file
    options = pyarrow.ipc.IpcWriteOptions(compression=compression)
    with new(str(tmp_path / "x.arrow"), table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=130)
    assert read(tmp_path / "x.arrow", "arrow", text_key="zh") == kept(texts)
    with pytest.raises(ValueError, match=r"x.arrow` has no column 'text'. .*one of its columns: 'id', 'zh'"):
        read(tmp_path / "x.arrow", "arrow")


def test_arrow_errors(tmp_path: Path) -> None:
    file = tmp_path / "x.feather"
    feather.write_feather(pyarrow.table({"text": ["a", None], "id": [1, 2]}), str(file))
    with pytest.raises(ValueError, match=r"x.feather` row 1: expected a string in column 'text', got NoneType"):
        read(file, "arrow")
    with pytest.raises(ValueError, match=r"x.feather` row 0: expected a string in column 'id', got int"):
        read(file, "arrow", text_key="id")
    for data in (file.read_bytes()[:300], b"", b"ARROW1", b"\xff" * 99):
        file.write_bytes(data)
        with pytest.raises(ValueError, match=r"x.feather` is not a readable arrow file"):
            read(file, "arrow")
