"""The tables of a study whose results are known."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from lightning_mixcn.studies.experts.disabling import DisabledExpert
from lightning_mixcn.studies.experts.report import saliency_figures, save_heatmaps, save_matrices, write_importance
from lightning_mixcn.studies.experts.statistics import SourceDocuments
from lightning_mixcn.studies.experts.work import ExpertResults

LINES = list[dict[str, str]]


def known() -> ExpertResults:
    """Two layers of three experts; expert 1 of layer 1 matters to zh alone, expert 0 of layer 0 to both."""
    sources = []
    for zh in (True, False):
        changed = np.zeros((6, 5))
        changed[0] = 10 * math.log(2)
        changed[4] = 20 * math.log(2) * zh
        sizes = np.full(5, 100)
        sources.append(SourceDocuments(sizes * 2.0, sizes * 1.0, sizes, sizes, changed * 2, changed))
    pairs = np.array([[6, 4, 2], [4, 8, 4], [2, 4, 6]])  # of 10 tokens
    loads = {
        "load_counts": np.stack([[[6, 8, 6]] * 2, [[10, 10, 0]] * 2]),
        "load_tokens": np.full((2, 2), 10),
        "load_entropy_nats": np.full((2, 2), 5.0),
        "load_confidence": np.full((2, 2), 7.0),
        "pairs": np.stack([[pairs] * 2, [np.diag([10, 10, 0])] * 2]),
        "saliency": np.stack([[[6.0, 24.0, 12.0]] * 2, [[10.0, 50.0, 0.0]] * 2]),
    }
    variants = [DisabledExpert("mask", expert) for expert in range(3)]
    cosines = np.full((2, 3, 3), 0.5)
    return ExpertResults(["zh", "en"], variants, sources, loads, cosines, cosines / 2, 1, 1.0)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    (folder / "ranking.txt").write_text(write_importance(folder, known()), encoding="utf-8")
    return folder


def lines_of(report: Path, name: str, **chosen: object) -> LINES:
    with (report / name).open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    return [line for line in lines if all(line[key] == str(value) for key, value in chosen.items())]


def test_change_of_each_expert(report: Path) -> None:
    assert len(lines_of(report, "experts.csv")) == 2 * 3 * 2
    (line,) = lines_of(report, "experts.csv", layer=1, expert=1, source="zh")
    assert float(line["bits_per_byte_base"]) == pytest.approx(1 / math.log(2))
    assert float(line["bits_per_byte_change"]) == pytest.approx(0.2)
    assert float(line["bits_per_byte_disabled"]) == pytest.approx(1 / math.log(2) + 0.2)
    assert float(line["nll_change_nats_per_token"]) == pytest.approx(0.4 * math.log(2))
    assert float(line["change_low_95"]) == pytest.approx(0.2)
    assert (float(line["share_of_tokens"]), line["tokens"]) == (0.8, "8")


def test_saliency(report: Path) -> None:
    (line,) = lines_of(report, "experts.csv", layer=1, expert=1, source="zh")
    assert (line["saliency"], line["saliency_over_layer_mean"]) == ("3.0", "1.5")
    (line,) = lines_of(report, "experts.csv", layer=1, expert=2, source="en")
    assert (line["saliency"], line["saliency_over_layer_mean"], line["tokens"]) == ("0.0", "0.0", "0")
    blocks = (report / "ranking.txt").read_text(encoding="utf-8").split("\n\n")
    (block,) = (block for block in blocks if block.startswith("saliency for en"))
    assert block.splitlines()[2].split() == ["0", "1", "5", "2.500", "10"]
    assert block.splitlines()[-1] == "2 of 6 experts have no token of en: their saliency is 0"
    # Layer 0: changes of zh are 1, 0, 0, saliencies 1, 3, 2; layer 1: changes 0, 1, 0.
    assert saliency_figures(known()) == {
        "zh": {"experts_without_tokens": 0, "rank_correlation_with_change": {"mask": pytest.approx(0.0, abs=1e-9)}},
        "en": {"experts_without_tokens": 2, "rank_correlation_with_change": {"mask": pytest.approx(0.0, abs=1e-9)}},
    }


def test_difference_between_sources(report: Path) -> None:
    clear = lines_of(report, "differences.csv", interval_excludes_0=1)
    assert [(line["layer"], line["expert"], line["source"], line["other_source"]) for line in clear] == [
        ("1", "1", "zh", "en")
    ]
    assert float(clear[0]["difference_of_changes"]) == pytest.approx(0.2)
    blocks = (report / "ranking.txt").read_text(encoding="utf-8").split("\n\n")
    (block,) = (block for block in blocks if block.startswith("more for zh than for en"))
    assert block.splitlines()[2].split()[:3] == ["1", "1", "+0.2000"]
    (block,) = (block for block in blocks if block.startswith("bits per byte of en"))
    assert block.splitlines()[2].split()[:3] == ["0", "0", "+0.1000"]


def test_routing(report: Path) -> None:
    (line,) = lines_of(report, "routing.csv", source="zh", layer=1, expert=1)
    assert (line["tokens"], line["share_of_choices"]) == ("8", "0.4")
    (zh, en) = lines_of(report, "routing_layers.csv", layer=0)
    assert (float(zh["router_entropy_nats"]), float(zh["router_confidence"])) == (0.5, 0.7)
    assert float(en["dead_expert_fraction"]) == pytest.approx(1 / 3)
    assert float(zh["imbalance_max_over_mean"]) == pytest.approx(1.2)
    assert 0 < float(zh["divergence_of_sources_bits"]) == float(en["divergence_of_sources_bits"]) < 1


def test_pairs(report: Path) -> None:
    (line,) = lines_of(report, "coactivation.csv", source="zh", layer=0, expert=0, other_expert=1)
    assert (line["tokens"], line["share_of_tokens"]) == ("4", "0.4")
    assert float(line["lift"]) == pytest.approx(0.4 / (0.6 * 0.8))
    (never,) = lines_of(report, "coactivation.csv", source="en", layer=0, expert=0, other_expert=2)
    assert never["lift"] == ""


def test_similarity_and_pictures(report: Path) -> None:
    (line,) = lines_of(report, "similarity.csv", layer=1, expert=0, other_expert=2)
    assert (line["weight_cosine"], line["output_cosine"]) == ("0.25", "0.5")
    for name in ("experts", "saliency", "coactivation", "weight_similarity", "output_similarity"):
        assert (report / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_worse_is_red_and_what_is_better_is_blue(tmp_path: Path) -> None:
    for name, value in (("worse", 1.0), ("better", -1.0), ("same", 0.0)):
        save_heatmaps(tmp_path / f"{name}.png", {"zh": np.full((3, 4), value)}, 1, "title")
    worse, better, same = (imread(tmp_path / f"{name}.png") for name in ("worse", "better", "same"))
    middle = worse.shape[0] // 2, worse.shape[1] // 4
    assert worse[middle][0] > worse[middle][2]
    assert better[middle][2] > better[middle][0]
    assert same[middle].min() > 0.9


def test_128_experts_of_48_layers_are_cells_of_some_pixels(tmp_path: Path) -> None:
    """In pictures that a screen still shows."""
    save_heatmaps(tmp_path / "map.png", {name: np.ones((48, 128)) for name in ("zh", "en", "zh − en")}, 3, "title")
    height, width, _ = imread(tmp_path / "map.png").shape
    assert 3 * 128 * 4 < width < 2600
    assert 48 * 10 < height < 1400
    save_matrices(tmp_path / "pairs.png", np.ones((3, 128, 128)), (0.0, 1.0), "title")
    height, width, _ = imread(tmp_path / "pairs.png").shape
    assert 3 * 128 * 2 < width < 3 * 128 * 4


def test_one_panel_a_layer(tmp_path: Path) -> None:
    """Nine layers take two lines; a picture is the same whenever it is drawn."""
    for name in ("one", "two"):
        save_matrices(tmp_path / f"{name}.png", np.random.default_rng(0).random((9, 4, 4)), (0.0, 1.0), "title")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    save_matrices(tmp_path / "three.png", np.ones((3, 4, 4)), (0.0, 1.0), "title")
    assert imread(tmp_path / "one.png").shape[0] > 1.5 * imread(tmp_path / "three.png").shape[0]
