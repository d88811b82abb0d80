import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import feather, parquet

from lightning_mixcn.text import (
    ConversationSource,
    Source,
    parse_sources,
    read_corpus,
)
from lightning_mixcn.text.corpus.listings import list_files


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("b.jsonl", "a.jsonl.gz", "deep/c.txt", "deep/d.parquet", ".hidden/e.txt", "readme.md", "f.ndjson.zst"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def names(source: Source, tree: Path) -> list[str]:
    return [str(Path(file.path).relative_to(tree)) for file in list_files(source)]


def test_dictionaries_become_sources() -> None:
    entries: list[Source | dict[str, str]] = [{"name": "zh", "path": "x"}, Source("en", ["y", "z"], weight=0.5)]
    sources = parse_sources(entries, "sources", Source)
    assert sources == (Source("zh", "x", weight=1.0), Source("en", ["y", "z"], weight=0.5))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"name": "zh"}, r"`val_sources\[0\]` has no `path`"),
        ({"path": "x"}, r"`val_sources\[0\]` has no `name`"),
        (
            {"name": "zh", "path": "x", "wieght": 1},
            r"'wieght' \(did you mean 'weight'\?\). Known keys: name, path, weight",
        ),
        ({"name": "zh", "path": "x", "weight": 0}, r"`val_sources\[0\].weight=0`: expected more than 0"),
        ({"name": "zh", "path": "x", "weight": -0.5}, r"weight=-0.5`: expected more than 0"),
        ({"name": "zh", "path": "x", "weight": float("nan")}, r"weight=nan`: expected a finite number"),
        ({"name": "zh", "path": "x", "weight": "0.5"}, r"weight='0.5'`: expected a number"),
        ({"name": "zh", "path": "x", "weight": {}}, r"weight={}`: expected fractions of the run from 0 to 1 in incr"),
        ({"name": "zh", "path": "x", "weight": {"half": 1.0}}, r"weight={'half': 1.0}`: expected fractions of the run"),
        ({"name": "zh", "path": "x", "weight": {0.0: 1.0, 1.5: 2.0}}, r"1.5: 2.0}`: expected fractions of the run fr"),
        ({"name": "zh", "path": "x", "weight": {-0.1: 1.0, 1: 2.0}}, r"-0.1: 1.0, 1: 2.0}`: expected fractions of th"),
        (
            {"name": "zh", "path": "x", "weight": {float("nan"): 1.0}},
            r"`val_sources\[0\].weight\[nan\]=nan`: expected a finite number",
        ),
        ({"name": "zh", "path": "x", "weight": {0.5: 1.0, 0.2: 2.0}}, r"0.2: 2.0}`: expected .* in increasing order"),
        ({"name": "zh", "path": "x", "weight": {0.5: 1.0, "0.5": 2.0}}, r"'0.5': 2.0}`: expected .* increasing order"),
        ({"name": "zh", "path": "x", "weight": {0.0: 0, 1.0: 0}}, r"1.0: 0}`: expected a weight of more than 0 at one"),
        ({"name": "zh", "path": "x", "weight": {0.0: 1.0, 1.0: -1}}, r"weight\[1.0\]=-1`: expected at least 0"),
        ({"name": "zh", "path": "x", "weight": {0.0: "1"}}, r"weight\[0.0\]='1'`: expected a number"),
        (
            {"name": "zh", "path": "x", "weight": {0.0: 1, 0.5: 0}},
            r"`val_sources`: at 0.5 of the run every `weight` is 0",
        ),
        ({"name": "a/b", "path": "x"}, r"name='a/b'`: expected a name without a slash"),
        ({"name": "", "path": "x"}, r"name=''`: expected a name"),
        ({"name": "zh", "path": []}, r"path=\[\]`: expected a file, a folder, a glob"),
        (
            {"name": "zh", "path": "x", "format": "csv"},
            r"format='csv'`: expected null or one of jsonl, text, parquet, arrow",
        ),
        ({"name": "zh", "path": "x", "text_key": ""}, r"text_key=''`: expected a name"),
        (
            {"name": "zh", "path": "x", "columns": {"text": ""}},
            r"columns\['text'\]=''`: expected a name",
        ),
        ({"name": "zh", "path": "x", "columns": ["text"]}, r"columns=\['text'\]`: expected null or a mapping"),
        ({"name": "zh", "path": "x", "columns": {"content": "text"}}, r"expected .* each of these keys .*: text"),
        (
            {"name": "zh", "path": "x", "columns": {"text": "body"}, "text_key": "content"},
            r"text_key='content'`: expected null, or no `columns`: both name the text",
        ),
        ({"name": "zh", "path": "x", "document_unit": "word"}, r"'word'`: expected one of file, line, blank-line"),
        ({"name": "zh", "path": "x", "max_document_bytes": 0}, r"max_document_bytes=0`: expected at least 1 byte"),
        ({"name": "zh", "path": "x", "max_epochs": 0}, r"max_epochs=0`: expected at least 1 \(null is for ever\)"),
    ],
)
def test_bad_fields(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_sources([entry], "val_sources", Source)


def test_duplicate_names() -> None:
    with pytest.raises(ValueError, match=r"`sources\[1\].name='zh'` is already the name of `sources\[0\]`"):
        parse_sources([Source("zh", "x"), Source("zh", "y")], "sources", Source)


def test_a_folder_has_its_text_files_in_order(tree: Path) -> None:
    files = list_files(Source("zh", str(tree)))
    assert [(str(Path(file.path).relative_to(tree)), file.format) for file in files] == [
        ("a.jsonl.gz", "jsonl"),
        ("b.jsonl", "jsonl"),
        ("deep/c.txt", "text"),
        ("deep/d.parquet", "parquet"),
        ("f.ndjson.zst", "jsonl"),
    ]


def test_a_format_selects_in_a_folder(tree: Path) -> None:
    assert names(Source("zh", str(tree), format="text"), tree) == ["deep/c.txt"]


def test_globs_lists_and_doubles(tree: Path) -> None:
    assert names(Source("zh", f"{tree}/*.jsonl*"), tree) == ["a.jsonl.gz", "b.jsonl"]
    assert names(Source("zh", f"{tree}/**/*.txt"), tree) == ["deep/c.txt"]
    both = [f"{tree}/deep/c.txt", f"{tree}/b.jsonl", f"{tree}/*.jsonl*"]
    assert names(Source("zh", both), tree) == ["deep/c.txt", "b.jsonl", "a.jsonl.gz"]


def test_a_stated_format_takes_any_suffix(tree: Path) -> None:
    (file,) = list_files(Source("zh", f"{tree}/readme.md", format="text", document_unit="line"))
    assert (file.format, file.document_unit) == ("text", "line")


@pytest.mark.parametrize("pattern", ["nothing/*.jsonl", "nothing.jsonl"])
def test_no_match(pattern: str, tmp_path: Path) -> None:
    message = r"`sources\[0\].path='.*nothing.*jsonl'` matches no file. Give a file, a folder or a glob, e.g. data/zh/"
    with pytest.raises(FileNotFoundError, match=message):
        list_files(Source("zh", f"{tmp_path}/{pattern}"))


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"`val_sources\[2\].path=.* is a folder without any .jsonl"):
        list_files(Source("zh", str(tmp_path)), "val_sources[2]")


def test_unknown_suffix(tree: Path) -> None:
    with pytest.raises(ValueError, match=r"readme.md` cannot be told from its suffix. Set `sources\[0\].format`"):
        list_files(Source("zh", f"{tree}/readme.md"))


def test_urls(tree: Path) -> None:
    found = [file.path for file in list_files(Source("zh", f"file://{tree}"))]
    assert found == [f"file://{file.path}" for file in list_files(Source("zh", str(tree)))]
    (file,) = list_files(Source("zh", f"file://{tree}/deep/*.txt", document_unit="line"))
    assert (file.path, file.format) == (f"file://{tree}/deep/c.txt", "text")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nothing://b/x.jsonl", r"path='nothing://b/x.jsonl'`: Protocol not known: nothing. Give a local path"),
        ("memory://nothing/*.jsonl", r"path='memory://nothing/\*.jsonl'` matches no file with a known suffix"),
        pytest.param("gdrive://x.jsonl", r"gdrive.*not installed: pip install gdrive", id="no driver"),
        ("ftp://127.0.0.1:9/x.jsonl", r"path='ftp://127.0.0.1:9/x.jsonl'` cannot be reached: .*Connection refused"),
        ("blockcache::ftp://127.0.0.1:9/x", r"path='blockcache::.*` cannot be reached: .*Connection refused"),
        ("reference://x", r"path='reference://x'` cannot be reached: TypeError: .*'fo'"),
        ("tar://x.jsonl::no.tar", r"path='tar://x.jsonl::no.tar'` cannot be reached: .*no.tar"),
        ("zip://x.jsonl::no.zip", r"`sources\[0\].path`: `no.zip` is not there. Give an archive that is"),
        ("zip://x.jsonl::/", r"`sources\[0\].path`: `/` cannot be read: .*Is a directory"),
        ("zip://x::memory://no.zip", r"`sources\[0\].path`: `memory://no.zip` is not there"),
    ],
)
def test_bad_urls(url: str, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        list_files(Source("zh", url))


def test_document_unit_without_text_file(tree: Path) -> None:
    with pytest.raises(ValueError, match=r"document_unit='line'` says what a document is in a text file"):
        list_files(Source("zh", f"{tree}/b.jsonl", document_unit="line"))


@pytest.mark.parametrize("columns", [{"prompt": "instruction"}, {"instruction": 1}, "instruction"])
def test_bad_columns_of_conversations(columns: Any) -> None:
    with pytest.raises(
        ValueError,
        match=r"`sources\[0\].columns.*=.*(input, instruction, kto_tag, label, loss, mess|expected .*(text|mapping))",
    ):
        parse_sources([{"name": "zh", "path": "x", "columns": columns}], "sources", ConversationSource)


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.parquet", "x.arrow"])
def test_a_column_of_text(name: str, tmp_path: Path) -> None:
    table, file = pyarrow.table({"text": ["no", "no"], "content": ["一", "two"]}), tmp_path / name
    if name == "x.parquet":
        parquet.write_table(table, file)
    elif name == "x.arrow":
        feather.write_feather(table, str(file))
    elif name == "x.json":
        file.write_text(json.dumps(table.to_pylist()))
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    corpus = read_corpus(Source("zh", str(file), columns={"text": "content"}))
    assert [corpus.text(index) for index in range(2)] == ["一", "two"]
    assert read_corpus(Source("zh", str(file))).text(0) == "no"  # a store of its own
    with pytest.raises(ValueError, match=r"has no (key|column) 'body'. Set .*`columns.text` .*'text', 'content'"):
        read_corpus(Source("zh", str(file), columns={"text": "body"}))
