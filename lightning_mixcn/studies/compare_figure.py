"""The comparison as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .compare_results import of_arm


def save_curves(path: Path, results: Sequence[Mapping[str, Any]], title: str) -> None:
    """Bits per byte against bytes of text seen: a panel a source, a line an arm, a band from best to worst seed.

    Args:
        path: PNG to write.
        results: Of each run, see `run_result`.
        title: Over all panels.
    """
    # Takes a second, which only those wait for who draw.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sources = list(results[0]["sources"])
    figure = Figure(figsize=(1 + 4 * len(sources), 3.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize="medium")
    for axis, source in zip(figure.subplots(1, len(sources), squeeze=False).flat, sources, strict=True):
        for arm in dict.fromkeys(result["arm"] for result in results):
            curves = np.array([run["sources"][source]["curve"] for run in of_arm(results, arm)])  # [seeds, points, 2]
            seen, values = curves[:, :, 0].mean(0) / 1e6, curves[:, :, 1]
            (line,) = axis.plot(seen, values.mean(0), marker="o", markersize=3, label=arm)
            if len(curves) > 1:
                axis.fill_between(seen, values.min(0), values.max(0), alpha=0.2, color=line.get_color())
        axis.set_title(source, fontsize="small")
        axis.set_xlabel("MB of text seen")
        axis.set_ylabel("bits per byte, held out")
        axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    # Neither date nor version: the same numbers give the same file.
    figure.savefig(path, metadata={"Software": None})
