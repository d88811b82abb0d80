import numpy as np
import pytest
import torch

from lightning_mixcn.data.loaders import EvaluationLoader, EvaluationSet
from lightning_mixcn.text import (
    DocumentSet,
    PlainText,
    Source,
    TextTokenizer,
    all_documents,
    load_tokenizer,
    read_corpus,
)


@pytest.fixture(scope="module")
def documents(sources: list[Source]) -> list[DocumentSet]:
    return [all_documents(read_corpus(source)) for source in sources]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: str) -> TextTokenizer:
    return load_tokenizer(tokenizer_folder)


@pytest.fixture(scope="module")
def whole(documents: list[DocumentSet], tokenizer: TextTokenizer) -> EvaluationSet:
    return EvaluationSet(documents, PlainText(tokenizer), 48, max_rows=None)


def test_every_document_is_scored_once(whole: EvaluationSet, documents: list[DocumentSet]) -> None:
    sums = np.zeros((300, 2), dtype=np.int64)
    for batch in EvaluationLoader(whole, 4, num_ranks=1, rank=0):
        scored = batch["labels"] != -100
        np.add.at(sums[:, 0], batch["document_index"][scored].numpy(), batch["label_bytes"][scored].numpy())
        np.add.at(sums[:, 1], batch["document_index"][scored].numpy(), 1)
    texts = [part.text(index) for part in documents for index in range(len(part))]
    lengths = np.array([len(text.encode()) for text in texts])
    assert np.array_equal(sums[:, 0], lengths)
    assert np.array_equal(sums[:, 1], lengths + 1)  # a token a byte, and EOS


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_rows_do_not_depend_on_ranks(ranks: int, whole: EvaluationSet) -> None:
    loaders = [EvaluationLoader(whole, 4, ranks, rank) for rank in range(ranks)]
    assert len({len(loader) for loader in loaders}) == 1
    of_ranks = [list(loader) for loader in loaders]
    assert {len(batches) for batches in of_ranks} == {len(loaders[0])}
    rows = torch.cat([batch["labels"] for step in zip(*of_ranks, strict=True) for batch in step])
    alone = torch.cat([batch["labels"] for batch in EvaluationLoader(whole, 4, 1, 0)])
    count = len(whole.rows)
    assert torch.equal(rows[:count], alone[:count])
    assert (rows[count:] == -100).all()
    assert 0 <= len(rows) - count < 4 * ranks


def test_batches_have_the_stated_types(whole: EvaluationSet) -> None:
    batch = next(iter(EvaluationLoader(whole, 4, 1, 0)))
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in batch.items()} == {
        "input_ids": ((4, 48), torch.int64),
        "labels": ((4, 48), torch.int64),
        "document_ids": ((4, 48), torch.int32),
        "position_ids": ((4, 48), torch.int64),
        "source_ids": ((4, 48), torch.int16),
        "continuation_mask": ((4, 48), torch.bool),
        "label_bytes": ((4, 48), torch.int32),
        "text_mask": ((4, 48), torch.bool),
        "document_index": ((4, 48), torch.int64),
    }


def test_a_cap_takes_the_first_rows_of_each_source(
    whole: EvaluationSet, documents: list[DocumentSet], tokenizer: TextTokenizer
) -> None:
    capped = EvaluationSet(documents, PlainText(tokenizer), 48, max_rows=5)
    assert [row[0].source for row in capped.rows] == [0] * 5 + [1] * 5
    first_english = next(index for index, row in enumerate(whole.rows) if row[0].source == 1)
    wanted = whole.rows[:5] + whole.rows[first_english : first_english + 5]
    for ours, theirs in zip(capped.rows, wanted, strict=True):
        assert [part.tokens.tolist() for part in ours] == [part.tokens.tolist() for part in theirs]


def test_origins(whole: EvaluationSet) -> None:
    assert len(whole) == 300
    assert [(whole.origin(i).source, whole.origin(i).record) for i in (0, 199, 200, 299)] == [
        ("zh", 1),
        ("zh", 200),
        ("en", 1),
        ("en", 100),
    ]
    with pytest.raises(IndexError, match=r"`index=300`: the evaluation set has documents 0 to 299"):
        whole.origin(300)
