"""Files and table of known verdicts."""

import csv
import json
from pathlib import Path

from lightning_mixcn.studies.preference.matches import LEFT, RIGHT, TIE
from lightning_mixcn.studies.preference.report import preference_table, write_preferences
from tests.studies.preference.test_scores import judged


def test_files(tmp_path: Path) -> None:
    write_preferences(tmp_path, judged(2, 10, [[LEFT] * 6 + [TIE] * 2 + [RIGHT] * 2] * 2))
    report = json.loads((tmp_path / "preference.json").read_text(encoding="utf-8"))
    assert report["elo_anchor"] == {"model": "m0", "elo": 1000.0}
    assert report["pairs"][0]["win"] == 0.6
    assert report["agreement"]["cohen_kappa"] == 1
    assert report["models"][0]["elo_low_95"] is None
    for name in ("pairs", "models", "judges"):
        with (tmp_path / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        assert [set(row) for row in rows] == [set(row) for row in report[name]]
        assert [float(row["verdicts"]) for row in rows] == [row["verdicts"] for row in report[name]]
    shown = (tmp_path / "table.txt").read_text(encoding="utf-8")
    assert "m0" in shown
    assert "70.0%" in shown
    assert "Cohen's kappa 1.000, Krippendorff's alpha 1.000" in shown


def test_without_elo_the_table_says_why() -> None:
    shown = preference_table(judged(2, 1, [[LEFT]]))
    assert "No finite Elo: some models won, or lost, every verdict" in shown
    assert "One judge" in shown
