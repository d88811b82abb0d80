"""The sources' weights hold in the first rows and in every later window of them."""

import random
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_mixcn.text import (
    PACKINGS,
    PlainText,
    Row,
    Source,
    StreamPlan,
    TextTokenizer,
    TrainingDocuments,
    load_tokenizer,
    read_corpus,
    split_by_hash,
)
from lightning_mixcn.text.rows.encoders import EncodedDocument, sample_source
from lightning_mixcn.text.rows.streams import row_shares

WEIGHTS = [(0.5, 0.5), (0.55, 0.45), (0.9, 0.1), (0.7, 0.2, 0.1)]
Documents = Callable[..., TrainingDocuments]


@pytest.mark.parametrize("num_streams", [1, 2, 3, 8, 16, 64, 100, 256])
@pytest.mark.parametrize("weights", [*WEIGHTS, (0.97, 0.03), (0.4, 0.3, 0.2, 0.1), (1.0,)])
def test_rows_are_divided_by_their_number(num_streams: int, weights: tuple[float, ...]) -> None:
    shares_RN = np.asarray([row_shares(row, num_streams, weights) for row in range(4096)])
    assert shares_RN.sum(1) == pytest.approx(1)
    rounds = max(num_streams, num_streams * -(-8 // num_streams))
    for start in range(0, 4096 - rounds, rounds):  # each round is exact
        assert shares_RN[start : start + rounds].mean(0) == pytest.approx(weights)
    sums_RN = np.cumsum(np.vstack([np.zeros(len(weights)), shares_RN]), 0)
    windows_RN = (sums_RN[64:] - sums_RN[:-64]) / 64
    assert np.abs(windows_RN - weights).max() < 0.04
    if num_streams == 64:  # a window that begins anywhere lacks one row at most
        assert np.abs(windows_RN - weights).max() < 1 / 64 + 1e-9
    divided = (shares_RN.max(1) < 1 - 1e-9).mean()
    assert divided <= (len(weights) - 1) / rounds + 1e-9


def test_every_stream_comes_by_every_source() -> None:
    for stream in range(64):
        shares = [row_shares(stream + 64 * row, 64, (0.7, 0.2, 0.1)) for row in range(64)]
        assert np.mean(shares, 0) == pytest.approx((0.7, 0.2, 0.1))


def counts_of(rows: list[Row], num_sources: int, size: Callable[[Any], float]) -> Any:
    counts_RN = np.zeros((len(rows), num_sources))
    for number, row in enumerate(rows):
        for part in row:
            counts_RN[number, part.source] += size(part)
    return counts_RN


def require_mixed(counts_RN: Any, weights: tuple[float, ...], num_streams: int) -> None:
    first = counts_RN[:num_streams].sum(0)
    assert first / first.sum() == pytest.approx(weights, abs=0.05)
    sums_RN = np.cumsum(np.vstack([np.zeros(len(weights)), counts_RN]), 0)
    windows_RN = sums_RN[64:] - sums_RN[:-64]
    assert np.abs(windows_RN / windows_RN.sum(1, keepdims=True) - weights).max() <= 0.05


def rows_of(plan: StreamPlan, number: int) -> list[Row]:
    streams = plan.open(range(plan.num_streams))
    return [streams[row % plan.num_streams].next_row() for row in range(number)]


def plan_of(texts: list[list[str]], weights: tuple[float, ...], tokenizer: TextTokenizer, training: Documents,
            **settings: Any) -> StreamPlan:  # fmt: skip
    parts = [
        training(text, name=f"s{i}", weight=weight) for i, (text, weight) in enumerate(zip(texts, weights, strict=True))
    ]
    return StreamPlan(parts, PlainText(tokenizer), sequence_length=64, seed=0, **settings)


@pytest.fixture(scope="module")
def texts() -> list[list[str]]:
    """Make short paragraphs, documents of about a row, and a few that are as long as hundreds of rows."""
    draw = random.Random(0)
    words = ["the", "of", "中", "大", "that"]
    lengths = [[draw.randint(3, 20) for _ in range(900)], [3_000 + draw.randint(0, 9_000) for _ in range(5)],
               [draw.randint(30, 90) for _ in range(300)]]  # fmt: skip
    return [[" ".join(draw.choices(words, k=length)) for length in part] for part in lengths]


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (1, 1, 1)])
@pytest.mark.parametrize("num_streams", [8, 64])
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_window_holds_the_weights_in_tokens(
    weights: tuple[float, ...], packing: str, num_streams: int, order: tuple[int, ...], texts: list[list[str]],
    tokenizer: TextTokenizer, training: Documents,
) -> None:  # fmt: skip
    chosen = [texts[place] for place in order[: len(weights)]]
    plan = plan_of(chosen, weights, tokenizer, training, num_streams=num_streams, packing=packing)
    counts_RN = counts_of(rows_of(plan, 320), len(weights), lambda part: len(part.tokens))
    require_mixed(counts_RN, weights, num_streams)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.9, 0.1)])
def test_every_window_holds_the_weights_in_bytes(
    weights: tuple[float, ...], packing: str, tiny_base: Path, training: Documents
) -> None:
    """English and Chinese with a token for each byte of one and about a third of the other's."""
    tokenizer = load_tokenizer(tiny_base)
    draw = random.Random(1)
    texts = [["the of that " * draw.randint(1, 9) for _ in range(300)], ["大中这有" * 700 for _ in range(30)]]
    plan = plan_of(texts, weights, tokenizer, training, num_streams=64, packing=packing, weight_unit="bytes")
    counts_RN = counts_of(
        rows_of(plan, 256), 2, lambda part: len(tokenizer.decode(part.tokens[part.tokens > 2].tolist()).encode())
    )
    require_mixed(counts_RN, weights, 64)


class Whole(PlainText):
    """Documents that rows must not cut, as conversations are."""

    keeps_whole = True


@pytest.mark.parametrize("num_streams", [8, 64])
@pytest.mark.parametrize("packing", ["documents", "best_fit"])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_whole_documents_are_mixed_although_their_rows_are_padded(
    weights: tuple[float, ...], packing: str, num_streams: int, tokenizer: TextTokenizer, training: Documents
) -> None:
    """Of one source a row holds nine, of another one three, and a fifth of the row is padding."""
    draw = random.Random(2)
    texts = [["the " * draw.randint(*lengths) for _ in range(400)] for lengths in ((2, 9), (10, 30), (2, 30))]
    plan = plan_of(texts[: len(weights)], weights, tokenizer, training, num_streams=num_streams, packing=packing)
    plan = replace(plan, encoder=Whole(tokenizer))
    rows = rows_of(plan, 512)
    assert not any(part.offset for row in rows for part in row)
    counts_RN = counts_of(rows, len(weights), lambda part: len(part.tokens))
    require_mixed(counts_RN, weights, 64)  # eight rows of whole documents cannot hold the weights as closely


@pytest.mark.parametrize("num_streams", [8, 64])
def test_best_fit_fills_rows_from_sources_that_are_owed_some(
    num_streams: int, tokenizer: TextTokenizer, training: Documents
) -> None:
    """A row holds one document of the first source; filled with the second's, a third of the run would be those."""
    texts = [["the " * 34] * 300, ["the " * 3] * 300]
    plan = plan_of(texts, (0.9, 0.1), tokenizer, training, num_streams=num_streams, packing="best_fit")
    plan = replace(plan, encoder=Whole(tokenizer))
    counts_N = counts_of(rows_of(plan, 512), 2, lambda part: len(part.tokens)).sum(0)
    assert counts_N / counts_N.sum() == pytest.approx((0.9, 0.1), abs=0.02)


class Dropping(Whole):
    """Drops Chinese."""

    def encode(self, text: str) -> EncodedDocument:
        document = super().encode(text)
        return EncodedDocument(document.tokens[:0], too_long="dropped") if "中" in text else document


@pytest.mark.parametrize("packing", ["documents", "best_fit"])
def test_a_source_whose_documents_are_all_dropped_leaves_no_empty_row(
    packing: str, tokenizer: TextTokenizer, training: Documents
) -> None:
    parts = [training(["中"] * 40, name="a", weight=0.9, max_epochs=1), training(["the"] * 900, name="b", max_epochs=1)]
    streams = StreamPlan(parts, Dropping(tokenizer), 64, 8, 0, packing).open(range(8))
    for stream in streams.values():
        while not stream.exhausted:
            assert stream.next_row() or stream.exhausted


def test_long_documents_are_cut_at_rows(tokenizer: TextTokenizer, training: Documents, texts: list[list[str]]) -> None:
    """Mixing costs few cuts: all but some rows of a source of long documents are one segment."""
    plan = plan_of([texts[1], texts[0]], (0.7, 0.3), tokenizer, training, num_streams=64)
    rows = [row for row in rows_of(plan, 640) if any(part.source == 0 for part in row)]
    assert np.mean([len(row) == 1 for row in rows]) > 0.95


def test_a_sample_tells_of_a_source(training: Documents, tokenizer: TextTokenizer) -> None:
    documents = training(["the of that " * (number % 5 + 1) for number in range(100)])
    encoder = PlainText(tokenizer)
    exact = sum(len(encoder.encode(documents.corpus.text(index)).tokens) for index in range(100))
    sample = sample_source(documents, encoder, 64)
    assert sample.tokens_per_byte == pytest.approx(exact / documents.num_bytes, rel=0.1)
    assert sample.fill == 1
    documents = training(["the " * 22] * 100)
    length = len(encoder.encode("the " * 22).tokens)
    assert 64 / 3 < length < 32
    assert sample_source(documents, Whole(tokenizer), 64).fill == pytest.approx(2 * length / 64)


class RememberedText(PlainText):
    """Encodes each text once: sixty-four streams begin the same few novels."""

    def encode(self, text: str) -> EncodedDocument:
        return _encoded(self, text)


@lru_cache(maxsize=100_000)
def _encoded(encoder: PlainText, text: str) -> EncodedDocument:
    return PlainText.encode(encoder, text)


@pytest.fixture(scope="module")
def real_encoder(shared_data: Path) -> PlainText:
    return RememberedText(load_tokenizer(shared_data / "tokenizers" / "mixtral-8x7b"))


@pytest.mark.slow
@pytest.mark.parametrize("num_streams", [8, 64])
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("unit", ["tokens", "bytes"])
def test_real_text_is_mixed(
    unit: Any, weights: tuple[float, ...], packing: str, num_streams: int, shared_data: Path, real_encoder: PlainText
) -> None:
    """Paragraphs, novels of a megabyte, and English summaries."""
    files = ["zh/wikipedia_paragraphs", "zh/four_novels_long", "en/wikipedia_vital_summaries"]
    parts = []
    for file, weight in zip(files, weights, strict=False):
        path = shared_data / "corpora" / f"{file}.jsonl.gz"
        parts.append(split_by_hash(read_corpus(Source(path.name, str(path), weight=weight)), [])[1])
    plan = StreamPlan(parts, real_encoder, 512, num_streams, 0, packing, unit)

    def size(part: Any) -> float:
        if unit == "tokens":
            return len(part.tokens)
        return len(real_encoder.tokenizer.decode(part.tokens[part.tokens > 2].tolist()).encode())

    require_mixed(counts_of(rows_of(plan, 256), len(weights), size), weights, num_streams)
