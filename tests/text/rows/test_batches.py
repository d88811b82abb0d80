import numpy as np
import pytest

from lightning_mixcn.text import RowTable, collate_rows, collate_tables
from lightning_mixcn.text.rows.batches import RowSegment


def segment(*tokens: int, source: int = 0, offset: int = 0) -> RowSegment:
    return RowSegment(np.asarray(tokens, dtype=np.int32), source, 0, offset)


def test_batch_layout() -> None:
    rows = [(segment(1, 7, 8, 2), segment(1, 9, source=1)), (segment(6, 2, source=1, offset=3),), ()]
    batch = collate_rows(rows, 7, padding_id=2)
    assert {name: array.dtype.name for name, array in batch.items()} == {
        "input_ids": "int64",
        "labels": "int64",
        "document_ids": "int32",
        "position_ids": "int64",
        "source_ids": "int16",
        "continuation_mask": "bool",
    }
    assert batch["input_ids"].tolist() == [[1, 7, 8, 2, 1, 9, 2], [6, 2, 2, 2, 2, 2, 2], [2] * 7]
    assert batch["labels"].tolist() == [[-100, 7, 8, 2, -100, 9, -100], [-100, 2, *[-100] * 5], [-100] * 7]
    assert batch["document_ids"].tolist() == [[0, 0, 0, 0, 1, 1, -1], [0, 0, *[-1] * 5], [-1] * 7]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 0], [0, 1, 0, 1, 2, 3, 4], list(range(7))]
    assert batch["source_ids"].tolist() == [[0, 0, 0, 0, 1, 1, -1], [1, 1, *[-1] * 5], [-1] * 7]
    assert batch["continuation_mask"].tolist() == [[False] * 7, [True] * 2 + [False] * 5, [False] * 7]


def test_batch_without_isolation() -> None:
    """Positions run through the row, and the first token of a document is predicted from the one before."""
    batch = collate_rows([(segment(1, 7, 2), segment(1, 9, source=1))], 6, padding_id=2, isolated=False)
    assert batch["labels"].tolist() == [[-100, 7, 2, 1, 9, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0]]
    assert batch["document_ids"].tolist() == [[0, 0, 0, 1, 1, -1]]


@pytest.mark.parametrize("isolated", [True, False])
def test_parts_of_a_batch_are_laid_out_as_the_whole(isolated: bool) -> None:
    rows = [(segment(1, 7, 8, 2), segment(1, 9)), (), (segment(6, 2, offset=3),), (segment(1, 5, 5, 5, 5, 5, 2),)]
    numbered = list(enumerate(rows))
    parts = [RowTable.of(part, 7, 2) for part in (numbered[1::2], [], numbered[::2])]
    found = collate_tables(parts, 7, isolated=isolated)
    for name, array in collate_rows(rows, 7, 2, isolated=isolated).items():
        assert found[name].dtype == array.dtype
        assert np.array_equal(found[name], array)
