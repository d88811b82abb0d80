"""The files of a run's long-context evaluations, and what the pictures show."""

import json
from pathlib import Path
from typing import Any

from lightning_mixcn.callbacks.long_context import LongContextReport, perplexity_figure, retrieval_figure

LENGTHS = (512, 1024, 2048, 4096)


def evaluation(step: int) -> Any:
    """Perplexity 20 − step at 512 tokens, and one less at each length; English reaches 1024 tokens only."""
    rows = [
        {
            "source": source,
            "length": length,
            "perplexity": 20.0 - step - index,
            "bucket_tokens": 0 if source == "en" and length > 1024 else 99,
        }
        for source in ("zh", "en")
        for index, length in enumerate(LENGTHS)
    ]
    accuracy = {"passkey_zh": [[1.0, 0.5], [0.0, 0.25]], "needle_en": [[1.0, 1.0], [1.0, 0.0]]}
    retrieval = {"lengths": [512, 4096], "depths": [0.0, 1.0], "accuracy": accuracy}
    return {"step": step, "likelihoods": rows, "retrieval": retrieval, "out_of_memory": []}


def test_a_resumed_run_goes_on_and_a_new_one_begins_anew(tmp_path: Path) -> None:
    for step in (0, 2, 4, 4):
        LongContextReport(tmp_path).add(evaluation(step))
    steps = [[entry["step"] for entry in LongContextReport(tmp_path, after).evaluations] for after in (None, 2, -1)]
    assert steps == [[0, 2, 4], [0, 2], []]


def test_the_files(tmp_path: Path) -> None:
    figures = LongContextReport(tmp_path).add(evaluation(3))
    assert set(figures) == {"perplexity", "retrieval"}
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"long_context.json", "long_context.csv", "perplexity.png", "retrieval.csv", "retrieval.png"}
    assert json.loads((tmp_path / "long_context.json").read_text(encoding="utf-8"))["evaluations"] == [evaluation(3)]
    lines = (tmp_path / "retrieval.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "step,task,depth,length,accuracy"
    assert lines[1:4] == ["3,passkey_zh,0.0,512,1.0", "3,passkey_zh,0.0,4096,0.5", "3,passkey_zh,1.0,512,0.0"]


def test_nothing_that_fits_is_a_file_without_pictures(tmp_path: Path) -> None:
    nothing: Any = {"step": 0, "likelihoods": [], "retrieval": None, "out_of_memory": [512]}
    assert LongContextReport(tmp_path).add(nothing) == {}
    assert [path.name for path in tmp_path.iterdir()] == ["long_context.json"]


def test_curves_of_earlier_steps_lie_under_the_last_one() -> None:
    chinese, english = perplexity_figure([evaluation(0), evaluation(5)]).axes
    assert (chinese.get_title(), english.get_title()) == ("zh", "en")
    curves = {line.get_label(): line for line in chinese.lines}
    assert list(curves["step 5"].get_xdata()) == list(LENGTHS)
    assert list(curves["step 5"].get_ydata()) == [15.0, 14.0, 13.0, 12.0]
    assert curves["step 5"].get_color() == "tab:red"
    assert curves["step 5"].get_zorder() > curves["step 0"].get_zorder()
    assert [len(line.get_xdata()) for line in english.lines] == [2, 2]
    assert chinese.get_xscale() == "log"


def test_heatmaps_have_depths_down_and_lengths_across() -> None:
    passkey, needle, _ = retrieval_figure(evaluation(5)["retrieval"], 5).axes
    assert (passkey.get_title(), needle.get_title()) == ("passkey_zh", "needle_en")
    assert passkey.images[0].get_array().tolist() == [[1.0, 0.5], [0.0, 0.25]]
    assert [label.get_text() for label in passkey.get_xticklabels()] == ["512", "4096"]
    assert [label.get_text() for label in passkey.get_yticklabels()] == ["0", "1"]
