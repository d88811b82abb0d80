"""Figures of answers, counted by hand."""

import pytest

from lightning_mixcn.metrics import answer_figures

EOS = 2


@pytest.mark.parametrize(
    ("answers", "eos_rate", "repetition_rate", "length"),
    [
        ([[7, 8, 9, EOS]], 1.0, 0.0, 3.0),
        ([[7, 8, 9]], 0.0, 0.0, 3.0),
        ([[EOS]], 1.0, 0.0, 0.0),  # an empty answer that ended
        ([[]], 0.0, 0.0, 0.0),
        ([[EOS, 5]], 0.0, 0.0, 2.0),  # only the last token ends
        # Grams 1414 4141 1414 4141: two of four stood before.
        ([[1, 4, 1, 4, 1, 4, 1, EOS]], 1.0, 2 / 4, 7.0),
        # Grams 5555 5555 5556: one of three stood before.
        ([[5, 5, 5, 5, 5, 6, 3]], 1.0, 1 / 3, 6.0),
        # Counted over all answers; what another answer said is no repetition.
        ([[5, 6, 7, 8, 3], [5, 6, 7, 8, 9]], 0.5, 0.0, 4.5),
        ([[4, 4, 4, 4, 4], [5, 6, 7, 8, 9]], 0.0, 1 / 4, 5.0),
    ],
)
def test_what_is_counted(answers: list[list[int]], eos_rate: float, repetition_rate: float, length: float) -> None:
    # Two tokens end an answer.
    figures = answer_figures(answers, {EOS, 3})
    assert figures["eos_rate"] == pytest.approx(eos_rate)
    assert figures["repetition_rate"] == pytest.approx(repetition_rate)
    assert figures["length_tokens"] == pytest.approx(length)
