"""Likelihood per source against sums in plain Python."""

import math
import random

import pytest
import torch

from lightning_mixcn.metrics import SourceLikelihood, overall_bits_per_byte, score_documents, scored_positions


def random_batch(generator: random.Random, rows: int = 3, length: int = 17) -> dict[str, torch.Tensor]:
    shape = (rows, length)
    cells = rows * length

    def tensor(values: list[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype).view(shape)

    labels = [generator.choice([-100, 5, 2]) for _ in range(cells)]
    return {
        "nll": tensor([0] * cells, torch.float32)
        + torch.tensor([generator.expovariate(0.3) for _ in range(cells)]).view(shape),
        "labels": tensor(labels, torch.int64),
        "source_ids": tensor([-1 if label == -100 else generator.randrange(2) for label in labels], torch.int16),
        "label_bytes": tensor([3 if label == 5 else 0 for label in labels], torch.int32),
        "text_mask": tensor([int(label == 5) for label in labels], torch.bool),
    }


def plain_sums(batches: list[dict[str, torch.Tensor]]) -> dict[int, list[float]]:
    """Nats, text nats, tokens and bytes of each source, cell by cell."""
    sums: dict[int, list[float]] = {}
    for batch in batches:
        rows, length = batch["labels"].shape
        for row in range(rows):
            for position in range(1, length):
                cell = {name: values[row, position].item() for name, values in batch.items()}
                if cell["labels"] != -100:
                    of_source = sums.setdefault(int(cell["source_ids"]), [0.0, 0.0, 0, 0])
                    of_source[0] += cell["nll"]
                    of_source[1] += cell["nll"] * cell["text_mask"]
                    of_source[2] += 1
                    of_source[3] += cell["label_bytes"]
    return sums


def test_equals_sums_in_plain_python() -> None:
    generator = random.Random(0)
    batches = [random_batch(generator) for _ in range(4)]
    metric = SourceLikelihood(3)
    for batch in batches:
        metric.update(**batch)
    results, expected = metric.compute(), plain_sums(batches)
    assert set(results) == {0, 1}  # source 2 had no tokens
    for source, (nats, text_nats, tokens, size) in expected.items():
        assert results[source]["tokens"] == tokens
        assert results[source]["bytes"] == size
        # Both sum float32 values in float64; only the order differs.
        assert results[source]["nll_nats_per_token"] == pytest.approx(nats / tokens, rel=1e-12)
        assert results[source]["bits_per_byte"] == pytest.approx(text_nats / math.log(2) / size, rel=1e-12)


def test_one_source_id_a_row() -> None:
    batch = random_batch(random.Random(1), rows=2)
    batch["source_ids"] = torch.tensor([1, 0], dtype=torch.int16)
    metric = SourceLikelihood(2)
    metric.update(**batch)
    scored = scored_positions(batch["labels"])
    assert [metric.compute()[source]["tokens"] for source in (1, 0)] == scored.sum(1).tolist()


def test_counts_beyond_what_float32_holds() -> None:
    metric = SourceLikelihood(1)
    batch = random_batch(random.Random(2))
    batch["source_ids"].zero_()
    metric.update(**batch)
    tokens = int(metric.tokens)
    metric.tokens += 2**24
    metric.update(**batch)
    assert metric.compute()[0]["tokens"] == 2**24 + 2 * tokens


def test_a_source_without_bytes_has_no_bits_per_byte() -> None:
    batch = random_batch(random.Random(3))
    batch["text_mask"].zero_()
    metric = SourceLikelihood(2)
    metric.update(**batch)
    assert math.isnan(metric.compute()[0]["bits_per_byte"])


def test_all_sources_together_are_as_if_they_were_one() -> None:
    generator = random.Random(5)
    apart, together = SourceLikelihood(3), SourceLikelihood(1)
    for rows in (3, 1, 2):
        batch = random_batch(generator, rows=rows)
        apart.update(**batch)
        batch["source_ids"] = batch["source_ids"].clamp(max=0)
        together.update(**batch)
    whole = together.compute()[0]["bits_per_byte"]
    results = apart.compute()
    assert len({result["bytes"] for result in results.values()}) == len(results) == 2
    assert overall_bits_per_byte(results.values()) == pytest.approx(whole, rel=1e-14)
    without = {"nll_nats_per_token": 1.0, "bits_per_byte": math.nan, "tokens": 3, "bytes": 0}
    assert overall_bits_per_byte([*results.values(), without]) == pytest.approx(whole, rel=1e-14)  # type: ignore[list-item]  # a plain dict
    assert overall_bits_per_byte([without]) is None  # type: ignore[list-item]  # likewise


def test_sums_add_up_over_ranks() -> None:
    """Merging states is what torchmetrics does over ranks, with each state's own reduction."""
    generator = random.Random(4)
    batches = [random_batch(generator) for _ in range(2)]
    together, ranks = SourceLikelihood(2), [SourceLikelihood(2), SourceLikelihood(2)]
    for rank, batch in zip(ranks, batches, strict=True):
        rank.update(**batch)
        together.update(**batch)
    ranks[0].merge_state(ranks[1])
    assert ranks[0].compute() == together.compute()


def test_labels_of_no_source_are_refused() -> None:
    batch = random_batch(random.Random(5))
    batch["source_ids"].fill_(7)
    with pytest.raises(ValueError, match=r"`source_ids` holds \[7\].*expected 0 to 1"):
        SourceLikelihood(2).update(**batch)


def test_no_source_is_refused() -> None:
    with pytest.raises(ValueError, match="`num_sources=0`"):
        SourceLikelihood(0)


def test_a_row_s_first_label_is_not_predicted() -> None:
    assert scored_positions(torch.tensor([[5, 5, -100]])).tolist() == [[False, True, False]]


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
