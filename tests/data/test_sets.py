import json
import logging
from pathlib import Path
from typing import Any

import pytest

from lightning_mixcn.data.sets import DocumentSets
from lightning_mixcn.text import Source


def sets(sources: list[Source], val: Any = ((), 0.1), test: Any = ((), 0.1), predict: Any = ()) -> DocumentSets:
    return DocumentSets(Source, sources, {"val": val, "test": test}, predict)


def texts(documents: DocumentSets, stage: str) -> list[set[str]]:
    return [{part.text(index) for index in range(len(part))} for part in documents.read(stage)]


def training_texts(documents: DocumentSets) -> list[set[str]]:
    return [
        {part.corpus.text(index) for index in range(len(part.corpus)) if index in part}
        for part in documents.read_training()
    ]


def test_held_out_documents_are_nowhere_else(sources: list[Source]) -> None:
    documents = sets(sources)
    for train, val, test, count in zip(
        training_texts(documents), texts(documents, "val"), texts(documents, "test"), [200, 100], strict=True
    ):
        assert not train & val
        assert not train & test
        assert not val & test
        assert len(train | val | test) == count
        assert min(len(val), len(test)) > 3


def test_own_sources_leave_the_training_text_whole(sources: list[Source]) -> None:
    documents = sets(sources[:1], val=(sources[1:], 0.1), test=((), 0.0))
    assert [len(part) for part in documents.read_training()] == [200]
    assert [len(part) for part in documents.read("val")] == [100]
    assert documents.names("val") == ["en"]
    assert documents.names("train") == documents.names("test") == ["zh"]


def test_describe_counts_what_was_read(sources: list[Source]) -> None:
    documents = sets(sources, predict=sources[1:])
    assert documents.describe() == {}
    documents.read("predict")
    size = sum(len(json.loads(line)["text"].encode()) for line in Path(str(sources[1].path)).read_text().splitlines())
    assert documents.describe() == {"predict/en/documents": 100, "predict/en/bytes": size}


def test_no_set_that_is_not_required(sources: list[Source]) -> None:
    documents = sets(sources, val=((), 0.0))
    assert documents.read("val", required=False) == []
    with pytest.raises(ValueError, match=r"There is no val set: `val_sources` is empty and `val_fraction` is 0"):
        documents.read("val")


def test_no_sources() -> None:
    with pytest.raises(ValueError, match=r"`sources` is empty. Give at least one, e.g. {name: zh, path: data/zh}$"):
        sets([]).read_training()
    with pytest.raises(ValueError, match=r"`sources` is empty. .*, or `test_sources`"):
        sets([]).read("test")
    with pytest.raises(ValueError, match=r"`predict_sources` is empty"):
        sets([]).read("predict")


def test_empty_sides(sources: list[Source], tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("one document")
    single = [Source("novel", str(tmp_path / "x.txt"))]
    held_out = (
        r"`val_fraction=0.001` holds out no document of source 'novel' \(1 in all\). Raise it, give `val_sources`"
    )
    with pytest.raises(ValueError, match=held_out):
        sets(single, val=((), 0.001)).read("val", required=False)
    with pytest.raises(ValueError, match=r"No document of source 'novel' \(1 in all\) is left for training. Lower"):
        sets(single, val=((), 0.999), test=((), 0.0)).read_training()


@pytest.mark.parametrize(("val", "test"), [(-0.1, 0.0), (0.0, -0.1), (0.5, 0.5), (1.0, 0.0)])
def test_impossible_shares(val: float, test: float, sources: list[Source]) -> None:
    with pytest.raises(ValueError, match=r"`val_fraction=.*` and `test_fraction=.*`: expected shares of at least 0"):
        sets(sources, val=((), val), test=((), test))


def test_unknown_stage(sources: list[Source]) -> None:
    with pytest.raises(ValueError, match=r"`stage='validate'`: expected one of train, val, test, predict"):
        sets(sources).names("validate")


def test_places_name_their_argument(sources: list[Source]) -> None:
    with pytest.raises(FileNotFoundError, match=r"`predict_sources\[1\].path='no.jsonl'` matches no file"):
        sets(sources, predict=[sources[0], Source("x", "no.jsonl")]).read("predict")
    with pytest.raises(ValueError, match=r"`val_sources\[0\].weight=-1`"):
        sets(sources, val=([Source("x", "y", weight=-1)], 0.0))


def test_home_is_expanded_for_every_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "data").mkdir()
    for stage in ("train", "val", "test", "predict"):
        (tmp_path / f"data/{stage}.jsonl").write_text(json.dumps({"text": stage}) + "\n")

    def source(stage: str, pattern: str) -> list[Source]:
        return [Source("zh", pattern.format(stage))]

    for pattern in ("~/data/{}.jsonl", "~/data/{}*", "file://~/data/{}.jsonl"):
        documents = sets(
            source("train", pattern),
            val=(source("val", pattern), 0.1),
            test=(source("test", pattern), 0.1),
            predict=source("predict", pattern),
        )
        assert training_texts(documents) == [{"train"}]
        for stage in ("val", "test", "predict"):
            assert texts(documents, stage) == [{stage}]


def test_every_source_is_told_once(sources: list[Source], caplog: pytest.LogCaptureFixture) -> None:
    documents = sets(sources, predict=sources[1:])
    with caplog.at_level(logging.INFO, logger="lightning_mixcn"):
        for _ in range(2):
            documents.read_training()
            for stage in ("val", "test", "predict"):
                documents.read(stage)
    assert [message.split(";")[0] for message in caplog.messages] == [
        f"Source {name!r}: 1 files read, 0 left out" for name in ("zh", "en", "en")
    ]
