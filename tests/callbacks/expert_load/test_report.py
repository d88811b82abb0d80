"""A file in which a resumed run repeats and loses nothing."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_mixcn.callbacks.expert_load.report import (
    ExpertLoadFile,
    ExpertLoadRow,
    divergence_tags,
    entropy_figure,
    layer_tags,
    load_figure,
    load_tags,
)
from lightning_mixcn.metrics.expert_load import LoadSums

HEADER = "step,stage,source,position_from,layer,expert,tokens"


def row(step: int, stage: str = "train", source: str = "zh", tokens: int = 7) -> ExpertLoadRow:
    return ExpertLoadRow(step, stage, source, 0, 1, 2, tokens)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Write a run of five steps that logs every other, validates every third, and was killed while it wrote."""
    path = tmp_path / "run" / "experts.csv"
    file = ExpertLoadFile(path)
    file.start(0, 0)
    for step, stage in ((2, "train"), (3, "val"), (4, "train")):
        file.append([row(step, stage), row(step, stage, "en")])
    with path.open("a", encoding="utf-8") as unfinished:
        unfinished.write("5,train,z")
    return path


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def test_columns(path: Path) -> None:
    assert lines(path)[:3] == [HEADER, "2,train,zh,0,1,2,7", "2,train,en,0,1,2,7"]


def steps(path: Path) -> list[tuple[str, ...]]:
    return [tuple(line.split(",")[:3]) for line in lines(path)[1:]]


def test_a_new_run_starts_from_scratch(path: Path) -> None:
    ExpertLoadFile(path).start(0, 0)
    assert lines(path) == [HEADER]


@pytest.mark.parametrize(
    ("step", "logged_at", "kept"),
    [(2, 2, "2"), (3, 2, "23"), (4, 4, "234"), (4, 2, "23"), (5, 4, "234")],
)
def test_going_on(step: int, logged_at: int, kept: str, path: Path) -> None:
    ExpertLoadFile(path).start(step, logged_at)
    assert [at for at, _, source in steps(path) if source == "zh"] == list(kept)
    assert len(steps(path)) == 2 * len(kept)


def test_a_validation_that_is_repeated_replaces_its_lines(path: Path) -> None:
    file = ExpertLoadFile(path)
    file.start(3, 2)
    file.append([row(3, "val", tokens=8)])
    file.append([row(6, "val")])
    assert lines(path)[3:] == ["3,val,zh,0,1,2,8", "6,val,zh,0,1,2,7"]


def test_a_name_with_a_comma_is_quoted(path: Path) -> None:
    ExpertLoadFile(path).append([row(6, source='a, "b"')])
    assert lines(path)[-1].endswith('6,train,"a, ""b""",0,1,2,7')


COUNTS = torch.tensor([[10, 10, 10, 10], [40, 0, 0, 0]])
SUMS = LoadSums(
    counts=COUNTS,
    tokens=torch.tensor([20, 20]),
    entropy_nats=torch.tensor([20.0, 10.0], dtype=torch.float64),
    confidence=torch.tensor([8.0, 16.0], dtype=torch.float64),
)


def test_means_and_worst_layers() -> None:
    assert load_tags("experts", SUMS) == pytest.approx(
        {
            "experts/imbalance_max_over_mean": 2.5,
            "experts/imbalance_max_over_mean_worst_layer": 4.0,
            "experts/coefficient_of_variation": 3**0.5 / 2,
            "experts/coefficient_of_variation_worst_layer": 3**0.5,
            "experts/dead_expert_fraction": 0.375,
            "experts/dead_expert_fraction_worst_layer": 0.75,
            "experts/effective_experts": 2.5,
            "experts/effective_experts_worst_layer": 1.0,
            "experts/routing_entropy": 0.5,
            "experts/routing_entropy_worst_layer": 0.0,
            "experts/smallest_share": 0.125,
            "experts/smallest_share_worst_layer": 0.0,
            "experts/router_entropy_nats": 0.75,
            "experts/router_confidence": 0.6,
        }
    )


def test_each_layer() -> None:
    tags = layer_tags("experts", SUMS)
    assert tags["experts/layer_00/effective_experts"] == pytest.approx(4.0)
    assert tags["experts/layer_01/effective_experts"] == pytest.approx(1.0)
    assert tags["experts/layer_01/router_entropy_nats"] == 0.5
    assert [tags[f"experts/layer_01/share_{expert}"] for expert in range(4)] == [1.0, 0.0, 0.0, 0.0]
    assert len(tags) == 2 * (8 + 4)


def test_divergence() -> None:
    bits = torch.tensor([0.25, 0.75])
    assert divergence_tags("experts", "drift_bits", bits, per_layer=False) == {
        "experts/drift_bits": 0.5,
        "experts/drift_bits_largest_layer": 0.75,
    }
    assert divergence_tags("experts", "drift_bits", bits, per_layer=True)["experts/layer_01/drift_bits"] == 0.75


def test_nothing_counted_gives_no_tag() -> None:
    nothing = LoadSums(*(torch.zeros_like(part) for part in SUMS))
    assert load_tags("experts", nothing) == layer_tags("experts", nothing) == {}


def test_a_panel_for_each_table_in_uniform_shares() -> None:
    even, skewed = torch.full((3, 4), 0.25), torch.tensor([[0.7, 0.1, 0.1, 0.1]] * 3)
    figure = load_figure({"all": even, "zh": skewed}, "training, step 10")
    panels = figure.axes[:2]
    assert figure.get_suptitle() == "expert load: share of tokens relative to uniform\ntraining, step 10"
    assert [panel.get_xlabel() for panel in panels] == ["expert", "expert"]
    assert panels[0].get_ylabel() == "layer"
    assert [panel.get_title() for panel in panels] == ["all", "zh"]
    for panel, table in zip(panels, (even, skewed), strict=True):
        np.testing.assert_allclose(panel.images[0].get_array(), 4 * table.numpy())
        assert panel.images[0].get_clim() == (0.0, 2.0)
    figure.canvas.draw()
    picture = np.asarray(figure.canvas.buffer_rgba())
    assert picture.shape[0] > 100
    assert picture.shape[1] > picture.shape[0]


def test_a_figure_of_a_large_model_stays_small() -> None:
    figure = load_figure({name: torch.full((32, 8), 1 / 8) for name in ("all", "zh", "en")}, "training, step 10")
    assert max(figure.get_size_inches()) < 15


def test_128_experts_have_narrow_cells_and_no_tags_of_their_own() -> None:
    figure = load_figure({name: torch.full((48, 128), 1 / 128) for name in ("all", "zh", "en")}, "training, step 10")
    assert max(figure.get_size_inches()) < 24
    figure.canvas.draw()
    panel = figure.axes[0]
    assert panel.get_window_extent().width > 3 * 128
    assert len(panel.get_xticks()) <= 16
    sums = LoadSums(torch.ones(48, 128, dtype=torch.int64), *(torch.ones(48) for _ in range(3)))
    assert len(layer_tags("experts", sums)) == 48 * 8


def test_a_line_for_each_source_and_its_base() -> None:
    base, now = {"zh": torch.tensor([0.9, 0.8])}, {"zh": torch.tensor([0.9, 0.1]), "en": torch.tensor([1.0, 0.7])}
    (panel,) = entropy_figure(base, now, "validation, step 10").axes
    assert panel.get_title() == "routing entropy by layer: 1 is all experts alike\nvalidation, step 10"
    drawn = {str(line.get_label()): np.asarray(line.get_ydata()).tolist() for line in panel.lines}
    assert drawn == {
        "zh": pytest.approx([0.9, 0.1]), "zh, before training": pytest.approx([0.9, 0.8]),
        "en": pytest.approx([1.0, 0.7]),
    }  # fmt: skip
    panel.figure.canvas.draw()


@pytest.mark.parametrize("num_layers", [2, 32])
@pytest.mark.parametrize("num_experts", [2, 8])
def test_texts_are_whole(num_layers: int, num_experts: int) -> None:
    figure = load_figure({"all": torch.full((num_layers, num_experts), 1 / num_experts)}, "validation, step 100000")
    figure.canvas.draw()
    box, page = figure.get_tightbbox(), figure.bbox_inches
    assert page.x0 <= box.x0 < box.x1 <= page.x1
    assert page.y0 <= box.y0 < box.y1 <= page.y1
