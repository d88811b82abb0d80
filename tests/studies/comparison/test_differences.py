"""Differences between arms, paired by seed."""

from typing import Any

import pytest

from lightning_mixcn.studies.comparison.differences import (
    differences_as_json,
    differences_from_reference,
    differences_table,
)


def runs(arm: str, *after: float) -> list[dict[str, Any]]:
    """Return runs of an arm whose English varies less than its Chinese, a seed for each value."""
    return [
        {"arm": arm, "seed": seed, "sources": {"zh": {"after": value}, "en": {"after": 1 + value / 100}}}
        for seed, value in enumerate(after)
    ]


# The seeds move both arms alike: by arm they overlap, by seed they differ by 0.10, 0.11 and 0.12.
PAIRED = [*runs("plain", 2.0, 2.5, 3.0), *runs("better", 1.9, 2.39, 2.88), *runs("noise", 2.1, 2.4, 3.1)]


def test_the_seed_pairs_the_arms() -> None:
    found = differences_from_reference(PAIRED)
    assert list(found) == ["better", "noise"]
    assert found["better"]["zh"].difference == pytest.approx(-0.11)
    # t(2) = 4.30265, deviation 0.01, three seeds.
    assert found["better"]["zh"].low == pytest.approx(-0.11 - 4.30265 * 0.01 / 3**0.5, abs=1e-6)
    assert found["better"]["zh"].separated
    assert not found["noise"]["zh"].separated


def test_a_seed_that_one_arm_lacks_is_left_out() -> None:
    found = differences_from_reference([*runs("plain", 2.0, 2.5, 3.0), *runs("better", 1.9, 2.39)])
    assert found["better"]["zh"].difference == pytest.approx(-0.105)


def test_the_table() -> None:
    text, _, table = differences_table(PAIRED).partition("\n\n")
    assert text.startswith("Final figures less those of 'plain' under the same seed")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert rows[0] == ["less plain", "of", "difference", "95 %", "separated"]
    assert rows[2] == ["better", "zh", "-0.1100", "-0.1348 to -0.0852", "yes"]
    assert rows[4] == ["noise", "zh", "+0.0333", "-0.2535 to +0.3202", "no"]
    assert [row[:2] for row in rows[3:6:2]] == [["better", "en"], ["noise", "en"]]


def test_one_seed_has_no_interval() -> None:
    one = [*runs("plain", 2.0), *runs("better", 1.0)]
    assert differences_table(one).startswith("With one seed there is no interval")
    assert differences_as_json(one) == {"reference": "plain", "confidence": 0.95, "arms": {}}


def test_plain_values() -> None:
    found = differences_as_json(PAIRED)["arms"]["better"]["en"]
    assert set(found) == {"difference", "low", "high", "separated"}
    assert found["separated"] is True


def test_pairs_of_answers_are_compared_by_what_every_loss_has() -> None:
    ends = {"sft": (0.5, 0.52), "dpo": (0.7, 0.73)}
    results = [
        {
            "arm": arm,
            "seed": seed,
            "sources": {"zh": {"after": 2.0, "pairs": {"accuracy_by_likelihood": {"after": end}}}},
        }
        for arm, of_seed in ends.items()
        for seed, end in enumerate(of_seed)
    ]
    found = differences_from_reference(results)["dpo"]
    assert found["zh accuracy"].difference == pytest.approx(0.205)
    assert list(found) == ["zh", "zh accuracy"]
