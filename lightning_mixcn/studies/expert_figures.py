"""The study of experts as pictures.

Legend: L layers, E experts.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_PANELS_ACROSS = 8


def save_heatmaps(
    path: Path,
    panels: Mapping[str, NDArray[np.float64]],
    columns: int,
    title: str,
    unit: str = "change of bits per byte",
) -> None:
    """Layers down, experts across: red where the model is worse without the expert, blue where it is better.

    Args:
        path: PNG to write.
        panels: float64 ``[L, E]`` under the title of each, row by row; all share one scale.
        columns: Panels in a row.
        title: Over all panels.
        unit: What the colours measure.
    """
    num_layers, num_experts = next(iter(panels.values())).shape
    lines = -(-len(panels) // columns)
    width, height = 1.6 + columns * (0.9 + 0.3 * num_experts), 0.9 + lines * (0.9 + 0.2 * num_layers)
    figure, axes = _grid(lines, columns, width, height)
    figure.suptitle(title, fontsize="small")
    largest = max(float(np.nanmax(np.abs(values))) for values in panels.values()) or 1.0
    for axis, (name, values_LE) in zip(axes, panels.items(), strict=False):
        image = axis.imshow(values_LE, vmin=-largest, vmax=largest, cmap="RdBu_r", aspect="auto")
        axis.set_title(name, fontsize="small")
        axis.set_xlabel("expert")
        axis.set_ylabel("layer")
        axis.set_xticks(range(num_experts))
        axis.yaxis.get_major_locator().set_params(integer=True)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    figure.colorbar(image, ax=axes, label=unit)
    figure.savefig(path)


def save_matrices(path: Path, matrices: NDArray[np.float64], limits: tuple[float, float], title: str) -> None:
    """Experts against experts, a panel a layer.

    Args:
        path: PNG to write.
        matrices: float64 ``[L, E, E]``.
        limits: Values of the darkest and the brightest colour.
        title: Over all panels.
    """
    columns = min(_PANELS_ACROSS, len(matrices))
    lines = -(-len(matrices) // columns)
    figure, axes = _grid(lines, columns, 1.6 + 1.4 * columns, 0.8 + 1.6 * lines)
    figure.suptitle(title, fontsize="small")
    for layer, (axis, values_EE) in enumerate(zip(axes, matrices, strict=False)):
        image = axis.imshow(values_EE, vmin=limits[0], vmax=limits[1], cmap="viridis")
        axis.set_title(f"layer {layer}", fontsize="x-small")
        axis.tick_params(labelsize="x-small")
    for axis in axes[len(matrices) :]:
        axis.set_axis_off()
    figure.colorbar(image, ax=axes)
    figure.savefig(path)


def _grid(lines: int, columns: int, width: float, height: float) -> tuple[Any, Sequence[Any]]:
    """A figure that belongs to no window, and its panels in reading order."""
    # Takes a second, which only those wait for who draw.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(lines, columns, squeeze=False).flat)
