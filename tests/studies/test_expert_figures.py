"""Pictures show what they are given."""

from pathlib import Path

import numpy as np
from matplotlib.image import imread

from lightning_mixcn.studies.experts.report import save_heatmaps, save_matrices


def test_what_is_worse_is_red_and_what_is_better_is_blue(tmp_path: Path) -> None:
    for name, value in (("worse", 1.0), ("better", -1.0), ("same", 0.0)):
        save_heatmaps(tmp_path / f"{name}.png", {"zh": np.full((3, 4), value)}, 1, "title")
    worse, better, same = (imread(tmp_path / f"{name}.png") for name in ("worse", "better", "same"))
    middle = worse.shape[0] // 2, worse.shape[1] // 4
    assert worse[middle][0] > worse[middle][2]
    assert better[middle][2] > better[middle][0]
    assert same[middle].min() > 0.9


def test_one_panel_a_layer(tmp_path: Path) -> None:
    """Nine layers take two lines; a picture is the same whenever it is drawn."""
    for name in ("one", "two"):
        save_matrices(tmp_path / f"{name}.png", np.random.default_rng(0).random((9, 4, 4)), (0.0, 1.0), "title")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    save_matrices(tmp_path / "three.png", np.ones((3, 4, 4)), (0.0, 1.0), "title")
    assert imread(tmp_path / "one.png").shape[0] > 1.5 * imread(tmp_path / "three.png").shape[0]
