"""Which tokens belong to which group, and what is refused."""

from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_mixcn.callbacks.expert_load.window import LoadWindow, StarvingExperts
from lightning_mixcn.metrics.expert_load import LoadSums

TRAINER = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
LOGITS, WEIGHTS = torch.zeros(8, 3), torch.ones(8, 1)
# Two rows of four tokens: the second document of the first row is English, and a row ends in padding.
BATCH = {
    "document_ids": torch.tensor([[0, 0, 1, 1], [0, 0, 0, -1]]),
    "position_ids": torch.tensor([[0, 1, 0, 1], [0, 1, 2, 0]]),
    "source_ids": torch.tensor([[0, 0, 1, 1], [1, 1, 1, -1]], dtype=torch.int16),
}
EXPERTS = torch.tensor([0, 1, 2, 2, 0, 1, 1, 2])[:, None]


def window(sources: list[str], boundaries: list[int], has_sides: bool = False) -> LoadWindow:
    return LoadWindow(sources, boundaries, 1, 3, torch.device("cpu"), has_sides)


def counted(window: LoadWindow, batch: dict[str, torch.Tensor] = BATCH) -> LoadSums:
    window.open_batch(batch)
    window.observe(0, LOGITS, WEIGHTS, EXPERTS)
    window.close_batch()
    return window.sum_up(TRAINER)


def test_by_source_and_position() -> None:
    load = window(["zh", "en"], [1, 2])
    sums = counted(load)
    assert {name: part.counts.tolist() for name, part in load.by_source(sums).items()} == {
        "zh": [[1, 1, 0]],
        "en": [[1, 2, 2]],
    }
    assert [part.counts.tolist() for part in load.by_position(sums).values()] == [
        [[2, 0, 1]],
        [[0, 2, 1]],
        [[0, 1, 0]],
    ]
    assert load.bucket_starts() == [0, 1, 2]


def test_a_source_for_each_row() -> None:
    load = window(["zh", "en"], [])
    sums = counted(load, BATCH | {"source_ids": torch.tensor([1, 0], dtype=torch.int16)})
    assert load.by_source(sums)["zh"].counts.tolist() == [[1, 2, 0]]


def test_without_names_all_tokens_are_counted_together() -> None:
    batch = {name: BATCH[name] for name in ("document_ids", "position_ids")}
    assert counted(window([], []), batch).counts[0].tolist() == [[2, 3, 2]]


def test_by_side_of_the_answers_alone() -> None:
    """Of the first row a chosen and a rejected answer, each after a token of prompt; of the second one without side."""
    pairs = {
        "labels": torch.tensor([[-100, 7, -100, 7], [-100, 7, 7, -100]]),
        "sides": torch.tensor([[1, 1, -1, -1], [0, 0, 0, 0]], dtype=torch.int8),
    }
    load = window(["zh", "en"], [1], has_sides=True)
    sums = counted(load, BATCH | pairs)
    assert {name: part.counts.tolist() for name, part in load.by_side(sums).items()} == {
        "chosen": [[0, 1, 0]],
        "rejected": [[0, 0, 1]],
    }
    without = window(["zh", "en"], [1])
    same = counted(without)
    assert without.by_side(same) == {}
    for name, part in load.by_source(sums).items():
        assert torch.equal(part.counts, without.by_source(same)[name].counts)
    for start, part in load.by_position(sums).items():
        assert torch.equal(part.counts, without.by_position(same)[start].counts)
    rows = [(name, counts.tolist()) for name, counts in zip(load.names(), sums.counts[:, 0], strict=False)]
    assert [row for row in rows if any(row[1])] == [
        ("zh/chosen", [0, 1, 0]),
        ("zh/other", [1, 0, 0]),
        ("en/rejected", [0, 0, 1]),
        ("en/other", [1, 0, 1]),
        ("en/other", [0, 2, 0]),
    ]
    assert not without.load_state_dict(load.state_dict())


def test_a_source_without_a_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"5 tokens have `source_ids` outside of 0 to 0; .* gives \['zh'\]"):
        counted(window(["zh"], []))


def test_only_an_open_batch_is_counted() -> None:
    load = window([], [])
    load.observe(0, LOGITS, WEIGHTS, EXPERTS)
    load.open_batch(BATCH)
    load.observe(0, LOGITS[:3], WEIGHTS[:3], EXPERTS[:3])
    load.close_batch()
    load.observe(0, LOGITS, WEIGHTS, EXPERTS)
    assert not load.sum_up(TRAINER).counts.any()


def test_the_state_goes_on_with_the_same_groups_only() -> None:
    first, second, other = window(["zh", "en"], []), window(["zh", "en"], []), window(["zh", "en"], [1])
    counted(first)
    state: dict[str, Any] = first.state_dict()
    assert second.load_state_dict(state)
    assert counted(second).counts.sum() == 14
    assert not other.load_state_dict(state)
    assert counted(other).counts.sum() == 7


FED, HUNGRY = [0.25, 0.25, 0.25, 0.25], [0.4, 0.35, 0.24, 0.01]


def shares(*layers: list[float]) -> torch.Tensor:
    return torch.tensor(layers, dtype=torch.float64)


def test_an_expert_is_warned_of_once_until_it_was_fed() -> None:
    starving = StarvingExperts(share=0.1, steps=4)
    warned = [starving.update(shares(FED, HUNGRY), steps=2) for _ in range(4)]
    assert warned == [[], [(1, 3)], [], []]
    starving.update(shares(FED, FED), steps=2)
    assert [starving.update(shares(FED, HUNGRY), steps=2) for _ in range(2)] == [[], [(1, 3)]]


def test_the_share_is_one_of_uniform_shares() -> None:
    assert not StarvingExperts(share=0.03, steps=1).update(shares(HUNGRY), 1)
    assert StarvingExperts(share=0.05, steps=1).update(shares(HUNGRY), 1) == [(0, 3)]


def test_the_state_goes_on() -> None:
    first, second = StarvingExperts(0.1, 4), StarvingExperts(0.1, 4)
    first.update(shares(HUNGRY), 3)
    second.load_state_dict(first.state_dict())
    assert second.update(shares(HUNGRY), 1) == [(0, 3)]


def test_the_warning_names_layers_and_experts() -> None:
    message = StarvingExperts(0.1, 4).warning([(0, 1), (0, 3), (12, 0)])
    assert "layer 0: 1, 3; layer 12: 0." in message
    assert "for 4 optimizer steps, with less than 0.1 of a uniform share" in message


def test_many_starving_experts_are_counted_instead_of_named() -> None:
    starving = [(layer, expert) for layer in range(48) for expert in range(100 + (layer == 7))]
    warning = StarvingExperts(share=0.1, steps=4).warning(starving)
    assert "4801 in 48 layers, the most in layer 7, 101 of them; `experts.csv` has their tokens" in warning
    assert len(warning) < 400
