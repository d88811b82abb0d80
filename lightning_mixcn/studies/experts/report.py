"""The study of experts as files: tables, pictures, and a ranking to read.

Legend: L layers, E experts, V variants of a layer.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torchmetrics.functional.regression import spearman_corrcoef

from lightning_mixcn.metrics.expert_load import jensen_shannon_bits, load_numbers, shares
from lightning_mixcn.studies.figures import choose_fonts
from lightning_mixcn.studies.tables import aligned, write_csv

from .disabling import MODES
from .statistics import Change, Intervals
from .work import ExpertResults

_PANELS_ACROSS = 8
# Inches of a panel at most, and experts up to which every one has a tick: those of 64 or 128 would cover each other.
_WIDEST, _TICKS = 6.4, 16


def save_heatmaps(
    path: Path,
    panels: Mapping[str, NDArray[np.float64]],
    columns: int,
    title: str,
    unit: str = "change of bits per byte",
) -> None:
    """Draw layers down, experts across: red where the model is worse without the expert, blue where better.

    Args:
        path: PNG to write.
        panels: float64 ``[L, E]`` under the title of each, row by row; all share one scale.
        columns: Panels in a row.
        title: Over all panels.
        unit: Unit of the colours.
    """
    num_layers, num_experts = next(iter(panels.values())).shape
    lines = -(-len(panels) // columns)
    width, height = 1.6 + columns * (0.9 + min(0.3 * num_experts, _WIDEST)), 0.9 + lines * (0.9 + 0.2 * num_layers)
    figure, axes = _grid(lines, columns, width, height)
    figure.suptitle(title, fontsize="small")
    largest = max(float(np.nanmax(np.abs(values))) for values in panels.values()) or 1.0
    for axis, (name, values_LE) in zip(axes, panels.items(), strict=False):
        image = axis.imshow(values_LE, vmin=-largest, vmax=largest, cmap="RdBu_r", aspect="auto")
        axis.set_title(name, fontsize="small")
        axis.set_xlabel("expert")
        axis.set_ylabel("layer")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.yaxis.get_major_locator().set_params(integer=True)
        if num_experts <= _TICKS:
            axis.set_xticks(range(num_experts))
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    figure.colorbar(image, ax=axes, label=unit)
    choose_fonts(figure)
    figure.savefig(path)


def save_matrices(path: Path, matrices: NDArray[np.float64], limits: tuple[float, float], title: str) -> None:
    """Draw experts against experts, a panel a layer.

    Args:
        path: PNG to write.
        matrices: float64 ``[L, E, E]``.
        limits: Values of the darkest and the brightest colour.
        title: Over all panels.
    """
    columns = min(_PANELS_ACROSS, len(matrices))
    lines, side = -(-len(matrices) // columns), max(1.4, 0.03 * matrices.shape[1])
    figure, axes = _grid(lines, columns, 1.6 + side * columns, 0.8 + (side + 0.2) * lines)
    figure.suptitle(title, fontsize="small")
    for layer, (axis, values_EE) in enumerate(zip(axes, matrices, strict=False)):
        image = axis.imshow(values_EE, vmin=limits[0], vmax=limits[1], cmap="viridis")
        axis.set_title(f"layer {layer}", fontsize="x-small")
        axis.tick_params(labelsize="x-small")
    for axis in axes[len(matrices) :]:
        axis.set_axis_off()
    figure.colorbar(image, ax=axes)
    figure.supxlabel("expert", fontsize="small")
    figure.supylabel("expert", fontsize="small")
    figure.savefig(path)


def _grid(lines: int, columns: int, width: float, height: float) -> tuple[Any, Sequence[Any]]:
    """Make a figure that belongs to no window, and its panels in reading order."""
    # Its import takes a second.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    return figure, list(figure.subplots(lines, columns, squeeze=False).flat)


RANKED = 10
MODE_TITLES = {"mask": "masked", "zero": "zeroed"}


def write_importance(folder: Path, results: ExpertResults) -> str:
    """Write all tables and pictures.

    Args:
        folder: Folder to write to.
        results: Results of the whole study.

    Returns:
        The ranking.
    """
    write_csv(folder / "routing.csv", _routing_lines(results))
    write_csv(folder / "routing_layers.csv", _routing_layer_lines(results))
    write_csv(folder / "coactivation.csv", _pair_lines(results))
    write_csv(folder / "similarity.csv", _similarity_lines(results))
    _draw(folder, results)
    if not results.variants:
        write_csv(folder / "experts.csv", _saliency_lines(results))
        return saliency_ranking(results)
    intervals = results.intervals()
    write_csv(folder / "experts.csv", _expert_lines(results, intervals))
    write_csv(folder / "differences.csv", _difference_lines(results, intervals))
    _draw_changes(folder, results, intervals)
    return f"{ranking(results, intervals)}\n{saliency_ranking(results)}"


def saliency_ranking(results: ExpertResults) -> str:
    """Rank the experts of the most saliency in their layer, to each source."""
    blocks, counts_GLE = [], results.loads["load_counts"]
    for name, tokens_LE, saliency_LE, in_layer_LE in zip(
        results.names, counts_GLE, results.saliency(), results.saliency_in_layer(), strict=True
    ):
        lines = [["layer", "expert", "saliency", "over its layer's mean", "tokens"]]
        best = np.argsort(-in_layer_LE, axis=None, kind="stable")[:RANKED]
        for place in zip(*np.unravel_index(best, in_layer_LE.shape), strict=True):
            numbers = f"{saliency_LE[place]:.4g}", f"{in_layer_LE[place]:.3f}", str(tokens_LE[place])
            lines.append([*map(str, place), *numbers])
        title = f"saliency for {name} (REAP): mean over its tokens of router weight × norm of the expert's output"
        without = int((tokens_LE == 0).sum())
        end = f"{without} of {tokens_LE.size} experts have no token of {name}: their saliency is 0\n" if without else ""
        blocks.append(f"{title}\n{aligned(lines, left=())}\n{end}")
    return "\n".join(blocks)


def saliency_figures(results: ExpertResults) -> dict[str, dict[str, Any]]:
    """Return by source the number of experts without tokens, and how far saliency foretells the changes.

    Returns:
        ``experts_without_tokens``; and by mode ``rank_correlation_with_change``, Spearman's over the experts of a layer
        of saliency and change of bits per byte, the mean over the layers.
    """
    return {
        name: {
            "experts_without_tokens": int((counts_LE == 0).sum()),
            "rank_correlation_with_change": {
                mode: _rank_correlation(saliency_LE, _by_expert(part.changed_text_nats.sum(axis=1), mode, results))
                for mode in _modes(results)
            },
        }
        for name, part, counts_LE, saliency_LE in zip(
            results.names, results.documents, results.loads["load_counts"], results.saliency(), strict=True
        )
    }


def _rank_correlation(one_LE: NDArray[np.float64], other_LE: NDArray[np.float64]) -> float:
    pairs = zip(torch.from_numpy(one_LE), torch.from_numpy(other_LE), strict=True)
    return float(torch.stack([spearman_corrcoef(*pair) for pair in pairs]).mean())


def _modes(results: ExpertResults) -> list[str]:
    return [mode for mode in MODES if any(variant.mode == mode for variant in results.variants)]


def ranking(results: ExpertResults, intervals: Intervals) -> str:
    """Rank the experts that matter most, to each source, and to one source more than to another."""
    blocks = []
    for mode in dict.fromkeys(variant.mode for variant in results.variants):
        for source, name in enumerate(results.names):
            title = f"bits per byte of {name} without an expert ({mode})"
            blocks.append(_table(title, mode, results, intervals.of(source)))
        for source, other in combinations(range(len(results.names)), 2):
            pair = results.names[source], results.names[other]
            change = intervals.difference(source, other)
            blocks.append(_table(f"more for {pair[0]} than for {pair[1]} ({mode})", mode, results, change))
            opposite = intervals.difference(other, source)
            blocks.append(_table(f"more for {pair[1]} than for {pair[0]} ({mode})", mode, results, opposite))
    return "\n".join(blocks)


def _table(title: str, mode: str, results: ExpertResults, change: Change) -> str:
    places = results.places()
    mine = [place for place, (_, variant) in enumerate(places) if variant.mode == mode]
    best = sorted(mine, key=lambda place: -change.bits_per_byte[place])[:RANKED]
    lines = [["layer", "expert", "change", "95 % of documents drawn again"]]
    for place in best:
        layer, variant = places[place]
        interval = f"{change.low[place]:+.4f} to {change.high[place]:+.4f}"
        interval = "(one document)" if math.isnan(change.low[place]) else interval
        lines.append([str(layer), str(variant.expert), f"{change.bits_per_byte[place]:+.4f}", interval])
    return f"{title}\n{aligned(lines, left=(3,))}\n"


def _expert_lines(results: ExpertResults, intervals: Intervals) -> Iterator[dict[str, Any]]:
    changes = [intervals.of(source) for source in range(len(results.names))]
    base, use = results.base_figures(), _Use(results)
    for place, (layer, variant) in enumerate(results.places()):
        for source, name in enumerate(results.names):
            part, before = results.documents[source], float(base[name]["bits_per_byte"])
            change = float(changes[source].bits_per_byte[place])
            yield {
                "layer": layer,
                "expert": variant.expert,
                "mode": variant.mode,
                "source": name,
                "nll_change_nats_per_token": float(part.changed_nats[place].sum() / part.tokens.sum()),
                "bits_per_byte_base": before,
                "bits_per_byte_disabled": before + change,
                "bits_per_byte_change": change,
                "change_low_95": float(changes[source].low[place]),
                "change_high_95": float(changes[source].high[place]),
                **use.of(source, layer, variant.expert),
            }


def _saliency_lines(results: ExpertResults) -> Iterator[dict[str, Any]]:
    use = _Use(results)
    for layer, expert, source in np.ndindex(results.num_layers, results.weight_cosines.shape[1], len(results.names)):
        line = {"layer": layer, "expert": expert, "mode": "saliency", "source": results.names[source]}
        yield line | use.of(source, layer, expert)


class _Use:
    """How a source uses each expert, as columns of ``experts.csv``."""

    def __init__(self, results: ExpertResults) -> None:
        self._counts_GLE, self._tokens_GL = results.loads["load_counts"], results.loads["load_tokens"]
        self._saliency_GLE, self._in_layer_GLE = results.saliency(), results.saliency_in_layer()

    def of(self, source: int, layer: int, expert: int) -> dict[str, float | int]:
        place = source, layer, expert
        return {
            "tokens": int(self._counts_GLE[place]),
            "share_of_tokens": float(self._counts_GLE[place] / self._tokens_GL[source, layer]),
            "saliency": float(self._saliency_GLE[place]),
            "saliency_over_layer_mean": float(self._in_layer_GLE[place]),
        }


def _difference_lines(results: ExpertResults, intervals: Intervals) -> Iterator[dict[str, Any]]:
    for source, other in combinations(range(len(results.names)), 2):
        change = intervals.difference(source, other)
        is_clear = change.is_clear()
        for place, (layer, variant) in enumerate(results.places()):
            yield {
                "layer": layer,
                "expert": variant.expert,
                "mode": variant.mode,
                "source": results.names[source],
                "other_source": results.names[other],
                "difference_of_changes": float(change.bits_per_byte[place]),
                "difference_low_95": float(change.low[place]),
                "difference_high_95": float(change.high[place]),
                "interval_excludes_0": int(is_clear[place]),
            }


def _routing_lines(results: ExpertResults) -> Iterator[dict[str, Any]]:
    share_GLE = shares(torch.from_numpy(results.loads["load_counts"])).numpy()
    for (source, layer, expert), tokens in np.ndenumerate(results.loads["load_counts"]):
        share = float(share_GLE[source, layer, expert])
        yield {
            "source": results.names[source],
            "layer": layer,
            "expert": expert,
            "tokens": int(tokens),
            "share_of_choices": share,
        }


def _routing_layer_lines(results: ExpertResults) -> Iterator[dict[str, Any]]:
    counts_GLE, tokens_GL = (torch.from_numpy(results.loads[name]) for name in ("load_counts", "load_tokens"))
    apart_L = (
        jensen_shannon_bits(shares(counts_GLE)) if len(results.names) > 1 else torch.full(tokens_GL.shape[1:], math.nan)
    )
    numbers = load_numbers(counts_GLE)
    columns = {
        "router_entropy_nats": torch.from_numpy(results.loads["load_entropy_nats"]) / tokens_GL,
        "router_confidence": torch.from_numpy(results.loads["load_confidence"]) / tokens_GL,
        **{name: numbers[name] for name in ("imbalance_max_over_mean", "effective_experts", "dead_expert_fraction")},
        "divergence_of_sources_bits": apart_L.expand_as(tokens_GL),
    }
    for (source, layer), tokens in np.ndenumerate(tokens_GL.numpy()):
        line = {"source": results.names[source], "layer": layer, "tokens": int(tokens)}
        yield line | {name: float(column[source, layer]) for name, column in columns.items()}


def _pair_lines(results: ExpertResults) -> Iterator[dict[str, Any]]:
    """Yield pairs of experts that tokens chose together; ``lift`` is 1 where they are chosen independently."""
    pairs, tokens = results.loads["pairs"], results.loads["load_tokens"]
    for source, layer in np.ndindex(*tokens.shape):
        chosen_EE, total = pairs[source, layer], int(tokens[source, layer])
        for first, second in combinations(range(len(chosen_EE)), 2):
            together, expected = int(chosen_EE[first, second]), chosen_EE[first, first] * chosen_EE[second, second]
            yield {
                "source": results.names[source],
                "layer": layer,
                "expert": first,
                "other_expert": second,
                "tokens": together,
                "share_of_tokens": together / total,
                "lift": together * total / float(expected) if expected else math.nan,
            }


def _similarity_lines(results: ExpertResults) -> Iterator[dict[str, Any]]:
    experts = range(results.weight_cosines.shape[1])
    columns = {"weight_cosine": results.weight_cosines}
    if results.output_cosines is not None:
        columns["output_cosine"] = results.output_cosines
    for layer in range(results.num_layers):
        for first, second in combinations(experts, 2):
            line = {"layer": layer, "expert": first, "other_expert": second}
            yield line | {name: float(cosines[layer, first, second]) for name, cosines in columns.items()}


def _draw_changes(folder: Path, results: ExpertResults, intervals: Intervals) -> None:
    panels: dict[str, NDArray[np.float64]] = {}
    modes = _modes(results)
    for mode in modes:
        named = {name: intervals.of(source) for source, name in enumerate(results.names)}
        named |= {
            f"{results.names[one]} − {results.names[other]}": intervals.difference(one, other)
            for one, other in combinations(range(len(results.names)), 2)
        }
        for name, change in named.items():
            panels[f"{name}, {MODE_TITLES[mode]}"] = _by_expert(change.bits_per_byte, mode, results)
    columns = len(panels) // len(modes)
    save_heatmaps(folder / "experts.png", panels, columns, "what a disabled expert adds to the bits per byte")


def _draw(folder: Path, results: ExpertResults) -> None:
    panels = {
        name: in_layer_LE - 1 for name, in_layer_LE in zip(results.names, results.saliency_in_layer(), strict=True)
    }
    save_heatmaps(
        folder / "saliency.png", panels, len(panels), "saliency (REAP) of each expert", "over its layer's mean, less 1"
    )
    pictures: Sequence[tuple[str, NDArray[np.float64] | None, tuple[float, float], str]] = (
        ("weight_similarity.png", results.weight_cosines, (0.0, 1.0), "cosine of the experts' weights"),
        ("output_similarity.png", results.output_cosines, (0.0, 1.0), "cosine of the experts' outputs, same tokens"),
        (
            "coactivation.png",
            _together(results),
            (0.0, 1.0),
            "share of an expert's tokens (down) that also chose another",
        ),
    )
    for name, matrices, limits, title in pictures:
        if matrices is not None:
            save_matrices(folder / name, matrices, limits, title)


def _by_expert(change: NDArray[np.float64], mode: str, results: ExpertResults) -> NDArray[np.float64]:
    """Return the variants of one mode, ``[L, E]``."""
    of_mode = [place for place, variant in enumerate(results.variants) if variant.mode == mode]
    return change.reshape(results.num_layers, -1)[:, of_mode]


def _together(results: ExpertResults) -> NDArray[np.float64]:
    """Return the share of each expert's tokens, of all sources, that also chose another, ``[L, E, E]``."""
    pairs_LEE = results.loads["pairs"].sum(axis=0).astype(np.float64)
    alone_LE1 = np.diagonal(pairs_LEE, axis1=1, axis2=2)[:, :, None]
    together: NDArray[np.float64] = pairs_LEE / np.maximum(alone_LE1, 1.0)
    return together
