"""Scores of documents against a loop over cells."""

import torch

from lightning_mixcn.metrics import score_documents


def test_pieces_are_summed_by_source_and_document() -> None:
    labels = torch.tensor([[9, 5, 2, -100, 6, 2], [9, 7, 7, 7, -100, -100]])
    text = (labels >= 5) & (labels != -100)
    batch = {
        "labels": labels,
        "source_ids": torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, -1, -1]], dtype=torch.int16),
        "document_index": torch.tensor([[4, 4, 4, 4, 4, 4], [3, 3, 3, 3, -1, -1]]),
        "label_bytes": text.int() * 2,
        "text_mask": text,
    }
    nll = torch.tensor([[0.0, 1.0, 0.5, 0.0, 4.0, 0.25], [0.0, 1.0, 2.0, 3.0, 0.0, 0.0]])
    scores = score_documents(nll, batch)
    assert [list(entry) for entry in zip(*(column.tolist() for column in scores), strict=True)] == [
        [0, 3, 6.0, 6.0, 3, 6],
        [0, 4, 1.5, 1.0, 2, 2],
        [1, 4, 4.25, 4.0, 2, 2],
    ]
    assert scores.nats.dtype == torch.float64


def test_a_batch_of_padding_has_no_documents() -> None:
    empty = torch.full((2, 4), -100)
    batch = {
        "labels": empty,
        "source_ids": torch.full((2, 4), -1, dtype=torch.int16),
        "document_index": torch.full((2, 4), -1),
        "label_bytes": torch.zeros(2, 4, dtype=torch.int32),
        "text_mask": torch.zeros(2, 4, dtype=torch.bool),
    }
    assert all(len(column) == 0 for column in score_documents(torch.zeros(2, 4), batch))
