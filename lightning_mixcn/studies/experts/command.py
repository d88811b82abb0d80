"""The subcommand ``experts``: which experts does a model need, for which text and which questions?"""

import json
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from lightning_mixcn.data.loaders import EvaluationLoader, EvaluationSet
from lightning_mixcn.errors import UserError
from lightning_mixcn.files.atomic import new_folder
from lightning_mixcn.files.hub import local_folder
from lightning_mixcn.model.checkpoints.folder import Checkpoint
from lightning_mixcn.model.checkpoints.identity import ModelSource
from lightning_mixcn.model.checkpoints.reading import mixtral_config, torch_device
from lightning_mixcn.model.find import find_model, load_found
from lightning_mixcn.studies.models import fingerprint
from lightning_mixcn.studies.parts import StudyParts, check_settings
from lightning_mixcn.studies.task_files import BenchmarkFiles
from lightning_mixcn.studies.tasks import (
    Benchmarks,
    check_limit,
    load_benchmarks,
    require_harness,
    split_names,
)
from lightning_mixcn.studies.texts import named_path, read_documents
from lightning_mixcn.text import PlainText, load_tokenizer
from lightning_mixcn.text.corpus.sources import DocumentUnit

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
from .report import write_report
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
# jsonargparse takes `--option a b` only where the type is a plain list.
_NOTHING: list[str] = []


def experts(
    src: str,
    *,
    out: str,
    text: list[str],
    tasks: list[str] = _NOTHING,
    mode: Literal["mask", "zero", "both"] = "mask",
    max_tokens: int = 32_768,
    sequence_length: int = 2048,
    micro_batch_size: int = 1,
    text_key: str = "text",
    document_unit: DocumentUnit = "file",
    limit: float | None = None,
    num_fewshot: int | None = None,
    data_dir: str | None = None,
    quantization: str = "nf4",
    dtype: str = "bfloat16",
    device: str | None = None,
) -> None:
    """Disable every expert in turn: what does each cost in bits per byte and accuracy? It goes on where it was killed.

    Args:
        src: Hugging Face folder or hub id, 4-bit folder of `mixcn quantize`, run folder, or PEFT adapter folder.
        out: Folder to make: experts.csv (change of bits per byte of each expert and source, with a 95 % bootstrap
            interval over documents), differences.csv (between sources), accuracy.csv (change of accuracy of each expert
            and task), routing and co-activation and similarity of experts (.csv), pictures (.png), ranking.txt, and
            experts.json (settings, base figures, cost). Until it is whole, its parts are in the hidden folder
            .OUT.unfinished beside it.
        text: Sources, each as name=PATH, e.g. --text zh=data/zh.jsonl en=data/en: JSONL, text, parquet or Arrow; a
            file, a folder or a glob. Give several to compare languages, the one of interest first.
        tasks: Multiple choice of lm-evaluation-harness (extra `[eval]`), tasks or groups, e.g. ceval-valid: accuracy
            without each expert, judged by the harness. Prompts cost what as many tokens of text cost (see max_tokens):
            C-Eval's 1,346 questions of 700 tokens with 5 examples, 3.1e18 FLOP for each mode, 4.4 hours at 200 TFLOP/s.
            Choices that are one letter share their prompt; longer ones are a row each.
        mode: ``mask``, the expert cannot be chosen and another takes its place; ``zero``, its output is dropped, the
            other's weight stays; ``both``.
        max_tokens: Tokens of each source, in whole rows, at least one. The cost, for each mode, is about half of
            layers × experts forward passes over all tokens. Mixtral-8x7B (32 × 8, 26 GFLOP a token) over 2 sources of
            32,768 tokens: 65,536 × 256 × 26e9 / 2 = 2.2e17 FLOP, by arithmetic 18 minutes at 200 TFLOP/s. The plan is
            printed before work starts.
        sequence_length: Tokens of a row. Documents in it do not see each other; a longer one goes on in the next row.
        micro_batch_size: Rows at a time; a pass runs up to this times the number of experts together.
        text_key: JSONL key, or parquet or Arrow column, of the text.
        document_unit: What one document is in a text file: ``file``, ``line`` or ``blank-line``. Intervals need
            several documents.
        limit: Documents of each task, the first ones; less than 1 is a share of them.
        num_fewshot: Examples in a prompt of a task; null is each task's own number.
        data_dir: Folder with the tasks' data, as `mixcn evaluate` takes it; null takes it from the hub.
        quantization: ``nf4`` (4 bits) or ``none``.
        dtype: ``bfloat16``, ``float16`` or ``float32``; in 16 bits, changes below 0.001 are rounding.
        device: ``cuda``, ``cpu`` …; by default the GPU if there is one.

    Raises:
        ValueError: an option out of its range, text that cannot be used, or a task that is no multiple choice.
        FileNotFoundError: no such model, text or data.
        FileExistsError: the folder holds something else, or a study with other arguments.
        FloatingPointError: a likelihood is not finite.
    """
    _check_numbers(max_tokens, sequence_length, micro_batch_size)
    modes: tuple[Mode, ...] = MODES if mode == "both" else (mode,)
    found, folder = find_model(src), Path(out).expanduser()
    longest = _check_model(found, modes, sequence_length)
    documents = read_documents(text, text_key, document_unit)
    tokenizer = load_tokenizer(local_folder(found.tokenizer))
    encoder, place = PlainText(tokenizer), torch_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    settings: dict[str, Any] = {
        "src": src, **fingerprint(found), "tokenizer": encoder.fingerprint["tokenizer"],
        "text": dict(named_path(entry) for entry in text),
        "text_fingerprint": {part.name: part.corpus.fingerprint for part in documents},
        "mode": mode, "max_tokens": max_tokens, "sequence_length": sequence_length,
        "micro_batch_size": micro_batch_size, "document_unit": document_unit, "quantization": quantization,
        "dtype": dtype, "device": place.type,
        "benchmarks": _benchmark_settings(tasks, limit, num_fewshot, data_dir),
    }  # fmt: skip
    if _is_finished(folder, settings):
        return
    benchmarks = _benchmarks(tasks, num_fewshot, data_dir)
    parts = StudyParts(folder, settings)
    rows = EvaluationSet(documents, encoder, sequence_length, max(1, max_tokens // sequence_length))
    model = load_found(found, quantization=quantization, dtype=dtype, device=place)
    importance = ExpertImportance(model, modes, len(documents), micro_batch_size)
    work = text_work(importance, EvaluationLoader(rows, micro_batch_size, num_ranks=1, rank=0))
    asked = ExpertTasks.of(benchmarks, model, tokenizer, limit) if benchmarks else None
    asking = _request_work(asked, model, modes, longest, micro_batch_size) if asked else []
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


def _check_numbers(max_tokens: int, sequence_length: int, micro_batch_size: int) -> None:
    """Refuse sizes that are too small."""
    limits = {"max_tokens": (max_tokens, 2), "sequence_length": (sequence_length, 2)}
    for name, (value, least) in (limits | {"micro_batch_size": (micro_batch_size, 1)}).items():
        if value < least:
            raise UserError(f"`{name}={value}`: expected at least {least}")


def _check_model(found: ModelSource, modes: tuple[Mode, ...], sequence_length: int) -> int:
    """What can be told from the model's config, before any weight is read; how many tokens it reads."""
    config = mixtral_config(Checkpoint(found.base))
    check_modes(modes, config.num_local_experts, config.num_experts_per_tok)
    longest = min(config.max_position_embeddings, config.sliding_window or config.max_position_embeddings)
    if sequence_length > longest:
        raise UserError(f"`sequence_length={sequence_length}` is more than the model reads. Give at most {longest}")
    return longest


def _is_finished(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether this very study is there; its ranking is printed again."""
    if not (folder / _REPORT).is_file():
        return False
    report = json.loads((folder / _REPORT).read_text(encoding="utf-8"))
    check_settings(report.get("settings", {}), settings, folder)
    print((folder / _RANKING).read_text(encoding="utf-8"))
    _say(f"{folder} was finished before.")
    return True


def _benchmark_settings(
    tasks: Sequence[str], limit: float | None, num_fewshot: int | None, data_dir: str | None
) -> dict[str, Any] | None:
    """What accuracies depend on; ``None`` where no tasks are asked for."""
    given = {"limit": limit, "num_fewshot": num_fewshot, "data_dir": data_dir}
    if not tasks:
        if needless := [name for name, value in given.items() if value is not None]:
            raise UserError(f"`{needless[0]}` is for `tasks`, of which there are none. Leave it out, or give tasks")
        return None
    check_limit(limit)
    require_harness()
    return {"tasks": split_names(tasks), **given, "lm_eval": version("lm_eval")}


def _benchmarks(tasks: Sequence[str], num_fewshot: int | None, data_dir: str | None) -> Benchmarks | None:
    """The tasks and their data."""
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
        _say(f"{scores.prompts_cut} prompts are longer than the model reads, and lose their beginning")
    return request_work(scores)


def _plan(work: Sequence[BatchWork], importance: ExpertImportance) -> dict[str, Any]:
    """Say what the study costs, beside evaluating the model once for each expert."""
    cost = planned_flops(work)
    _say(
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
        table = write_report(unfinished, results)
        if accuracies:
            table += "\n" + write_accuracies(unfinished, accuracies, results.variants, shown)
        (unfinished / _RANKING).write_text(table, encoding="utf-8")
        content = json.dumps(report, ensure_ascii=False, indent=2, allow_nan=False)
        (unfinished / _REPORT).write_text(content + "\n", encoding="utf-8")
    print(table)
    done = f"{cost['done']:.3g} FLOP, {flops['done_over_plain']:.3f} of one evaluation for each"
    _say(f"{folder}: {done}, in {seconds:.0f} s")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
