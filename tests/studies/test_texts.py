"""Sources of a study as its command names them."""

import json
from pathlib import Path

import pytest
from transformers import MixtralConfig

from lightning_mixcn.studies.texts import StudyText, named_path, read_documents


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


@pytest.mark.parametrize(("name", "value"), [("max_tokens", 1), ("sequence_length", 1), ("micro_batch_size", 0)])
def test_numbers_that_are_too_small(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"`{name}={value}`: expected at least {value + 1}"):
        StudyText(["zh=a.txt"], **{name: value})  # type: ignore[arg-type]  # numbers alone


def test_rows_fit_the_model() -> None:
    text = StudyText(["zh=a.txt", "en=b.txt"], max_tokens=1000, sequence_length=300)
    assert (text.rows, text.paths) == (3, {"zh": "a.txt", "en": "b.txt"})
    assert text.check_context(MixtralConfig(max_position_embeddings=512)) == 512
    assert text.check_context(MixtralConfig(max_position_embeddings=512, sliding_window=300)) == 300
    with pytest.raises(ValueError, match=r"`sequence_length=300` is more than the model reads. Give at most 256"):
        text.check_context(MixtralConfig(max_position_embeddings=256))
