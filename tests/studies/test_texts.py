"""Sources of a study as its command names them."""

import json
from pathlib import Path

import pytest

from lightning_mixcn.studies.texts import named_path, read_documents


def test_documents_of_each_source(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in ("一", "二三")))
    (tmp_path / "b.txt").write_text("x\ny\n\nz\n", encoding="utf-8")
    named = [f"zh={tmp_path / 'a.jsonl'}", f"en={tmp_path / 'b.txt'}"]
    zh, en = read_documents(named, "body", "blank-line")
    assert (zh.name, [zh.text(place) for place in range(len(zh))]) == ("zh", ["一", "二三"])
    assert (en.name, len(en)) == ("en", 2)
    assert len(read_documents(named[1:], "text", "file")[0]) == 1


@pytest.mark.parametrize("entry", ["zh", "=x", "zh="])
def test_an_entry_of_another_form(entry: str) -> None:
    with pytest.raises(ValueError, match="expected name=PATH"):
        named_path(entry)


def test_what_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="`text` is empty"):
        read_documents([], "text", "file")
    with pytest.raises(ValueError, match="have no document but 1 records without text"):
        read_documents([f"zh={tmp_path / 'empty.jsonl'}"], "text", "file")
    with pytest.raises(FileNotFoundError, match=r"text\[0\]"):
        read_documents([f"zh={tmp_path / 'nowhere.jsonl'}"], "text", "file")
