"""What `LongContextEval` leaves in a run's folder: every evaluation of the run, as JSON, CSV and pictures.

Legend: D depths, L lengths.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from lightning_mixcn.studies import LengthLikelihood

from .finished_output import write_text


class Retrieval(TypedDict):
    """Accuracy of each task ``[D, L]``, as lists."""

    lengths: list[int]
    depths: list[float]
    accuracy: dict[str, list[list[float]]]


class Evaluation(TypedDict):
    """One evaluation: after how many optimizer steps, and what came out."""

    step: int
    likelihoods: list[LengthLikelihood]
    retrieval: Retrieval | None
    out_of_memory: list[int]


class LongContextReport:
    """The evaluations of a run, by optimizer step; they go on where the folder's JSON file ends.

    Args:
        folder: Where the files are.
        after: Steps of the run so far; what the file has of later ones, by a run that was resumed from before them,
            is forgotten. ``None`` keeps all.
    """

    def __init__(self, folder: Path, after: int | None = None) -> None:
        self.folder = folder
        self._evaluations: dict[int, Evaluation] = {}
        if (file := folder / "long_context.json").is_file():
            found: list[Evaluation] = json.loads(file.read_text(encoding="utf-8"))["evaluations"]
            self._evaluations = {entry["step"]: entry for entry in found if after is None or entry["step"] <= after}

    @property
    def evaluations(self) -> list[Evaluation]:
        """All evaluations by ascending step."""
        return [self._evaluations[step] for step in sorted(self._evaluations)]

    def add(self, evaluation: Evaluation) -> dict[str, Any]:
        """Take an evaluation in, replacing one of the same step, and write all files.

        Returns:
            The pictures by name, as `matplotlib.figure.Figure`: ``perplexity`` and ``retrieval``, where there are any.
        """
        self._evaluations[evaluation["step"]] = evaluation
        write_text(self.folder / "long_context.json", json.dumps({"evaluations": self.evaluations}, indent=1) + "\n")
        rows = [{"step": entry["step"], **row} for entry in self.evaluations for row in entry["likelihoods"]]
        _write_csv(self.folder / "long_context.csv", rows)
        figures: dict[str, Any] = {}
        if evaluation["likelihoods"]:
            figures["perplexity"] = perplexity_figure(self.evaluations)
        if evaluation["retrieval"] is not None:
            _write_csv(self.folder / "retrieval.csv", _retrieval_rows(self.evaluations))
            figures["retrieval"] = retrieval_figure(evaluation["retrieval"], evaluation["step"])
        for name, figure in figures.items():
            figure.savefig(self.folder / f"{name}.png")
        return figures


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    if rows:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(path, text.getvalue())


def _retrieval_rows(evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    return [
        {"step": entry["step"], "task": task, "depth": depth, "length": length, "accuracy": accuracy}
        for entry in evaluations
        if (found := entry["retrieval"]) is not None
        for task, accuracy_DL in found["accuracy"].items()
        for depth, accuracy_L in zip(found["depths"], accuracy_DL, strict=True)
        for length, accuracy in zip(found["lengths"], accuracy_L, strict=True)
    ]


def perplexity_figure(evaluations: Sequence[Evaluation]) -> Any:
    """Draw perplexity against context length: a panel for each source, a curve for each evaluation, the last in red.

    Lengths that no document reaches are left out.

    Returns:
        A `matplotlib.figure.Figure`, which belongs to no window.
    """
    # Takes a second, which only those wait for who draw.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sources = list(dict.fromkeys(row["source"] for row in evaluations[-1]["likelihoods"]))
    figure = Figure(figsize=(4.6 * len(sources), 3.6), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(sources), squeeze=False)[0]
    for panel, source in zip(panels, sources, strict=True):
        for age, entry in enumerate(reversed(evaluations)):
            rows = [row for row in entry["likelihoods"] if row["source"] == source and row["bucket_tokens"]]
            colour = "tab:red" if age == 0 else str(0.85 - 0.6 / age)  # earlier ones fade
            lengths, perplexities = [row["length"] for row in rows], [row["perplexity"] for row in rows]
            panel.plot(
                lengths, perplexities, "o-", color=colour, markersize=3, label=f"step {entry['step']}", zorder=-age
            )
        panel.set_xscale("log", base=2)
        panel.set_title(source, fontsize="small")
        panel.set_xlabel("context length in tokens")
        panel.grid(alpha=0.3)
        handles, labels = panel.get_legend_handles_labels()
        panel.legend(handles[:8], labels[:8], fontsize="x-small")
    panels[0].set_ylabel("perplexity")
    return figure


def retrieval_figure(retrieval: Retrieval, step: int) -> Any:
    """Draw accuracy as heatmaps: a panel for each task, depths down, lengths across.

    Returns:
        A `matplotlib.figure.Figure`, which belongs to no window.
    """
    # Takes a second, which only those wait for who draw.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks, lengths, depths = retrieval["accuracy"], retrieval["lengths"], retrieval["depths"]
    width, height = 1.6 + len(tasks) * (1.0 + 0.5 * len(lengths)), 1.6 + 0.4 * len(depths)
    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"retrieval accuracy, step {step}", fontsize="small")
    panels = figure.subplots(1, len(tasks), squeeze=False, sharey=True)[0]
    for panel, (task, accuracy_DL) in zip(panels, tasks.items(), strict=True):
        image = panel.imshow(accuracy_DL, vmin=0.0, vmax=1.0, cmap="RdYlGn", aspect="auto")
        panel.set_title(task, fontsize="small")
        panel.set_xlabel("length in tokens")
        panel.set_xticks(range(len(lengths)), [str(length) for length in lengths], rotation=45, fontsize="x-small")
        panel.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths], fontsize="x-small")
    panels[0].set_ylabel("depth")
    figure.colorbar(image, ax=list(panels))
    return figure
