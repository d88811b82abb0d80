"""Sections on what callbacks have watched: experts, long contexts, samples, benchmarks."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lightning_mixcn.callbacks.evaluation.long_context import (
    Evaluation,
    LongContextReport,
    perplexity_figure,
    retrieval_figure,
)
from lightning_mixcn.callbacks.expert_load.report import FIRST_NUMBERS, load_figure
from lightning_mixcn.callbacks.host import LONG_CONTEXT
from lightning_mixcn.errors import UserError
from lightning_mixcn.metrics.expert_load import shares
from lightning_mixcn.studies.benchmarks.report import with_error
from lightning_mixcn.studies.task_scores import metric_keys, standard_error

from .blocks import Block, Note, Picture, Pictures, PromptSamples, Samples, Section, Table, charts
from .charts import line_chart, picture
from .run_record import RunRecord, read_expert_loads

_EVENNESS = {
    "imbalance_max_over_mean": "imbalance: busiest expert over the mean",
    "dead_expert_fraction": "share of experts that no token chose",
    "routing_entropy": "routing entropy: 1 is all experts alike",
    "source_divergence_bits": "divergence between sources: bits",
    "side_divergence_bits": "divergence between sides of pairs: bits",
    "drift_bits": "drift from the first steps: bits",
}
_STAGES = {"base": "held-out text, before training", "val": "held-out text", "train": "training"}


def _experts(run: RunRecord) -> Section | None:
    """Draw each expert's share of the tokens, by source, and how even they are."""
    loads = read_expert_loads(run.root / "experts.csv")
    kept = [stage for stage in _STAGES if stage in loads and (stage != "train" or "val" not in loads)]
    pictures = []
    for stage in kept:
        when = f"{_STAGES[stage]}, step {loads[stage].step:,}"
        for source, counts in loads[stage].counts.items():
            if not counts.any():  # the check before training may have seen none of it
                continue
            # The name is in the caption, in the reader's fonts: this machine may lack its script.
            pictures.append(Picture(f"{source}: {when}", picture(load_figure({"": shares(counts)}, when))))
    drawn = [
        line_chart(
            _EVENNESS.get(name, name.replace("_", " ")),
            {
                label: run.scalars[tag]
                for label, tag in (("training", f"experts/{name}"), ("held-out text", f"experts/val/{name}"))
                if tag in run.scalars
            },
        )
        for name in FIRST_NUMBERS
    ]
    blocks: list[Block] = [Pictures(pictures)] if pictures else []
    blocks += charts(drawn)
    return Section("Expert load", blocks) if blocks else None


def _long_context(run: RunRecord) -> Section | None:
    """Draw likelihood by context length, and retrieval."""
    try:
        found = LongContextReport(run.root / LONG_CONTEXT).evaluations
        blocks = list(_long_context_blocks(found)) if found else []
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        name = str(run.root / LONG_CONTEXT / "long_context.json")
        raise UserError(f"{name!r} is not what LongContextEval writes. Delete it, or copy it again") from error
    return Section("Long contexts", blocks) if blocks else None


def _long_context_blocks(found: Sequence[Evaluation]) -> Iterator[Block]:
    names = list(dict.fromkeys(row["source"] for row in found[-1]["likelihoods"]))
    pictures = []
    for name in names:
        of_source = [{**each, "likelihoods": _unnamed_rows(each, name)} for each in found]
        kept: Any = [each for each in of_source if each["likelihoods"]]
        pictures.append(Picture(f"{name}: perplexity by context length", picture(perplexity_figure(kept))))
    retrieval = next((each for each in reversed(found) if each["retrieval"] is not None), None)
    if retrieval is not None and retrieval["retrieval"] is not None:
        figure = retrieval_figure(retrieval["retrieval"], retrieval["step"])
        pictures.append(Picture("facts that were planted, and found again", picture(figure)))
    yield Pictures(pictures)
    lengths = sorted({row["length"] for row in found[-1]["likelihoods"]})
    by_place = {(row["source"], row["length"]): row for row in found[-1]["likelihoods"]}
    rows = []
    for name in names:
        cells = [by_place.get((name, length)) for length in lengths]
        values = [row["bits_per_byte"] if row and row["bucket_tokens"] else None for row in cells]
        rows.append([name, *("–" if value is None else f"{value:.4f}" for value in values)])
    head = ["tokens of context", *(f"{length:,}" for length in lengths)]
    yield Table(head, rows, note=f"Bits per byte of the longest held-out documents, step {found[-1]['step']:,}.")


def _unnamed_rows(evaluation: Evaluation, source: str) -> list[Any]:
    """Return the rows of a source, whose name is in the caption alone."""
    return [{**row, "source": ""} for row in evaluation["likelihoods"] if row["source"] == source]


_MOST_STEPS, _MOST_PROMPTS = 4, 16


def _samples(run: RunRecord) -> Section | None:
    """Show continuations and answers of a few steps side by side."""
    blocks: list[Block] = []
    for file, prompt, text in (("samples.jsonl", "prompt", "continuation"), ("answers.jsonl", "question", "answer")):
        by_prompt: dict[str, dict[int, str]] = {}
        for entry in run.records(file):
            by_prompt.setdefault(str(entry.get(prompt)), {})[entry["step"]] = str(entry.get(text))
        steps = _spread(sorted({step for texts in by_prompt.values() for step in texts}))
        if shown := [
            PromptSamples(asked, {step: texts[step] for step in steps if step in texts})
            for asked, texts in list(by_prompt.items())[:_MOST_PROMPTS]
        ]:
            blocks.append(Samples(shown))
        if left := len(by_prompt) - len(shown):
            blocks.append(Note(f"{left:,} more prompts are in {file}."))
    return Section("Samples", blocks) if blocks else None


def _spread(steps: Sequence[int]) -> list[int]:
    """Choose the first, the last, and some between."""
    last = len(steps) - 1
    return sorted({steps[round(last * part / (_MOST_STEPS - 1))] for part in range(_MOST_STEPS)}) if steps else []


def _benchmarks(run: RunRecord) -> Section | None:
    """Compare benchmarks and probes of the first and the last evaluation."""
    blocks = [block for block in (_tasks(run), _few_shot(run)) if block is not None]
    return Section("Benchmarks", blocks) if blocks else None


def _tasks(run: RunRecord) -> Table | None:
    records = _first_and_last(run.records("benchmarks.jsonl"), "tasks")
    if not records:
        return None
    rows = []
    for task, metrics in records[-1]["tasks"].items():
        for metric, answer in metric_keys(metrics):
            cells = [_score(each["tasks"].get(task), metric, answer) for each in records]
            rows.append([task, metric if answer == "none" else f"{metric} ({answer})", *cells])
    head = ["task", "metric", *(f"step {each['step']:,}" for each in records)]
    return Table(head, rows, texts=[1], note="± is the standard error of lm-evaluation-harness.")


def _score(metrics: Any, metric: str, answer: str) -> str:
    value = metrics.get(f"{metric},{answer}") if isinstance(metrics, Mapping) else None
    return with_error(float(value), standard_error(metrics, metric, answer)) if isinstance(value, int | float) else "–"


def _few_shot(run: RunRecord) -> Table | None:
    records = _first_and_last(run.records("few_shot.jsonl"), "sources")
    if not records:
        return None
    rows = [
        [source, kind, *(_accuracy(each["sources"], source, kind) for each in records)]
        for source, kinds in records[-1]["sources"].items()
        for kind in kinds
    ]
    head = ["labels that the prompt tells", "snippet", *(f"step {each['step']:,}" for each in records)]
    return Table(head, rows, texts=[1], note="Share of right answers, with 95 % intervals.")


def _accuracy(sources: Mapping[str, Any], source: str, kind: str) -> str:
    found = (sources.get(source) or {}).get(kind) or {}
    values: list[Any] = [found.get(name) for name in ("accuracy", "low", "high")]
    return "{:.3f} ({:.3f} to {:.3f})".format(*values) if all(isinstance(each, float) for each in values) else "–"


def _first_and_last(records: Sequence[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    kept = [each for each in records if isinstance(each.get(key), Mapping)]
    return [kept[0], kept[-1]] if len(kept) > 1 else kept


WATCHED: Sequence[Any] = (_experts, _long_context, _samples, _benchmarks)
