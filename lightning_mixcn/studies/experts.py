"""The subcommand ``experts``: which experts does a model need, for which text?"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from lightning_mixcn.data.evaluation_loader import EvaluationLoader, EvaluationSet
from lightning_mixcn.model.adapter_file import CONFIG_NAME, WEIGHTS_NAME
from lightning_mixcn.model.checkpoint import Checkpoint
from lightning_mixcn.model.hub import local_folder
from lightning_mixcn.model.identity import base_identity
from lightning_mixcn.model.loading import mixtral_config
from lightning_mixcn.model.model_source import ModelSource, find_model, load_found
from lightning_mixcn.model.output_path import new_folder
from lightning_mixcn.text import PlainText, load_tokenizer
from lightning_mixcn.text.sources import DocumentUnit

from .disabled_expert import MODES, Mode, check_modes
from .expert_flops import pairs_of_rows
from .expert_importance import ExpertImportance
from .expert_report import write_report
from .expert_results import BatchParts, ExpertResults
from .expert_similarity import weight_cosines
from .study_parts import StudyParts, check_settings
from .study_text import named_path, read_documents

_REPORT, _RANKING = "experts.json", "ranking.txt"


def experts(
    src: str,
    *,
    out: str,
    text: list[str],
    mode: Literal["mask", "zero", "both"] = "mask",
    max_tokens: int = 32_768,
    sequence_length: int = 2048,
    micro_batch_size: int = 1,
    text_key: str = "text",
    document_unit: DocumentUnit = "file",
    quantization: str = "nf4",
    dtype: str = "bfloat16",
    device: str | None = None,
) -> None:
    """Disable every expert in turn: what does each cost in bits per byte? It goes on where it was killed.

    Args:
        src: Hugging Face folder or hub id, 4-bit folder of `mixcn quantize`, run folder, or PEFT adapter folder.
        out: Folder to make: experts.csv (change of bits per byte of each expert and source, with a 95 % bootstrap
            interval over documents), differences.csv (between sources), routing and co-activation and similarity of
            experts (.csv), pictures (.png), ranking.txt, and experts.json (settings, base figures, cost). Until it is
            whole, its parts are in the hidden folder .OUT.unfinished beside it.
        text: Sources, each as name=PATH, e.g. --text zh=data/zh.jsonl en=data/en: JSONL, text, parquet or Arrow; a
            file, a folder or a glob. Give several to compare languages, the one of interest first.
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
        quantization: ``nf4`` (4 bits) or ``none``.
        dtype: ``bfloat16``, ``float16`` or ``float32``; in 16 bits, changes below 0.001 are rounding.
        device: ``cuda``, ``cpu`` …; by default the GPU if there is one.

    Raises:
        ValueError: an option out of its range, or text that cannot be used.
        FileNotFoundError: no such model or text.
        FileExistsError: the folder holds something else, or a study with other arguments.
        FloatingPointError: a likelihood is not finite.
    """
    _check_numbers(max_tokens, sequence_length, micro_batch_size)
    modes: tuple[Mode, ...] = MODES if mode == "both" else (mode,)
    found, folder = find_model(src), Path(out).expanduser()
    _check_model(found, modes, sequence_length)
    documents = read_documents(text, text_key, document_unit)
    encoder = PlainText(load_tokenizer(local_folder(found.tokenizer)))
    place = _device(device)
    settings: dict[str, Any] = {
        "src": src,
        "base_sha256": base_identity(found.base)["sha256"],
        "adapter_sha256": [_adapter_hash(adapter) for adapter in found.adapters],
        "tokenizer": encoder.fingerprint["tokenizer"],
        "text": dict(named_path(entry) for entry in text),
        "text_fingerprint": {part.name: part.corpus.fingerprint for part in documents},
        "mode": mode, "max_tokens": max_tokens, "sequence_length": sequence_length,
        "micro_batch_size": micro_batch_size, "document_unit": document_unit, "quantization": quantization,
        "dtype": dtype, "device": place.type,
    }  # fmt: skip
    if _is_finished(folder, settings):
        return
    parts = StudyParts(folder, settings)
    rows = EvaluationSet(documents, encoder, sequence_length, max(1, max_tokens // sequence_length))
    model = load_found(found, quantization=quantization, dtype=dtype, device=place)
    importance = ExpertImportance(model, modes, len(documents), micro_batch_size)
    loader = EvaluationLoader(rows, micro_batch_size, num_ranks=1, rank=0)
    cost = _plan(importance, loader)
    _compute(importance, loader, parts, cost["planned"])
    results = _put_together(importance, [part.name for part in documents], len(loader), model, parts)
    _finish(folder, settings, results, cost)
    parts.delete()


def _device(name: str | None) -> torch.device:
    try:
        return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"`device={name!r}` is not known. Expected cpu, cuda, cuda:1 …") from error


def _check_numbers(max_tokens: int, sequence_length: int, micro_batch_size: int) -> None:
    limits = {"max_tokens": (max_tokens, 2), "sequence_length": (sequence_length, 2)}
    for name, (value, least) in (limits | {"micro_batch_size": (micro_batch_size, 1)}).items():
        if value < least:
            raise ValueError(f"`{name}={value}`: expected at least {least}")


def _check_model(found: ModelSource, modes: tuple[Mode, ...], sequence_length: int) -> None:
    """What can be told from the model's config, before any weight is read."""
    config = mixtral_config(Checkpoint(found.base))
    check_modes(modes, config.num_local_experts, config.num_experts_per_tok)
    longest = min(config.max_position_embeddings, config.sliding_window or config.max_position_embeddings)
    if sequence_length > longest:
        raise ValueError(f"`sequence_length={sequence_length}` is more than the model reads. Give at most {longest}")


def _adapter_hash(adapter: str) -> str:
    digest = hashlib.sha256()
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        with (local_folder(adapter) / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _is_finished(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether this very study is there; its ranking is printed again."""
    if not (folder / _REPORT).is_file():
        return False
    report = json.loads((folder / _REPORT).read_text(encoding="utf-8"))
    check_settings(report.get("settings", {}), settings, folder)
    print((folder / _RANKING).read_text(encoding="utf-8"))
    _say(f"{folder} was finished before.")
    return True


def _plan(importance: ExpertImportance, loader: EvaluationLoader) -> dict[str, int]:
    """Floating point operations of the study, and of evaluating the model once for each expert."""
    cost = {"planned": 0, "plain": 0}
    for batch in loader:
        size = batch["input_ids"].numel(), sum(pairs_of_rows(batch["position_ids"]))
        cost["planned"] += importance.flops.planned(*size)
        cost["plain"] += importance.flops.plain(*size)
    share = cost["planned"] / cost["plain"]
    _say(
        f"{importance.num_layers} layers × {len(importance.variants)} variants on {len(loader)} batches: "
        f"{cost['planned']:.3g} FLOP planned, {share:.3f} of evaluating the model once for each"
    )
    return cost


def _compute(importance: ExpertImportance, loader: EvaluationLoader, parts: StudyParts, planned: int) -> None:
    """All parts that are not there yet."""
    layers = range(importance.num_layers)
    with tqdm(total=planned, unit="FLOP", unit_scale=True, desc="disabling experts") as progress:
        for number, batch in enumerate(loader):
            size = batch["input_ids"].numel(), sum(pairs_of_rows(batch["position_ids"]))
            if (name := f"batch{number}") not in parts:
                parts.save(name, importance.evaluate(batch))
            progress.update(importance.flops.base(*size))
            left = [layer for layer in layers if f"{name}_layer{layer}" not in parts]
            progress.update(sum(importance.flops.layer(layer, *size) for layer in layers if layer not in left))
            for layer, arrays in importance.disable(batch, parts.load(name), left):
                parts.save(f"{name}_layer{layer}", arrays)
                progress.update(importance.flops.layer(layer, *size))


def _put_together(
    importance: ExpertImportance, names: list[str], num_batches: int, model: nn.Module, parts: StudyParts
) -> ExpertResults:
    layers = range(importance.num_layers)
    batches = [
        BatchParts(parts.load(f"batch{number}"), [parts.load(f"batch{number}_layer{layer}") for layer in layers])
        for number in range(num_batches)
    ]
    cosines = [weight_cosines(model, layer).numpy() for layer in tqdm(layers, desc="comparing weights", delay=1)]
    return ExpertResults.of(names, importance.variants, batches, np.stack(cosines))


def _finish(folder: Path, settings: dict[str, Any], results: ExpertResults, cost: dict[str, int]) -> None:
    """Write the output, all of it in one step."""
    flops = cost | {
        "done": results.flops,
        "planned_over_plain": cost["planned"] / cost["plain"],
        "done_over_plain": results.flops / cost["plain"],
    }
    report = {"settings": settings, "base": results.base_figures(), "flops": flops, "seconds": results.seconds}
    with new_folder(folder) as unfinished:
        table = write_report(unfinished, results)
        content = json.dumps(report, ensure_ascii=False, indent=2, allow_nan=False)
        (unfinished / _REPORT).write_text(content + "\n", encoding="utf-8")
    print(table)
    done = f"{results.flops:.3g} FLOP, {flops['done_over_plain']:.3f} of one evaluation for each"
    _say(f"{folder}: {done}, in {results.seconds:.0f} s")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
