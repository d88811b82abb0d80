import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_mixcn.text import (
    DocumentSet,
    PlainText,
    ScoredRow,
    TextTokenizer,
    collate_evaluation_rows,
    evaluation_rows,
    load_tokenizer,
)

Documents = Callable[[list[str]], DocumentSet]
# A text of white space alone is no document.
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="▁\0"), max_size=40).filter(str.strip)
LISTS = st.lists(TEXT, min_size=1, max_size=8)


def rows_of(texts: list[str], tokenizer: TextTokenizer, documents: Documents, length: int) -> list[ScoredRow]:
    return list(evaluation_rows(documents(texts), PlainText(tokenizer), length, source=3, first_document=10))


def test_evaluation_continues_with_one_token_of_overlap(tokenizer: TextTokenizer, documents: Documents) -> None:
    texts = ["the of and", "to in a is that for it"]
    (first,), (second,) = tokenizer.encode_batch([texts[0]]), tokenizer.encode_batch([texts[1]])
    assert (len(first), len(second)) == (3, 7)
    batch = collate_evaluation_rows(rows_of(texts, tokenizer, documents, 8), 8, padding_id=2)
    assert batch["input_ids"].tolist() == [[1, *first, 2, 1, *second[:2]], [*second[1:], 2, 2]]
    assert batch["labels"][1].tolist() == [-100, *second[2:], 2, -100]
    assert batch["text_mask"][1].tolist() == [False, *[True] * 5, False, False]
    assert batch["label_bytes"][0].tolist() == [0, 3, 3, 4, 0, 0, 2, 3]
    assert batch["label_bytes"][1].tolist() == [0, 2, 3, 5, 4, 3, 0, 0]
    assert batch["document_index"].tolist() == [[10] * 5 + [11] * 3, [11] * 7 + [-1]]
    assert batch["source_ids"].tolist() == [[3] * 8, [3] * 7 + [-1]]
    dtypes = {name: batch[name].dtype.name for name in ("label_bytes", "text_mask", "document_index")}
    assert dtypes == {"label_bytes": "int32", "text_mask": "bool", "document_index": "int64"}


def test_a_single_token_is_left_to_padding(tokenizer: TextTokenizer, documents: Documents) -> None:
    rows = rows_of(["the of", "the"], tokenizer, documents, 5)
    assert [[len(part.tokens) for part in row] for row in rows] == [[4], [3]]


@pytest.fixture(scope="module")
def without_bos(small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    """Return a tokenizer that puts no BOS before a text, as Qwen's."""
    folder = tmp_path_factory.mktemp("without_bos")
    shutil.copy(small_folder / "tokenizer.model", folder)
    settings = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return load_tokenizer(folder)


def test_without_bos_the_first_token_has_no_label(without_bos: TextTokenizer, documents: Documents) -> None:
    texts = ["the of and", "to in a is that for it"]
    first, second = without_bos.encode_batch(texts)
    assert PlainText(without_bos).encode(texts[0]).tokens.tolist() == [*first, 2]
    batch = collate_evaluation_rows(rows_of(texts, without_bos, documents, 8), 8, padding_id=2)
    assert batch["input_ids"].tolist() == [[*first, 2, *second[:4]], [*second[3:], 2, 2, 2, 2]]
    assert batch["labels"][0].tolist() == [-100, *first[1:], 2, -100, *second[1:4]]
    assert batch["labels"][1].tolist() == [-100, *second[4:], 2, -100, -100, -100]
    assert batch["label_bytes"][0].tolist() == [0, 3, 4, 0, 0, 3, 2, 3]
    assert batch["text_mask"][0].tolist() == [False, True, True, False, False, True, True, True]


@pytest.mark.parametrize("begins", [True, False])
@given(texts=LISTS, length=st.integers(2, 30))
def test_every_token_is_scored_once(
    begins: bool,
    texts: list[str],
    length: int,
    tokenizer: TextTokenizer,
    without_bos: TextTokenizer,
    documents: Documents,
) -> None:
    """But for a document's first: BOS, or the text's own where the tokenizer puts no BOS there."""
    tokenizer = tokenizer if begins else without_bos
    rows = rows_of(texts, tokenizer, documents, length)
    batch = collate_evaluation_rows(rows, length, padding_id=2)
    assert batch["input_ids"].shape == (len(rows), length)
    for index, text in enumerate(texts, start=10):
        of_document = batch["document_index"] == index
        labels = batch["labels"][of_document]
        ((ids, widths),) = tokenizer.encode_batch_with_bytes([text])
        predicted, of_first = (ids.tolist(), 0) if begins else (ids[1:].tolist(), int(widths[0]))
        assert labels[labels != -100].tolist() == [*predicted, 2]
        assert batch["label_bytes"][of_document].sum() == len(text.encode()) - of_first
        assert batch["labels"][of_document & batch["text_mask"]].tolist() == predicted
    assert not batch["label_bytes"][batch["labels"] == -100].any()
    assert (batch["labels"][batch["document_index"] == -1] == -100).all()
