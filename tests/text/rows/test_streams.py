import itertools
import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_mixcn.text import (
    PACKINGS,
    Corpus,
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
from lightning_mixcn.text.corpus.documents import Permutation

Documents = Callable[..., TrainingDocuments]
# A record of nothing but NUL bytes is refused as a broken file.
# A text of white space alone is no document.
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="▁\0"), max_size=60).filter(str.strip)


def plan_of(documents: list[TrainingDocuments], tokenizer: TextTokenizer, **changes: Any) -> StreamPlan:
    numbers: dict[str, Any] = {"sequence_length": 16, "num_streams": 4, "seed": 0} | changes
    return StreamPlan(documents, PlainText(tokenizer), **numbers)


def all_rows(plan: StreamPlan) -> list[list[Row]]:
    """Make every row of every stream, up to the end."""
    rows: list[list[Row]] = []
    for stream in plan.open(range(plan.num_streams)).values():
        rows.append([])
        while not stream.exhausted:
            rows[-1].append(stream.next_row())
        assert stream.next_row() == ()
    return rows


def decoded(plan: StreamPlan) -> list[Counter[str]]:
    """Put together the documents found in all rows, by source, put together from their segments."""
    found: list[Counter[str]] = [Counter() for _ in plan.documents]
    for rows in all_rows(plan):
        if plan.packing != "best_fit":
            assert all(sum(len(part.tokens) for part in row) == plan.sequence_length for row in rows[:-1])
        pieces: dict[tuple[int, int], list[int]] = defaultdict(list)
        for part in sorted(itertools.chain(*rows), key=lambda part: (part.source, part.document, part.offset)):
            tokens = pieces[part.source, part.document]
            assert part.offset == len(tokens)
            tokens += part.tokens.tolist()
        for (source, _), ids in pieces.items():
            assert (ids[0], ids[-1]) == (1, 2)
            assert {1, 2}.isdisjoint(ids[1:-1])
            assert isinstance(plan.encoder, PlainText)
            found[source][plan.encoder.tokenizer.decode(ids[1:-1])] += 1
    return found


@given(
    texts=st.lists(st.lists(TEXT, min_size=1, max_size=12), min_size=1, max_size=3),
    epochs=st.integers(1, 3),
    length=st.integers(2, 40),
    streams=st.integers(1, 6),
    seed=st.integers(0, 2**40),
    packing=st.sampled_from(PACKINGS),
)
def test_each_document_once_an_epoch(
    texts: list[list[str]], epochs: int, length: int, streams: int, seed: int, packing: str,
    tokenizer: TextTokenizer, training: Documents,
) -> None:  # fmt: skip
    parts = [training(part, name=f"s{i}", weight=i + 0.5, max_epochs=epochs) for i, part in enumerate(texts)]
    plan = plan_of(parts, tokenizer, sequence_length=length, num_streams=streams, seed=seed, packing=packing)
    assert decoded(plan) == [Counter(part * epochs) for part in texts]


def found_all(sources: list[Source], tokenizer: Path, **changes: Any) -> None:
    parts = [split_by_hash(read_corpus(source), [])[1] for source in sources]
    plan = plan_of(parts, load_tokenizer(tokenizer), num_streams=16, **changes)
    assert decoded(plan) == [
        Counter(part.corpus.text(index).replace("▁", " ") for index in range(len(part.corpus))) for part in parts
    ]


def test_each_real_document_once(shared_data: Path) -> None:
    names = ("wikipedia_paragraphs", "four_novels_long")
    files = [shared_data / "corpora" / "zh" / f"{name}.jsonl.gz" for name in names]
    sources = [Source(file.name, str(file), max_epochs=1) for file in files]
    found_all(sources, shared_data / "tokenizers" / "mixtral-8x7b", sequence_length=512)


@pytest.mark.slow
@pytest.mark.parametrize("packing", PACKINGS)
def test_every_document_of_all_corpora_once(packing: str, shared_data: Path) -> None:
    keys = {"classical_modern_quarter": "classical", "libreoffice_help_parallel": "zh"}  # pairs
    files = sorted((shared_data / "corpora").glob("*/*"))
    names = [file.name.split(".")[0] for file in files]
    sources = [
        Source(name, str(file), text_key=keys.get(name, "text"), max_epochs=1)
        for name, file in zip(names, files, strict=True)
    ]
    found_all(sources, shared_data / "tokenizers" / "mixtral-8x7b", sequence_length=4096, packing=packing)


def values(row: Row) -> list[Any]:
    return [(part.tokens.tolist(), part.source, part.document, part.offset) for part in row]


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("max_epochs", [None, 3])
def test_a_stream_goes_on_from_its_state(
    packing: str, max_epochs: int | None, tokenizer: TextTokenizer, corpus: Callable[..., Corpus]
) -> None:
    texts = [f"the {number} 中 of" * (number % 7) for number in range(40)]
    parts = [
        split_by_hash(corpus(texts[start:], name=f"s{start}", max_epochs=max_epochs), [0.2])[1] for start in (0, 20)
    ]
    plan = plan_of(parts, tokenizer, packing=packing, num_streams=2)
    stream = plan.open([1])[1]
    states, rows = [stream.state()], []
    for _ in range(60):
        rows.append(values(stream.next_row()))
        states.append(json.loads(json.dumps(stream.state())))  # plain values
    for begin in (0, 1, 2, 7, 30, 58):
        resumed = plan.open([1], {1: states[begin]})[1]
        for row, state in zip(rows[begin:], states[begin + 1 :], strict=True):
            assert values(resumed.next_row()) == row
            assert resumed.state() == state


def test_held_out_documents_are_passed_over(tokenizer: TextTokenizer, corpus: Callable[..., Corpus]) -> None:
    texts = [f"the {number}" for number in range(60)]
    held_out, part = split_by_hash(corpus(texts, max_epochs=2), [0.3])
    (found,) = decoded(plan_of([part], tokenizer))
    outside = {held_out[0].text(index) for index in range(len(held_out[0]))}
    assert outside
    assert found == Counter(2 * [text for text in texts if text not in outside])


def test_best_fit_cuts_long_documents_only(tokenizer: TextTokenizer, training: Documents) -> None:
    draw = random.Random(0)
    texts = [" ".join(draw.choices(["the", "of", "中", "大"], k=draw.randint(1, 40))) for _ in range(800)]
    plan = plan_of([training(texts, max_epochs=1)], tokenizer, packing="best_fit", sequence_length=64, num_streams=1)
    (rows,) = all_rows(plan)
    assert not any(part.offset for row in rows for part in row)
    padding = [64 - sum(len(part.tokens) for part in row) for row in rows[:-20]]
    assert sum(padding) < 0.01 * 64 * len(padding)


def test_rows_are_a_pure_function_of_the_plan(tokenizer: TextTokenizer, training: Documents) -> None:
    texts = [f"the {number} 中 of" * (number % 5) for number in range(30)]
    parts = [training(texts, name="a"), training(texts[:7], name="b")]

    def first_rows(**changes: int) -> list[list[list[int]]]:
        streams = plan_of(parts, tokenizer, **changes).open([1, 3])
        rows = [streams[index].next_row() for index in (1, 3, 3, 1, 1)]
        return [[part.tokens.tolist() for part in row] for row in rows]

    assert first_rows() == first_rows()
    assert first_rows() != first_rows(seed=1)
    alone = plan_of(parts, tokenizer).open([3])[3]
    assert [[part.tokens.tolist() for part in alone.next_row()] for _ in range(2)] == first_rows()[1:3]


@pytest.mark.parametrize("weights", [(0.9, 0.1), (1.0, 1.0), (5.0, 3.0)])
def test_weights_are_honoured_in_tokens(
    weights: tuple[float, float], tokenizer: TextTokenizer, training: Documents
) -> None:
    """Within 1 % over any 10,000 rows, although the second source has few and very long documents."""
    draw = random.Random(0)
    short = [" ".join(draw.choices(["the", "of", "中", "大"], k=draw.randint(1, 30))) for _ in range(500)]
    long = [" ".join(draw.choices(["the", "of", "中", "大"], k=20_000)) for _ in range(3)]
    parts = [training(short, name="a", weight=weights[0]), training(long, name="b", weight=weights[1])]
    plan = plan_of(parts, tokenizer, num_streams=16, sequence_length=16)
    streams = plan.open(range(16))
    counts = np.zeros((24_000, 2))
    for row in range(len(counts)):
        for part in streams[row % 16].next_row():
            counts[row, part.source] += len(part.tokens)
    share = weights[0] / sum(weights)
    for start in range(0, 14_001, 2_000):
        window = counts[start : start + 10_000].sum(0)
        assert window[0] / window.sum() == pytest.approx(share, abs=0.01 * min(share, 1 - share))


@pytest.mark.parametrize("packing", PACKINGS)
def test_weights_in_bytes_mix_the_same_text_whatever_the_tokenizer(
    packing: str, tokenizer: TextTokenizer, tiny_base: Path, training: Documents
) -> None:
    draw = random.Random(0)
    texts = {
        "en": ["the of that " * draw.randint(1, 9) for _ in range(300)],
        "zh": ["大中这有" * draw.randint(1, 9) for _ in range(300)],
    }
    parts = [training(text, name=name, weight={"en": 3, "zh": 1}[name]) for name, text in texts.items()]
    in_tokens = []
    for each in (tokenizer, load_tokenizer(tiny_base)):  # the second one has a token for each byte
        plan = plan_of(parts, each, num_streams=1, sequence_length=64, packing=packing, weight_unit="bytes")
        stream, tokens, text_bytes = plan.open([0])[0], [0, 0], [0, 0]
        while sum(text_bytes) < 60_000:
            for part in stream.next_row():
                tokens[part.source] += len(part.tokens)
                ids = part.tokens[part.tokens > 2].tolist()  # no control tokens
                text_bytes[part.source] += len(each.decode(ids).encode())
        assert text_bytes[0] / sum(text_bytes) == pytest.approx(0.75, abs=0.015)
        in_tokens.append(tokens[0] / sum(tokens))
    assert abs(in_tokens[0] - in_tokens[1]) > 0.03


def test_the_first_rows_mix_the_sources(tokenizer: TextTokenizer, training: Documents) -> None:
    parts = [training(["the of " * 500], name=name, weight=weight) for name, weight in (("a", 3.0), ("b", 1.0))]
    streams = plan_of(parts, tokenizer, num_streams=64).open(range(64))
    counts = Counter(streams[index].next_row()[0].source for index in range(64))
    assert counts == {0: 48, 1: 16}


def test_a_source_that_ends_leaves_the_rest_to_the_others(tokenizer: TextTokenizer, training: Documents) -> None:
    parts = [training(["the of"] * 8, name="a", max_epochs=1), training(["中 大"] * 8, name="b")]
    streams = plan_of(parts, tokenizer, num_streams=2).open([0])
    rows = [streams[0].next_row() for _ in range(50)]
    assert not streams[0].exhausted
    assert {part.source for row in rows[10:] for part in row} == {1}
    assert sum(part.source == 0 and part.tokens[-1] == 2 for row in rows for part in row) == 4


# Of ten places; a checkpoint of today must mean the same rows for ever.
GOLDEN = [7, 1, 3, 8, 6, 2, 9, 4, 5, 0]


@pytest.mark.parametrize("size", [*range(1, 70), 255, 256, 257, 1000, 4097])
def test_every_index_once(size: int) -> None:
    order = Permutation(size, "zh/0")
    assert sorted(order[place] for place in range(size)) == list(range(size))


def test_the_order_never_changes() -> None:
    order = Permutation(10, "0/zh/0")
    assert [order[place] for place in range(10)] == GOLDEN


def test_other_keys_other_orders() -> None:
    orders = {tuple(Permutation(50, f"{key}")[place] for place in range(50)) for key in range(20)}
    assert len(orders) == 20


@pytest.mark.parametrize("size", [5, 12, 37])
def test_each_index_is_as_likely_at_each_place(size: int) -> None:
    """Chi-square of the place that three indices come to, over 4,000 keys; far above chance only if it is skewed."""
    for place in (0, size // 2, size - 1):
        counts = Counter(Permutation(size, f"{key}")[place] for key in range(4000))
        expected = 4000 / size
        statistic = sum((counts[index] - expected) ** 2 / expected for index in range(size))
        assert statistic < size - 1 + 5 * (2 * (size - 1)) ** 0.5


def test_neighbours_part() -> None:
    order = Permutation(10_000, "zh")
    steps = Counter(order[place + 1] - order[place] for place in range(9_999))
    assert steps.most_common(1)[0][1] < 12


def test_places_far_out_need_no_table() -> None:
    assert 0 <= Permutation(10**12, "zh")[10**12 - 1] < 10**12
