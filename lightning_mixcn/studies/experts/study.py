"""Disable every expert in turn, over texts and over questions, and write what came of it."""

import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import nn
from tqdm.auto import tqdm

from lightning_mixcn.data.loaders import EvaluationLoader
from lightning_mixcn.errors import UserError
from lightning_mixcn.files.atomic import new_folder
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
from .disabling import MODES, Mode, check_modes
from .importance import ExpertImportance
from .report import write_importance
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


def study_experts(
    src: str,
    folder: Path,
    text: StudyText,
    mode: Mode | Literal["both"],
    options: ModelOptions,
    tasks: Sequence[str],
    limit: float | None,
    num_fewshot: int | None,
    data_dir: str | None,
) -> None:
    """Disable every expert in turn and write what it costs; arguments as in the command ``experts``."""
    modes: tuple[Mode, ...] = MODES if mode == "both" else (mode,)
    found = find_model(src)
    config = model_config(found.base)
    check_modes(modes, config.num_local_experts, config.num_experts_per_tok)
    longest = text.check_context(config)
    documents = text.documents()
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
    cost, num_layers = _plan([*work, *asking], importance), importance.num_layers
    compute([*work, *asking], num_layers, parts)
    cosines = [weight_cosines(model, layer).numpy() for layer in tqdm(range(num_layers), "comparing weights", delay=1)]
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


def _plan(work: Sequence[BatchWork], importance: ExpertImportance) -> dict[str, Any]:
    """Say what the study costs, beside evaluating the model once for each expert."""
    cost = planned_flops(work)
    say(
        f"{importance.num_layers} layers × {len(importance.variants)} variants on {len(work)} batches: "
        f"{cost['planned']:.3g} FLOP planned, "
        f"{cost['planned'] / cost['plain']:.3f} of evaluating the model once for each"
    )
    return cost


def _finish(
    folder: Path,
    settings: dict[str, Any],
    results: ExpertResults,
    accuracies: Sequence[TaskAccuracy],
    shown: Sequence[str],
    cost: dict[str, Any],
) -> None:
    """Write the output, all of it in one step."""
    seconds, plain = cost.pop("seconds"), cost["plain"]
    flops = cost | {"planned_over_plain": cost["planned"] / plain, "done_over_plain": cost["done"] / plain}
    report = {"settings": settings, "base": results.base_figures(), "flops": flops, "seconds": seconds}
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
    done = f"{cost['done']:.3g} FLOP, {flops['done_over_plain']:.3f} of one evaluation for each"
    say(f"{folder}: {done}, in {seconds:.0f} s")
