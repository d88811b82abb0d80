"""The subcommand ``quantization``: what does each way of storing a model's weights cost, in bytes and in likelihood?"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lightning_mixcn.data.loaders import EvaluationLoader, EvaluationSet
from lightning_mixcn.errors import NonFiniteError, UserError
from lightning_mixcn.files.atomic import new_folder
from lightning_mixcn.files.hub import local_folder
from lightning_mixcn.metrics import score_documents
from lightning_mixcn.model.checkpoints.folder import Checkpoint
from lightning_mixcn.model.checkpoints.identity import base_identity
from lightning_mixcn.model.checkpoints.reading import is_quantised, mixtral_config, torch_dtype
from lightning_mixcn.model.find import find_model, load_found
from lightning_mixcn.model.mixtral import meta_model
from lightning_mixcn.studies.parts import StudyParts, check_settings
from lightning_mixcn.studies.texts import named_path, read_documents
from lightning_mixcn.text import PlainText, load_tokenizer
from lightning_mixcn.text.corpus.sources import DocumentUnit

from .gguf import GGUFFile
from .report import REPORT, TABLE, FormatResult, SourceSums, write_report
from .weights import (
    Sizes,
    relative_error,
    round_singly,
    rounded_entries,
    single_sizes,
    sizes_in_memory,
)

DOUBLE, SINGLE = "nf4-double", "nf4-single"
_NOTHING: list[str] = []  # of lists that are only read
Score = Callable[[dict[str, Tensor]], Tensor]


def quantization(
    src: str,
    *,
    out: str,
    text: list[str],
    gguf: list[str] = _NOTHING,
    max_tokens: int = 32_768,
    sequence_length: int = 2048,
    micro_batch_size: int = 1,
    text_key: str = "text",
    document_unit: DocumentUnit = "file",
    dtype: str | None = None,
    device: str | None = None,
) -> None:
    """Compare formats of a model's weights: bytes, bits per weight, bits per byte. It goes on where it was killed.

    Formats: the checkpoint's own type; nf4-double, in which this package trains (8-bit block maxima); nf4-single
    (float32 block maxima, computed with but stored nowhere); and GGUF files. Documents and tokens are the same for all.

    Args:
        src: Unquantised Hugging Face folder or hub id; of a run, what `mixcn export` makes of it.
        out: Folder to make: quantization.json, .csv, .md and .png. Until it is whole, its parts are in the hidden
            folder .OUT.unfinished beside it.
        text: Sources, each as name=PATH, e.g. --text zh=data/zh.jsonl en=data/en: JSONL, text, parquet or Arrow; a
            file, a folder or a glob. Text that the model has not seen, in several documents.
        gguf: GGUF files of the same model (`mixcn export --format gguf`), scored by llama.cpp through the packages gguf
            and llama-cpp-python.
        max_tokens: Tokens of each source, in whole rows, at least one. The cost is, for each format, one forward pass
            over all tokens and two or three readings of the checkpoint. Mixtral-8x7B (26 GFLOP a token) over 2 sources
            of 32,768 tokens, 3 formats: 5e15 FLOP, by arithmetic 26 seconds at 200 TFLOP/s, beside reading 93 GB seven
            times. One model is in memory at a time; the largest is the unquantised one (93 GB).
        sequence_length: Tokens of a row. Documents in it do not see each other; a longer one goes on in the next row.
        micro_batch_size: Rows at a time.
        text_key: JSONL key, or parquet or Arrow column, of the text.
        document_unit: What one document is in a text file: ``file``, ``line`` or ``blank-line``. Standard errors need
            several documents.
        dtype: Compute type of all formats but GGUF, and that of the unquantised one: ``bfloat16``, ``float16`` or
            ``float32``; null takes the checkpoint's own.
        device: ``cuda``, ``cpu`` …; by default the GPU if there is one.

    Raises:
        ValueError: an option out of its range, a quantised model, an adapter, or text that cannot be used.
        FileNotFoundError: no such model, text or file.
        FileExistsError: the folder holds something else, or a study with other arguments.
        FloatingPointError: a likelihood is not finite.
    """
    checkpoint = _open(src)
    _check_numbers(checkpoint, max_tokens, sequence_length, micro_batch_size)
    chosen, place = torch_dtype(dtype) if dtype else _own_dtype(checkpoint), _device(device)
    files = [GGUFFile(path, checkpoint) for path in gguf]
    documents = read_documents(text, text_key, document_unit)
    encoder = PlainText(load_tokenizer(local_folder(src)))
    settings: dict[str, Any] = {
        "src": src, "base_sha256": base_identity(src)["sha256"], "tokenizer": encoder.fingerprint["tokenizer"],
        "text": dict(named_path(entry) for entry in text),
        "text_fingerprint": {part.name: part.corpus.fingerprint for part in documents},
        "gguf": [file.identity for file in files], "max_tokens": max_tokens, "sequence_length": sequence_length,
        "micro_batch_size": micro_batch_size, "document_unit": document_unit, "dtype": _name(chosen),
        "device": place.type,
    }  # fmt: skip
    folder = Path(out).expanduser().resolve()
    if _is_finished(folder, settings):
        return
    parts = StudyParts(folder, settings)
    rows = EvaluationSet(documents, encoder, sequence_length, max(1, max_tokens // sequence_length))
    study = _Study(src, checkpoint, chosen, place, EvaluationLoader(rows, micro_batch_size, 1, 0), parts)
    names = [part.name for part in documents]
    results = [study.of_model(name, names) for name in (_name(chosen), DOUBLE, SINGLE)]
    results += [study.of_file(number, file, names, sequence_length) for number, file in enumerate(files)]
    with new_folder(folder) as unfinished:
        table = write_report(unfinished, settings, results)
    parts.delete()
    print(table)


class _Study:
    """Measures format after format; what is kept is not measured again."""

    def __init__(
        self,
        src: str,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        loader: EvaluationLoader,
        parts: StudyParts,
    ) -> None:
        self._src, self._checkpoint, self._dtype, self._device = src, checkpoint, dtype, device
        self._loader, self._parts = loader, parts

    def of_model(self, name: str, sources: Sequence[str]) -> FormatResult:
        """A format that this package computes with."""
        if self._missing(name):
            model = self._load(name)
            if f"{name}_weights" not in self._parts:
                sizes = (single_sizes if name == SINGLE else sizes_in_memory)(model, self._checkpoint)
                self._keep_weights(name, sizes, relative_error(model, self._checkpoint, self._dtype))
            self._score(name, lambda batch: _nll(model, batch))
        sizes, error = self._weights(name)
        size_of = "computed" if name == SINGLE else "memory"
        return FormatResult(name, sizes.bytes, size_of, sizes, error, self._sums(name, sources))

    def of_file(self, number: int, file: GGUFFile, sources: Sequence[str], sequence_length: int) -> FormatResult:
        """A GGUF file."""
        part = f"gguf{number}"
        if f"{part}_weights" not in self._parts:
            self._keep_weights(part, file.sizes, file.relative_error())
        if self._missing(part):
            likelihood = file.open(sequence_length, use_gpu=self._device.type == "cuda")
            self._score(part, likelihood.nll)
            likelihood.close()
        sizes, error = self._weights(part)
        size = file.path.stat().st_size
        return FormatResult(file.path.name, size, "file", sizes, error, self._sums(part, sources))

    def _load(self, name: str) -> nn.Module:
        quantization = "nf4" if name == DOUBLE else "none"
        model = load_found(
            find_model(self._src), quantization=quantization, dtype=self._dtype, device=self._device
        )  # fmt: skip
        if name == SINGLE:
            round_singly(model, self._checkpoint)
        return model

    def _missing(self, name: str) -> bool:
        wanted = [f"{name}_weights", *(f"{name}_batch{number}" for number in range(len(self._loader)))]
        return any(part not in self._parts for part in wanted)

    def _score(self, name: str, nll: Score) -> None:
        for number, batch in enumerate(tqdm(self._loader, desc=name, unit="batch")):
            if (part := f"{name}_batch{number}") in self._parts:
                continue
            scores = score_documents(nll(batch), batch)
            if not bool(torch.isfinite(scores.nats).all()):
                raise NonFiniteError(f"The likelihood as {name} is not finite. Use `dtype` bfloat16 or float32")
            self._parts.save(part, {key: value.numpy() for key, value in scores._asdict().items()})

    def _keep_weights(self, name: str, sizes: Sizes, error: float) -> None:
        self._parts.save(f"{name}_weights", {"sizes": np.array(sizes), "relative_error": np.array(error)})

    def _weights(self, name: str) -> tuple[Sizes, float]:
        part = self._parts.load(f"{name}_weights")
        return Sizes(*map(int, part["sizes"])), float(part["relative_error"])

    def _sums(self, name: str, sources: Sequence[str]) -> dict[str, SourceSums]:
        parts = [self._parts.load(f"{name}_batch{number}") for number in range(len(self._loader))]
        return {source: SourceSums.of(number, parts) for number, source in enumerate(sources)}


@torch.no_grad()
def _nll(model: Any, batch: dict[str, Tensor]) -> Tensor:
    device = next(model.parameters()).device
    names = ("input_ids", "position_ids", "labels", "document_ids")
    inputs = {name: batch[name].to(device) for name in names}
    nll_BS: Tensor = model(**inputs, output_router_logits=False, use_cache=False).nll
    return nll_BS.cpu()


def _open(src: str) -> Checkpoint:
    if find_model(src).adapters:
        raise UserError(f"`src={src!r}` has an adapter. Give its base, or merge it with `mixcn export`")
    checkpoint = Checkpoint(src)
    mixtral_config(checkpoint)
    if is_quantised(checkpoint):
        raise UserError(f"`src={src!r}` is in 4 bits, of which nothing unquantised is left. Give the original")
    return checkpoint


def _own_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The type of its experts."""
    model = meta_model(mixtral_config(checkpoint), "none", torch.float32)
    return checkpoint.dtype(rounded_entries(model, checkpoint)[-1].segments[0].name)


def _check_numbers(checkpoint: Checkpoint, max_tokens: int, sequence_length: int, micro_batch_size: int) -> None:
    limits = {"max_tokens": (max_tokens, 2), "sequence_length": (sequence_length, 2)}
    for name, (value, least) in (limits | {"micro_batch_size": (micro_batch_size, 1)}).items():
        if value < least:
            raise UserError(f"`{name}={value}`: expected at least {least}")
    config = mixtral_config(checkpoint)
    longest = min(config.max_position_embeddings, config.sliding_window or config.max_position_embeddings)
    if sequence_length > longest:
        raise UserError(f"`sequence_length={sequence_length}` is more than the model reads. Give at most {longest}")


def _device(name: str | None) -> torch.device:
    try:
        return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UserError(f"`device={name!r}` is not known. Expected cpu, cuda, cuda:1 …") from error


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is_finished(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether this very study is there; its table is printed again."""
    if not (folder / REPORT).is_file():
        return False
    there = json.loads((folder / REPORT).read_text(encoding="utf-8")).get("settings", {})
    check_settings(there, settings, folder)
    print((folder / TABLE).read_text(encoding="utf-8"))
    print(f"{folder} was finished before.", file=sys.stderr, flush=True)
    return True
