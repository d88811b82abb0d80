"""Watch whether the model still reads long documents, while it trains."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypedDict

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_mixcn.arguments import Between, RowTokens, Seed, Steps, check_arguments
from lightning_mixcn.errors import UserError
from lightning_mixcn.files.atomic import new_file, write_text
from lightning_mixcn.model.inference.prefill import default_chunk
from lightning_mixcn.studies.figures import choose_fonts
from lightning_mixcn.studies.long_context.likelihood import (
    DocumentRow,
    LengthLikelihood,
    evaluate_lengths,
    longest_documents,
)
from lightning_mixcn.studies.long_context.retrieval import RETRIEVAL_TASKS, check_room, evaluate_retrieval
from lightning_mixcn.studies.tables import csv_text
from lightning_mixcn.text import (
    DocumentSet,
    Source,
    parse_sources,
)

from ..host import LONG_CONTEXT, causal_lm, log_figures
from .periodic import evaluation_documents
from .samples import run_tokenizer


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
            with new_file(self.folder / f"{name}.png", replace=True) as unfinished:
                figure.savefig(unfinished)
        return figures


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    if rows:
        write_text(path, csv_text(rows))


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
    before = " (red) and before" if len(evaluations) > 1 else ""
    title = f"perplexity by context length, step {evaluations[-1]['step']}{before}"
    figure.suptitle(title, fontsize="small")
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
    choose_fonts(figure)
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
    figure.suptitle(f"retrieval of a planted fact, step {step}", fontsize="small")
    panels = figure.subplots(1, len(tasks), squeeze=False, sharey=True)[0]
    for panel, (task, accuracy_DL) in zip(panels, tasks.items(), strict=True):
        image = panel.imshow(accuracy_DL, vmin=0.0, vmax=1.0, cmap="RdYlGn", aspect="auto")
        panel.set_title(task, fontsize="small")
        panel.set_xlabel("length in tokens")
        panel.set_xticks(range(len(lengths)), [str(length) for length in lengths], rotation=45, fontsize="x-small")
        panel.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths], fontsize="x-small")
    panels[0].set_ylabel("depth of the fact")
    figure.colorbar(image, ax=list(panels), label="share answered right")
    choose_fonts(figure)
    return figure


_LENGTHS = tuple(2**power for power in range(9, 18))  # 512 to 131,072
_DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


class LongContextEval(Callback):
    """Logs the likelihood of long documents by context length, and how well hidden statements are found again.

    Under ``long_context/``, ``<source>/nll_nats_per_token/<length>`` and ``<source>/bits_per_byte/<length>`` are of all
    documents cut to a length, ``<source>/bucket_nll_nats_per_token/<length>`` of the positions from the next shorter
    length on, and ``retrieval/<task>/<length>`` is the share of prompts answered right. Figures show perplexity against
    length, with the curves of earlier steps, and retrieval by depth and length. ``long_context/`` in the run's folder
    has the same as JSON, CSV and PNG. Rows are run in chunks over a key-value cache, so memory is that cache and a
    chunk's logits. Lengths that no document reaches are not logged; one that does not fit into memory is left out.

    Args:
        sources: Texts; null takes the validation documents of the data module.
        lengths: Context lengths in tokens, BOS included, also beyond the trained one; null is 512, 1024, …, 131072.
        documents: Documents of each source, those with most bytes first.
        chunk: Tokens of a forward pass; more are faster and take more memory; null is 4,096 on a GPU, which decodes
            all weights for each chunk, and 512 on the CPU.
        every_n_steps: Optimizer steps between evaluations, which also come before the first step and after the last;
            null evaluates whenever validation runs.
        retrieval: Facts to search for: any of passkey_zh, passkey_en, needle_zh, needle_en; none by default, since
            each takes a prefill for every length, depth and prompt.
        retrieval_lengths: Lengths of the prompts in tokens; null is those of `lengths`.
        retrieval_depths: Places of the statement, from 0, the beginning, to 1, the end; null is quarters.
        retrieval_prompts: Prompts of each task, length and depth, with other facts.
        seed: Seed of those facts; the random numbers of training are left alone.
    """

    run_files = (LONG_CONTEXT,)

    def __init__(
        self,
        sources: list[Source] | None = None,
        lengths: list[RowTokens] | None = None,
        documents: Annotated[int, Between(1, 10**6)] = 4,
        chunk: Annotated[int, Between(1, 2**20)] | None = None,
        every_n_steps: Steps | None = None,
        retrieval: list[str] | None = None,
        retrieval_lengths: list[RowTokens] | None = None,
        retrieval_depths: list[Annotated[float, Between(0, 1, "(0 is the beginning, 1 the end)")]] | None = None,
        retrieval_prompts: Annotated[int, Between(1, 10**6)] = 4,
        seed: Seed = 0,
    ) -> None:
        check_arguments(LongContextEval, locals())
        self.sources = None if sources is None else parse_sources(sources, "sources", Source)
        self.lengths = _ascending("lengths", lengths or list(_LENGTHS))
        self.retrieval_lengths = _ascending("retrieval_lengths", retrieval_lengths or self.lengths)
        self.retrieval, self.retrieval_depths = retrieval or [], retrieval_depths or list(_DEPTHS)
        for index, task in enumerate(self.retrieval):
            if task not in RETRIEVAL_TASKS:
                raise UserError(f"`retrieval[{index}]={task!r}`: expected one of {', '.join(RETRIEVAL_TASKS)}")
        self.documents, self.chunk, self.every_n_steps = documents, chunk, every_n_steps
        self.retrieval_prompts, self.seed = retrieval_prompts, seed
        self._sets: list[DocumentSet] = []
        self._rows: list[DocumentRow] | None = None
        self._report: LongContextReport | None = None
        self._evaluated_at: int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the documents, and refuse what could not work.

        Raises:
            FileNotFoundError: a source's path matches no file.
            ValueError: another kind of module, a data module without documents, or a prompt longer than its length.
        """
        module = causal_lm(self, pl_module)
        if stage not in ("fit", "validate"):
            return
        self._rows = self._report = None
        self._tokenizer = run_tokenizer(trainer, module)
        self._sets = evaluation_documents(self, trainer, self.sources)
        if self.retrieval:
            check_room(self._tokenizer, self.retrieval, self.retrieval_lengths[0], self.retrieval_prompts, self.seed)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate the start of a run; a resumed one goes on."""
        self._report = LongContextReport(_folder(trainer), after=trainer.global_step if trainer.global_step else -1)
        if self.every_n_steps is not None and trainer.global_step == 0:
            self._evaluate(trainer, pl_module, 0)
        self._evaluated_at = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Evaluate where a step is a multiple of ``every_n_steps``."""
        # Micro-batches of the next step still see this step's number.
        step = trainer.global_step
        if self.every_n_steps is not None and step % self.every_n_steps == 0 and step != self._evaluated_at:
            self._evaluate(trainer, pl_module, step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate the last step."""
        if self.every_n_steps is not None and trainer.global_step != self._evaluated_at:
            self._evaluate(trainer, pl_module, trainer.global_step)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate where validation is the occasion, and always in `validate`."""
        if trainer.state.fn == "validate":
            self._evaluate(trainer, pl_module, causal_lm(self, pl_module).steps_trained)
        elif self.every_n_steps is None and not trainer.sanity_checking:
            self._evaluate(trainer, pl_module, trainer.global_step)

    def _evaluate(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """Score on every rank; write on rank zero."""
        self._evaluated_at = step
        model = causal_lm(self, pl_module).model
        assert model is not None
        rank, num_ranks = trainer.global_rank, trainer.world_size
        if self._rows is None:
            self._rows = longest_documents(
                self._sets, self._tokenizer, documents=self.documents, max_tokens=self.lengths[-1],
                rank=rank, num_ranks=num_ranks,
            )  # fmt: skip
        names, chunk = [part.name for part in self._sets], self.chunk or default_chunk(pl_module.device)
        result = evaluate_lengths(model, self._rows, names, self.lengths, chunk)
        retrieval: Retrieval | None = None
        out_of_memory = list(result.out_of_memory)
        if self.retrieval:
            found = evaluate_retrieval(
                model, self._tokenizer, tasks=self.retrieval, lengths=self.retrieval_lengths,
                depths=self.retrieval_depths, prompts=self.retrieval_prompts, chunk=chunk, seed=self.seed,
                rank=rank, num_ranks=num_ranks,
            )  # fmt: skip
            accuracy = {task: share_DL.tolist() for task, share_DL in found.accuracy.items()}
            retrieval = {"lengths": found.lengths, "depths": self.retrieval_depths, "accuracy": accuracy}
            out_of_memory = sorted({*out_of_memory, *found.out_of_memory})
        if trainer.is_global_zero:
            evaluation: Evaluation = {
                "step": step,
                "likelihoods": result.likelihoods,
                "retrieval": retrieval if retrieval and retrieval["accuracy"] else None,
                "out_of_memory": out_of_memory,
            }
            self._write(trainer, evaluation)

    def _write(self, trainer: Trainer, evaluation: Evaluation) -> None:
        _tell(evaluation)
        self._report = self._report or LongContextReport(_folder(trainer))
        figures = self._report.add(evaluation)
        for logger in trainer.loggers:
            logger.log_metrics(tags(evaluation), step=evaluation["step"])
        log_figures(trainer, {f"long_context/{name}": figure for name, figure in figures.items()}, evaluation["step"])


def tags(evaluation: Evaluation) -> dict[str, float]:
    """Return the figures of an evaluation by TensorBoard tag."""
    values: dict[str, float] = {}
    for row in evaluation["likelihoods"]:
        for name in ("nll_nats_per_token", "bits_per_byte", "bucket_nll_nats_per_token"):
            value = row[name]
            if value is not None and row["bucket_tokens"]:
                values[f"long_context/{row['source']}/{name}/{row['length']}"] = value
    if (retrieval := evaluation["retrieval"]) is not None:
        for task, accuracy_DL in retrieval["accuracy"].items():
            for length, column in zip(retrieval["lengths"], zip(*accuracy_DL, strict=True), strict=True):
                values[f"long_context/retrieval/{task}/{length}"] = sum(column) / len(column)
    return values


def _tell(evaluation: Evaluation) -> None:
    """Report lengths that nothing, or not everything, came up to."""
    if evaluation["out_of_memory"]:
        rank_zero_warn(
            f"LongContextEval at step {evaluation['step']}: lengths {evaluation['out_of_memory']} do not fit into "
            "memory and were left out. Lower `chunk`, or leave them out of `lengths`"
        )
    for row in evaluation["likelihoods"]:
        if row["documents_in_full"] < row["documents"]:
            rank_zero_info(
                f"LongContextEval: {row['documents_in_full']} of {row['documents']} documents of {row['source']!r} "
                f"have {row['length']} tokens; the others were used up to their ends"
            )


def _ascending(name: str, lengths: Sequence[int]) -> list[int]:
    if len(set(lengths)) < len(lengths):
        raise UserError(f"`{name}={list(lengths)}`: expected different numbers of tokens")
    return sorted(lengths)


def _folder(trainer: Trainer) -> Path:
    return Path(trainer.default_root_dir, LONG_CONTEXT)
