from pathlib import Path
from typing import Any

import pytest

from lightning_mixcn.studies.comparison.results import (
    Spread,
    as_markdown,
    require_same_text,
    run_result,
    runs_as_csv,
    save_curves,
)


def likelihoods(zh: float, en: float) -> dict[str, Any]:
    return {
        name: {"bits_per_byte": value, "tokens": 30, "bytes": 60} for name, value in (("zh", zh), ("en", en))
    }  # fmt: skip


class Finished:
    """Stands for a run that came to its end."""

    def __init__(self, arm: str, seed: int, after: float, scores: dict[str, Any] | None = None) -> None:
        self.arm, self.seed = arm, seed
        self._after, self._scores = after, scores

    def start(self) -> dict[str, Any]:
        return likelihoods(3.0, 1.0)

    trains = True

    def facts(self) -> dict[str, Any]:
        validations = [
            {"step": step, "text_bytes_seen": 50 * step, "sources": likelihoods(self._after + 2 - step, 1.5)}
            for step in (1, 2)
        ]
        return {
            "steps": 2, "tokens_seen": 40, "text_bytes_seen": 100, "validations": validations,
            "parameters": {"trainable": 5, "total": 50},
        }  # fmt: skip

    def scores(self) -> dict[str, Any] | None:
        return self._scores


SCORES = {
    "rows": [{"task": "mmlu", "metric": "acc", "language": "en", "scores": {"base": 0.25, "adapted": 0.5}}],
    "eos_probe": {
        "models": {
            "base": {"zh": {"mean_after_newline": 0.125}, "en": {"mean_after_newline": None}},
            "adapted": {"zh": {"mean_after_newline": 0.75}, "en": {"mean_after_newline": None}},
        }
    },
}
COSTS = [
    {
        "arm": arm, "seed": seed, "tokens_per_second": 100.4, "seconds_per_step": 4.256, "fit_seconds": 90.0,
        "peak_memory_bytes": 2_500_000_000,
    }
    for arm in "ab"
    for seed in (0, 1)
]  # fmt: skip


def results(scores: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    finished = (
        Finished("a", 0, 2.0, scores),
        Finished("a", 1, 2.2, scores),
        Finished("b", 0, 1.0),
        Finished("b", 1, 1.0),
    )
    return [run_result(run) for run in finished]  # type: ignore[arg-type]  # a stand-in


def test_a_result() -> None:
    result = results(SCORES)[0]
    assert result["sources"]["zh"] == {
        "before": 3.0, "after": 2.0, "tokens_per_byte": 0.5, "pairs": {}, "curve": [[0, 3.0], [50, 3.0], [100, 2.0]],
    }  # fmt: skip
    assert result["scores"] == {"mmlu acc (en)": [0.25, 0.5], "P(EOS after a line break) (zh)": [0.125, 0.75]}
    assert (result["trainable_parameters"], result["tokens_seen"]) == (5, 40)


def test_spread() -> None:
    assert Spread.of([1.0]) == (1.0, None)
    assert Spread.of([1.0, 3.0]).deviation == pytest.approx(2**0.5)


def test_tables() -> None:
    table = [" ".join(line.split()) for line in as_markdown("Title", results(SCORES), COSTS).splitlines()]
    assert table[0] == "# Title"
    assert (
        "| a | 3.000 ± 0.000 | 2.100 ± 0.141 | -0.900 ± 0.141 | 1.000 ± 0.000 | 1.500 ± 0.000 | +0.500 ± 0.000 |"
        in table
    )
    assert "| a | 100 | 40 | 2 | 0.500 | 0.500 | 5 | 100 | 4.26 | 1.5 min | 2.50 GB |" in table
    assert "| mmlu acc (en) | 0.250 ± 0.000 → 0.500 ± 0.000 | - |" in table


def test_pairs_of_answers() -> None:
    given = results()
    assert "pairs of answers" not in as_markdown("Title", given, COSTS)
    for number, result in enumerate(given):
        for found in result["sources"].values():
            found["pairs"] = {"accuracy_by_likelihood": {"before": 0.5, "after": 0.6 + number / 100}}
    table = [" ".join(line.split()) for line in as_markdown("Title", given, COSTS).splitlines()]
    assert "| pairs of answers, before → after | zh accuracy | en accuracy |" in table
    assert "| a | 0.500 ± 0.000 → 0.605 ± 0.007 | 0.500 ± 0.000 → 0.605 ± 0.007 |" in table


def test_without_scores_there_is_no_table_of_them() -> None:
    assert "task" not in as_markdown("Title", results(), COSTS)


def test_csv_has_a_line_for_each_run_and_source() -> None:
    lines = runs_as_csv(results()).splitlines()
    assert len(lines) == 1 + 4 * 2
    assert lines[0].split(",")[:3] == ["arm", "seed", "steps"]
    assert lines[1].split(",")[-4:] == ["zh", "0.5", "3.0", "2.0"]


@pytest.mark.parametrize("changed", [{"zh": {"bytes": 61}, "en": {"bytes": 60}}, {"zh": {"bytes": 60}}])
def test_other_text_is_refused(changed: dict[str, Any]) -> None:
    require_same_text({"a": likelihoods(1, 2), "b": likelihoods(3, 4)})
    with pytest.raises(ValueError, match="different text"):
        require_same_text({"a": likelihoods(1, 2), "b": changed})


@pytest.mark.parametrize("sources", [{}, {"zh": {"bytes": 0}}])
def test_no_text_is_refused(sources: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Give text to validate on"):
        require_same_text({"a": sources, "b": sources})


def test_the_same_numbers_give_the_same_picture(tmp_path: Path) -> None:
    results = [
        {
            "arm": arm,
            "seed": seed,
            "sources": {name: {"after": 2.5 + seed, "curve": [[0, 3.0], [1e6, 2.5 + seed]]} for name in ("zh", "en")},
        }
        for arm in ("one", "other")
        for seed in (0, 1)
    ]
    for name in ("first.png", "second.png"):
        save_curves(tmp_path / name, results, "Title")
    first = (tmp_path / "first.png").read_bytes()
    assert first.startswith(b"\x89PNG")
    assert first == (tmp_path / "second.png").read_bytes()
    save_curves(tmp_path / "one.png", results[:1], "Title")
    assert (tmp_path / "one.png").read_bytes() != first
