"""Disable every expert in turn, over texts and over questions, and write what came of it."""

import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from lightning_mixcn.data.loaders import EvaluationLoader
from lightning_mixcn.errors import UserError
from lightning_mixcn.files.atomic import new_folder
from lightning_mixcn.metrics.device import PeakRate, peak_rate
from lightning_mixcn.model.checkpoints.reading import model_config
from lightning_mixcn.model.find import find_model
from lightning_mixcn.model.options import ModelOptions
from lightning_mixcn.studies.models import model_fingerprint
from lightning_mixcn.studies.parts import StudyParts, finished_before, say
from lightning_mixcn.studies.task_files import BenchmarkFiles
from lightning_mixcn.studies.tasks import (
    Benchmarks,
    check_limit,
    load_benchmarks,
    require_harness,
    split_names,
)
from lightning_mixcn.studies.texts import StudyText
from lightning_mixcn.text import EvaluationSet, PlainText, load_tokenizer

from .accuracy import (
    ExpertTasks,
    TaskAccuracy,
    base_accuracies,
    check_multiple_choice,
    task_accuracies,
    write_accuracies,
)
from .choose import MEASURES
from .disabling import MODES, Mode, check_modes
from .importance import ExpertImportance
from .options import ChoiceOptions
from .report import saliency_figures, write_importance
from .requests import RequestScores
from .statistics import weight_cosines
from .work import (
    BatchWork,
    ExpertResults,
    compute,
    finished,
    planned_flops,
    request_work,
    spent,
    text_work,
)

_REPORT, _RANKING = "experts.json", "ranking.txt"
_MODES: dict[str, tuple[Mode, ...]] = {"both": MODES, "saliency": (), **{mode: (mode,) for mode in MODES}}


def study_experts(
    src: str,
    folder: Path,
    text: StudyText,
    choice: ChoiceOptions,
    mode: Mode | Literal["both", "saliency"],
    options: ModelOptions,
    tasks: Sequence[str],
    limit: float | None,
    num_fewshot: int | None,
    data_dir: str | None,
) -> None:
    """Measure every expert's saliency, disable each in turn and write it; arguments as in the command ``experts``."""
    modes = _MODES[mode]
    if tasks and not modes:
        raise UserError(f"`tasks` need a disabled expert, but `mode={mode}` disables none. Use mode mask, zero or both")
    found = find_model(src)
    config = model_config(found.base)
    check_modes(modes, config.num_local_experts, config.num_experts_per_tok)
    longest = text.check_context(config)
    documents = text.documents()
    if choice.choose is not None:
        choice.sources(list(text.paths), config.num_local_experts, MEASURES if modes else MEASURES[1:])
    tokenizer = load_tokenizer(found.tokenizer)
    encoder, place = PlainText(tokenizer), options.torch_device()
    settings: dict[str, Any] = {
        "src": src, **model_fingerprint(found), "tokenizer": encoder.fingerprint["tokenizer"],
        "text": text.paths, "text_fingerprint": {part.name: part.corpus.fingerprint for part in documents},
        "mode": mode, "max_tokens": text.max_tokens, "sequence_length": text.sequence_length,
        "micro_batch_size": text.micro_batch_size, "document_unit": text.document_unit,
        "quantization": options.quantization, "dtype": options.dtype, "device": place.type,
        "benchmarks": _benchmark_settings(tasks, limit, num_fewshot, data_dir),
    }  # fmt: skip
    if finished_before(folder, _REPORT, settings, table=_RANKING):
        return
    benchmarks = _benchmarks(tasks, num_fewshot, data_dir)
    parts = StudyParts(folder, settings)
    rows = EvaluationSet(documents, encoder, text.sequence_length, text.rows)
    model = options.load(found)
    importance = ExpertImportance(model, modes, len(documents), text.micro_batch_size)
    work = text_work(importance, EvaluationLoader(rows, text.micro_batch_size, num_ranks=1, rank=0))
    asked = ExpertTasks.of(benchmarks, model, tokenizer, limit) if benchmarks else None
    asking = _request_work(asked, model, modes, longest, text.micro_batch_size) if asked else []
    cost = _plan(work, asking, importance, mode, peak_rate(place, getattr(torch, options.dtype)))
    num_layers = importance.num_layers if modes else 0
    compute([*work, *asking], num_layers, parts)
    layers = tqdm(range(importance.num_layers), "comparing weights", delay=1)
    cosines = [weight_cosines(model, layer).numpy() for layer in layers]
    read, answered = finished(work, num_layers, parts), finished(asking, num_layers, parts)
    results = ExpertResults.of([part.name for part in documents], importance.variants, read, np.stack(cosines))
    accuracies = task_accuracies(asked, answered) if asked else []
    cost |= spent([*read, *answered])
    shown = asked.shown if asked else []
    _finish(folder, settings, results, accuracies, shown, cost)
    parts.delete()


def _benchmark_settings(
    tasks: Sequence[str], limit: float | None, num_fewshot: int | None, data_dir: str | None
) -> dict[str, Any] | None:
    """Return what accuracies depend on; ``None`` where no tasks are asked for."""
    given = {"limit": limit, "num_fewshot": num_fewshot, "data_dir": data_dir}
    if not tasks:
        if needless := [name for name, value in given.items() if value is not None]:
            raise UserError(f"`{needless[0]}` is for `tasks`, of which there are none. Leave it out, or give tasks")
        return None
    check_limit(limit)
    require_harness()
    return {"tasks": split_names(tasks), **given, "lm_eval": version("lm_eval")}


def _benchmarks(tasks: Sequence[str], num_fewshot: int | None, data_dir: str | None) -> Benchmarks | None:
    """Load the tasks and their data."""
    if not tasks:
        return None
    files = BenchmarkFiles(data_dir) if data_dir else None
    benchmarks = load_benchmarks(split_names(tasks), num_fewshot=num_fewshot, files=files)
    check_multiple_choice(benchmarks)
    return benchmarks


def _request_work(
    asked: ExpertTasks, model: nn.Module, modes: Sequence[Mode], longest: int, micro_batch_size: int
) -> list[BatchWork]:
    scores = RequestScores(model, modes, asked.requests, longest, micro_batch_size)
    if scores.prompts_cut:
        say(f"{scores.prompts_cut} prompts are longer than the model reads, and lose their beginning")
    return request_work(scores)


def _plan(
    work: Sequence[BatchWork], asking: Sequence[BatchWork], importance: ExpertImportance, mode: str, peak: PeakRate
) -> dict[str, Any]:
    """Say what the study costs, in one line."""
    cost, rate = planned_flops([*work, *asking]), peak.flops_per_second
    tokens = f"{sum(batch.size[0] for batch in [*work, *asking]):,} tokens"
    source = "measured" if peak.measured else "stated by its maker"
    what, instead = f"1 forward pass over {tokens}", ""
    if importance.variants:
        passes = cost["planned"] / cost["forward_pass"]
        what = (
            f"{importance.num_layers} layers × {importance.num_experts} experts disabled over {tokens}, as much as "
            f"{passes:,.0f} forward passes"
        )
        instead = f". `--mode saliency` takes 1 over the text, {_amount(planned_flops(work)['forward_pass'], rate)}"
    at = f"at the device's peak of {rate / 1e12:.2f} TFLOP/s ({source})"
    say(f"mode {mode}: {what}, {_amount(cost['planned'], rate)} {at}{instead}")
    return cost


def _amount(flops: int, rate: float) -> str:
    """Return operations, and their time at a peak rate."""
    seconds = flops / rate
    units = ((86400, "days"), (3600, "hours"), (60, "minutes"), (0, "seconds"))
    size, unit = next((size, unit) for size, unit in units if seconds >= 2 * size)
    return f"{flops:.3g} FLOP, at least {seconds / (size or 1):.2g} {unit}"


def _finish(
    folder: Path,
    settings: dict[str, Any],
    results: ExpertResults,
    accuracies: Sequence[TaskAccuracy],
    shown: Sequence[str],
    cost: dict[str, Any],
) -> None:
    """Write the output, all of it in one step."""
    seconds = cost.pop("seconds")
    report = {
        "settings": settings,
        "base": results.base_figures(),
        "saliency": saliency_figures(results),
        "flops": cost,
        "seconds": seconds,
    }
    if accuracies:
        report["accuracies"] = base_accuracies(accuracies)
    with new_folder(folder) as unfinished:
        table = write_importance(unfinished, results)
        if accuracies:
            table += "\n" + write_accuracies(unfinished, accuracies, results.variants, shown)
        (unfinished / _RANKING).write_text(table, encoding="utf-8")
        content = json.dumps(report, ensure_ascii=False, indent=2, allow_nan=False)
        (unfinished / _REPORT).write_text(content + "\n", encoding="utf-8")
    print(table)
    passes = cost["done"] / cost["forward_pass"]
    say(f"{folder}: {cost['done']:.3g} FLOP, as much as {passes:,.1f} forward passes, in {seconds:.0f} s")
