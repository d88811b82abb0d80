"""The heatmap's numbers and panels."""

import numpy as np
import torch

from lightning_mixcn.callbacks.expert_load.report import load_figure


def test_a_panel_for_each_table_in_uniform_shares() -> None:
    even, skewed = torch.full((3, 4), 0.25), torch.tensor([[0.7, 0.1, 0.1, 0.1]] * 3)
    figure = load_figure({"all": even, "zh": skewed}, "train, 10")
    panels = figure.axes[:2]
    assert [panel.get_title() for panel in panels] == ["all", "zh"]
    for panel, table in zip(panels, (even, skewed), strict=True):
        np.testing.assert_allclose(panel.images[0].get_array(), 4 * table.numpy())
        assert panel.images[0].get_clim() == (0.0, 2.0)
    figure.canvas.draw()
    picture = np.asarray(figure.canvas.buffer_rgba())
    assert picture.shape[0] > 100
    assert picture.shape[1] > picture.shape[0]


def test_a_figure_of_a_large_model_stays_small() -> None:
    figure = load_figure({name: torch.full((32, 8), 1 / 8) for name in ("all", "zh", "en")}, "train, 10")
    assert max(figure.get_size_inches()) < 15
