"""Tokens of each expert as a file, a figure and tags of TensorBoard."""

import csv
import io
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from lightning_mixcn.files.atomic import append_lines, keep_lines
from lightning_mixcn.metrics.expert_load import LoadSums, shares
from lightning_mixcn.studies.figures import choose_fonts


class ExpertLoadRow(NamedTuple):
    """A line of the file.

    Args:
        step: Optimizer steps done when it was written.
        stage: ``train``, of the steps since the last such line; ``val``, of one pass; or ``base``, of the check before
            training.
        source: Name of the source, ``all`` where sources have no names; of pairs with ``/chosen``, ``/rejected`` or
            ``/other`` after it, for the tokens of the answers and all else.
        position_from: First position in its document of the bucket of positions.
        layer: Number of the layer, from 0.
        expert: Number of the expert, from 0.
        tokens: Number of times that the expert was chosen.
    """

    step: int
    stage: str
    source: str
    position_from: int
    layer: int
    expert: int
    tokens: int


_HEADER = ",".join(ExpertLoadRow._fields) + "\n"


class ExpertLoadFile:
    """``experts.csv``, in which every step is there once, however often a run is resumed.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._started_at = 0

    def start(self, step: int, logged_at: int) -> None:
        """Begin or go on: remove what a resumed run will write again.

        Args:
            step: Optimizer steps done; 0 begins a new file.
            logged_at: Number of these whose training lines were written before the checkpoint was.
        """
        self._started_at = step
        self._keep(lambda at, stage: at <= (logged_at if stage == "train" else step) and step > 0)

    def append(self, rows: Iterable[ExpertLoadRow]) -> None:
        """Add the lines of one step and stage."""
        lines = list(rows)
        if lines and lines[0].step <= self._started_at:
            # Lightning repeats the validation of the step that a run is resumed from, or not: it depends on where.
            self._keep(lambda at, stage: (at, stage) != lines[0][:2])
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(lines)
        append_lines(self._path, [text.getvalue()])

    def _keep(self, is_kept: Callable[[int, str], bool]) -> None:
        def is_ours(line: str) -> bool:
            step, stage, _ = line.split(",", 2) if line.count(",") > 1 else ("", "", "")
            return step.isdigit() and is_kept(int(step), stage)

        keep_lines(self._path, is_ours, _HEADER)


# Inches of a panel at most, and experts up to which every one has a tick, and tags of its own in every layer: the ticks
# of 64 would cover each other, and the tags of 128 in 48 layers would be 6,144.
_WIDEST, _FEW = 6.4, 16
_NARROWEST = 3.6  # inches that the title takes
_BRIGHTEST = 2.0  # uniform shares; above it, colours are alike, so that one busy expert does not darken all others


def load_figure(shares_by_name: Mapping[str, Tensor], when: str) -> Any:
    """Draw heatmaps.

    Args:
        shares_by_name: Each panel's share of each expert in its layer, float ``[L, E]`` on the CPU.
        when: Stage and step, for the title.

    Returns:
        A `matplotlib.figure.Figure`, which belongs to no window.
    """
    # Takes a second, which only those wait for who draw.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    num_layers, num_experts = next(iter(shares_by_name.values())).shape
    across = len(shares_by_name) * (0.9 + min(0.3 * num_experts, _WIDEST))
    width, height = max(1.2 + across, _NARROWEST), 1.8 + 0.2 * num_layers
    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"expert load: share of tokens relative to uniform\n{when}", fontsize="small")
    panels = figure.subplots(1, len(shares_by_name), squeeze=False, sharey=True)[0]
    for panel, (name, shares_LE) in zip(panels, shares_by_name.items(), strict=True):
        image = panel.imshow(
            (shares_LE * num_experts).numpy(), vmin=0.0, vmax=_BRIGHTEST, cmap="viridis", aspect="auto"
        )
        panel.set_title(name, fontsize="small")
        panel.set_xlabel("expert")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        if num_experts <= _FEW:
            panel.set_xticks(range(num_experts))
    panels[0].set_ylabel("layer")
    panels[0].yaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=list(panels), label="relative to uniform", extend="max")
    choose_fonts(figure)
    return figure


def entropy_figure(base: Mapping[str, Tensor], now: Mapping[str, Tensor], when: str) -> Any:
    """Draw how evenly each source is routed in every layer, before training beside now.

    Args:
        base: Routing entropy of each source before training ``[L]``, over log E; empty where it was not measured.
        now: The same now.
        when: Stage and step, for the title.

    Returns:
        A `matplotlib.figure.Figure`, which belongs to no window.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6.4, 3.6), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    for name, values_L in now.items():
        (line,) = panel.plot(values_L.numpy(), marker="o", markersize=3, label=name)
        if name in base:
            label = f"{name}, before training"
            panel.plot(base[name].numpy(), linestyle="--", color=line.get_color(), label=label)
    panel.set_title(f"routing entropy by layer: 1 is all experts alike\n{when}", fontsize="small")
    panel.set(xlabel="layer", ylabel="routing entropy / log E", ylim=(0, 1.02))
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.legend(fontsize="small")
    choose_fonts(figure)
    return figure


# What is logged without being asked: imbalance, dead experts, entropy, divergence and drift.
FIRST_NUMBERS = (
    "imbalance_max_over_mean",
    "dead_expert_fraction",
    "routing_entropy",
    "source_divergence_bits",
    "side_divergence_bits",
    "drift_bits",
)

# The worst layer's value of each number. A router's entropy and confidence have no bad end.
_WORST: Mapping[str, Callable[[Tensor], Tensor]] = {
    "imbalance_max_over_mean": Tensor.max,
    "coefficient_of_variation": Tensor.max,
    "dead_expert_fraction": Tensor.max,
    "effective_experts": Tensor.min,
    "routing_entropy": Tensor.min,
    "smallest_share": Tensor.min,
}


def load_tags(prefix: str, sums: LoadSums) -> dict[str, float]:
    """Return each number's mean over the layers, and its worst layer's.

    Args:
        prefix: First part of the names.
        sums: Sums by layer ``[L]``.

    Returns:
        Empty if no token was counted.
    """
    if not int(sums.tokens.sum()):
        return {}
    tags: dict[str, float] = {}
    for name, values_L in sums.numbers().items():
        tags[f"{prefix}/{name}"] = float(values_L.mean())
        if name in _WORST:
            tags[f"{prefix}/{name}_worst_layer"] = float(_WORST[name](values_L))
    return tags


def layer_tags(prefix: str, sums: LoadSums) -> dict[str, float]:
    """Return the same numbers of each layer, and of up to 16 experts each one's share; the file has those of more.

    Args:
        prefix: First part of the names.
        sums: Sums by layer ``[L]``.

    Returns:
        ``<prefix>/layer_00/…``; empty if no token was counted.
    """
    if not int(sums.tokens.sum()):
        return {}
    numbers = sums.numbers()
    if sums.counts.shape[-1] <= _FEW:
        numbers |= {f"share_{expert}": share_L for expert, share_L in enumerate(shares(sums.counts).unbind(-1))}
    return {
        f"{prefix}/layer_{layer:02d}/{name}": float(value)
        for name, values_L in numbers.items()
        for layer, value in enumerate(values_L)
    }


def divergence_tags(prefix: str, name: str, bits: Tensor, per_layer: bool) -> dict[str, float]:
    """Return a divergence's mean over the layers, its largest, and on request each layer's.

    Args:
        prefix: First part of the names.
        name: Name of the divergence, with its unit.
        bits: ``[L]``.
        per_layer: Give each layer's, too.
    """
    tags = {f"{prefix}/{name}": float(bits.mean()), f"{prefix}/{name}_largest_layer": float(bits.max())}
    if per_layer:
        tags |= {f"{prefix}/layer_{layer:02d}/{name}": float(value) for layer, value in enumerate(bits)}
    return tags
