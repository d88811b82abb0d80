import json
import logging
import random
from pathlib import Path
from typing import Any

import pytest

from lightning_mixcn.text import Corpus, Source, StageDocuments, read_corpus
from lightning_mixcn.text.corpus.documents import DocumentSet, all_documents, split_by_hash
from tests.text.corpus.jsonl_files import write

TEXTS = [f"document {number} 文件" * (number % 7 + 1) for number in range(2000)]


def texts_of(documents: DocumentSet) -> list[str]:
    return [documents.text(index) for index in range(len(documents))]


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return read_corpus(write(tmp_path, TEXTS))


def test_all_documents(corpus: Corpus, tmp_path: Path) -> None:
    documents = all_documents(corpus)
    assert texts_of(documents) == TEXTS[0::3] + TEXTS[1::3] + TEXTS[2::3]
    assert documents.num_bytes == sum(len(text.encode()) for text in TEXTS)
    origin = documents.origin(len(TEXTS[0::3]) + 4)
    assert (origin.source, origin.file, origin.record) == ("zh", tmp_path / "zh1.jsonl", 5)


def test_split_is_complete_and_disjoint(corpus: Corpus) -> None:
    held_out, training = split_by_hash(corpus, [0.1, 0.05])
    indices = [index for part in held_out for index in part.indices]
    rest = [index for index in range(len(corpus)) if index in training]
    assert sorted([*indices, *rest]) == list(range(len(TEXTS)))
    assert (len(rest), len(indices)) == (len(training), len(training.held_out))
    assert [len(part) for part in held_out] == [pytest.approx(200, abs=50), pytest.approx(100, abs=40)]
    sizes = [part.num_bytes for part in held_out]
    assert sizes == [sum(len(text.encode()) for text in texts_of(part)) for part in held_out]
    assert sum(sizes) + training.num_bytes == corpus.total_bytes


def test_split_depends_on_the_texts_alone(corpus: Corpus, tmp_path: Path) -> None:
    shuffled = random.Random(0).sample(TEXTS, len(TEXTS))
    other = read_corpus(write(tmp_path, shuffled, name="other", files=1))
    ours, theirs = split_by_hash(corpus, [0.1])[0], split_by_hash(other, [0.1])[0]
    assert [texts_of(part) for part in ours] == [texts_of(part) for part in theirs]


def test_equal_texts_come_to_one_side(tmp_path: Path) -> None:
    corpus = read_corpus(write(tmp_path, TEXTS[:300] + TEXTS[:150]))
    (held_out,), training = split_by_hash(corpus, [0.3])
    rest = {corpus.text(index) for index in range(len(corpus)) if index in training}
    assert not set(texts_of(held_out)) & rest
    assert len(held_out) + len(training) == 450


def test_nothing_held_out(corpus: Corpus) -> None:
    held_out, training = split_by_hash(corpus, [])
    assert (held_out, len(training)) == ([], len(corpus))
    assert all(index in training for index in range(len(corpus)))


def test_fingerprint_sees_any_change(tmp_path: Path) -> None:
    seen = set()
    for texts in (TEXTS[:9], TEXTS[:8], TEXTS[8::-1], [*TEXTS[:8], "x"]):
        for fractions in ([], [0.1]):
            seen.add(split_by_hash(read_corpus(write(tmp_path, texts, files=1)), fractions)[1].fingerprint)
    assert len(seen) == 8


@pytest.fixture
def sources(tmp_path: Path) -> list[Source]:
    """Write 200 Chinese and 100 English documents."""
    draw, made = random.Random(0), []
    for name, alphabet, count in (("zh", "中文大小人天", 200), ("en", "abcdefg ", 100)):
        texts = ["".join(draw.choices(alphabet, k=draw.randint(0, 60))) + f"#{number}" for number in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        made.append(Source(name, str(tmp_path / f"{name}.jsonl")))
    return made


def sets(sources: list[Source], val: Any = ((), 0.1), test: Any = ((), 0.1), predict: Any = ()) -> StageDocuments:
    return StageDocuments(Source, sources, {"val": val, "test": test}, predict)


def texts(documents: StageDocuments, stage: str) -> list[set[str]]:
    return [{part.text(index) for index in range(len(part))} for part in documents.read(stage)]


def training_texts(documents: StageDocuments) -> list[set[str]]:
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
