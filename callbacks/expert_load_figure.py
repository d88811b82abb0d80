"""The expert load as a picture: layers down, experts across, a panel for each source.

Legend: L layers, E experts.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

_BRIGHTEST = 2.0  # uniform shares; above it, colours are alike, so that one busy expert does not darken all others


def load_figure(shares_by_name: Mapping[str, Tensor], title: str) -> Any:
    """Draw heatmaps.

    Args:
        shares_by_name: Of each panel, the share of each expert in its layer, float ``[L, E]`` on the CPU.
        title: Over all panels.

    Returns:
        A `matplotlib.figure.Figure`, which belongs to no window.
    """
    # Takes a second, which only those wait for who draw.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    num_layers, num_experts = next(iter(shares_by_name.values())).shape
    width, height = 1.2 + len(shares_by_name) * (0.9 + 0.3 * num_experts), 1.6 + 0.2 * num_layers
    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize="small")
    panels = figure.subplots(1, len(shares_by_name), squeeze=False, sharey=True)[0]
    for panel, (name, shares_LE) in zip(panels, shares_by_name.items(), strict=True):
        image = panel.imshow(
            (shares_LE * num_experts).numpy(), vmin=0.0, vmax=_BRIGHTEST, cmap="viridis", aspect="auto"
        )
        panel.set_title(name, fontsize="small")
        panel.set_xlabel("expert")
        panel.set_xticks(range(num_experts))
    panels[0].set_ylabel("layer")
    panels[0].yaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=list(panels), label="tokens, in uniform shares", extend="max")
    return figure
