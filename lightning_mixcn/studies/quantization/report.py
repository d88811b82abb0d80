"""The report on formats as JSON, CSV, Markdown and a figure."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_mixcn.studies.figures import choose_fonts
from lightning_mixcn.studies.tables import markdown_table, write_csv

from .weights import Sizes

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class SourceSums:
    """The documents of a source under one format.

    Args:
        text_nats: float64 ``[D]``, of text alone.
        bytes: int64 ``[D]``, UTF-8 bytes of text.
    """

    text_nats: NDArray[np.float64]
    bytes: NDArray[np.int64]

    @classmethod
    def of(cls, source: int, parts: Sequence[Arrays]) -> "SourceSums":
        """Add up the pieces of each document, which batches may share.

        Args:
            source: Number of the source.
            parts: `score_documents` of each batch.
        """
        mine = [part["source"] == source for part in parts]
        document_P = np.concatenate([part["document"][chosen] for part, chosen in zip(parts, mine, strict=True)])
        _, place_P = np.unique(document_P, return_inverse=True)

        def total(name: str) -> NDArray[Any]:
            values_P = np.concatenate([part[name][chosen] for part, chosen in zip(parts, mine, strict=True)])
            return np.bincount(place_P, weights=values_P)

        return cls(total("text_nats"), total("bytes").astype(np.int64))

    def bits_per_byte(self) -> float:
        """Return the figure of all documents together."""
        return float(self.text_nats.sum() / math.log(2) / self.bytes.sum())

    def difference(self, base: "SourceSums") -> tuple[float, float]:
        """Return bits per byte less those of another format, and its standard error over documents, which are paired.

        The error is that of a ratio of sums (Cochran, Sampling Techniques, 1977, 6.3): NaN for fewer than two
        documents.
        """
        bits_D = (self.text_nats - base.text_nats) / math.log(2)
        change, documents = float(bits_D.sum() / self.bytes.sum()), len(bits_D)
        if documents < 2:
            return change, math.nan
        residual_D = bits_D - change * self.bytes
        variance = documents / (documents - 1) * float((residual_D**2).sum())
        return change, math.sqrt(variance) / float(self.bytes.sum())


@dataclass(frozen=True)
class FormatResult:
    """One line of the report.

    Args:
        name: Name of the format.
        size: Bytes: of the weights in memory, computed where nothing stores them so, or of the file.
        size_of: ``memory``, ``computed`` or ``file``.
        sizes: Sizes of the weights.
        relative_error: Relative error of the rounded weights.
        sources: The documents of each source, by its name.
    """

    name: str
    size: int
    size_of: str
    sizes: Sizes
    relative_error: float
    sources: Mapping[str, SourceSums]

    def figures(self, base: "FormatResult") -> dict[str, Any]:
        """Return all figures, as JSON has them."""
        sizes = self.sizes
        found: dict[str, Any] = {
            "format": self.name,
            "bytes": self.size,
            "bytes_of": self.size_of,
            "bits_per_quantised_weight": 8 * sizes.quantised_bytes / sizes.quantised_weights,
            "bits_per_weight": 8 * sizes.bytes / sizes.weights,
            "relative_weight_error": self.relative_error,
            "sources": {},
        }
        for name, sums in self.sources.items():
            change, error = sums.difference(base.sources[name])
            found["sources"][name] = {
                "bits_per_byte": sums.bits_per_byte(),
                "difference": change,
                "standard_error": None if math.isnan(error) or self is base else error,
                "documents": len(sums.bytes),
                "bytes_of_text": int(sums.bytes.sum()),
            }
        return found


REPORT, TABLE, FIGURE = "quantization.json", "quantization.md", "quantization.png"


def write_formats(folder: Path, settings: dict[str, Any], results: Sequence[FormatResult]) -> str:
    """Write everything.

    Args:
        folder: Folder to write to.
        settings: Settings of the study.
        results: Results of each format, the unquantised one first.

    Returns:
        The table in Markdown, which is in ``quantization.md``, too.
    """
    figures = [result.figures(results[0]) for result in results]
    content = json.dumps({"settings": settings, "formats": figures}, ensure_ascii=False, indent=1, allow_nan=False)
    (folder / REPORT).write_text(content + "\n", encoding="utf-8")
    write_csv(folder / "quantization.csv", _lines(figures))
    table = markdown(figures)
    (folder / TABLE).write_text(table, encoding="utf-8")
    save_figure(folder / FIGURE, figures)
    return table


def markdown(figures: Sequence[dict[str, Any]]) -> str:
    """Return a table: a line a format, two columns a source."""
    names = list(figures[0]["sources"])
    header = ["format", "bytes", "bits a quantised weight", "bits a weight", "weight error"]
    header += [column for name in names for column in (f"{name}, bits per byte", f"{name}, difference ± s. e.")]
    lines = [header]
    for of in figures:
        mark = "" if of["bytes_of"] == "memory" else f" ({of['bytes_of']})"
        line = [of["format"], f"{of['bytes']:,}{mark}", f"{of['bits_per_quantised_weight']:.4f}"]
        line += [f"{of['bits_per_weight']:.4f}", f"{of['relative_weight_error']:.4f}"]
        for name in names:
            source = of["sources"][name]
            line += [f"{source['bits_per_byte']:.4f}", _difference(source, is_base=of is figures[0])]
        lines.append(line)
    return markdown_table(lines) + "\n"


def save_figure(path: Path, figures: Sequence[dict[str, Any]]) -> None:
    """Draw what each format adds to the bits per byte of the unquantised one: a row a format, a colour a source.

    Bars are 1.96 paired standard errors to each side, where there are two documents or more.

    Args:
        path: PNG to write.
        figures: Figures of each format, the unquantised one first.
    """
    # Its import takes a second.
    from matplotlib.figure import Figure

    (base, *others), names = figures, list(figures[0]["sources"])
    height = 1.9 + len(others) * (0.25 + 0.22 * len(names))
    figure = Figure(figsize=(7.2, height), dpi=120, layout="constrained")
    of_base = f"{base['format']} ({base['bits_per_weight']:.2f} bits a weight)"
    figure.suptitle(
        f"What rounding the weights costs: bits per byte of text\nmore than with {of_base}", fontsize="medium"
    )
    axis = figure.subplots()
    for number, name in enumerate(names):
        sources = [of["sources"][name] for of in others]
        places = [row + 0.7 * ((number + 0.5) / len(names) - 0.5) for row in range(len(others))]
        axis.errorbar(
            [source["difference"] for source in sources],
            places,
            xerr=[1.96 * (source["standard_error"] or 0.0) for source in sources],
            fmt="o",
            capsize=3,
            label=f"{name}: {base['sources'][name]['bits_per_byte']:.4f}",
        )
        for source, place in zip(sources, places, strict=True):
            axis.annotate(
                f"{source['difference']:+.4f}", (source["difference"], place), xytext=(0, 5),
                textcoords="offset points", ha="center", fontsize="x-small",
            )  # fmt: skip
    axis.axvline(0, color="gray", linewidth=1)
    rows = [f"{of['format']}\n{of['bits_per_weight']:.2f} bits a weight" for of in others]
    axis.set_yticks(range(len(others)), rows)
    axis.set_ylim(len(others) - 0.4, -0.6)  # the first one on top
    axis.margins(x=0.12)
    axis.grid(axis="x", alpha=0.3)
    axis.set_xlabel("difference in bits per byte, less is better; bars are 95 %")
    figure.legend(
        title=f"text: bits per byte with {base['format']}", loc="outside lower center", ncols=4, fontsize="small"
    )
    choose_fonts(figure)
    figure.savefig(path)


def _lines(figures: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield a line for each format and source."""
    for of in figures:
        shared = {key: value for key, value in of.items() if key != "sources"}
        for name, source in of["sources"].items():
            yield {**shared, "source": name, **source}


def _difference(source: dict[str, Any], *, is_base: bool) -> str:
    if is_base:
        return "-"
    error = source["standard_error"]
    return f"{source['difference']:+.4f}" + ("" if error is None else f" ± {error:.4f}")
