"""Measure a model in every format of its weights, and keep what was measured."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lightning_mixcn.data.loaders import EvaluationLoader
from lightning_mixcn.errors import MissingFileError, NonFiniteError, UserError
from lightning_mixcn.files.atomic import new_folder
from lightning_mixcn.metrics import score_documents
from lightning_mixcn.model.checkpoints.folder import Checkpoint
from lightning_mixcn.model.checkpoints.reading import is_quantised, model_config, torch_dtype
from lightning_mixcn.model.export.folder import ExportOptions, export_checkpoint
from lightning_mixcn.model.export.merge import merge_base
from lightning_mixcn.model.find import ModelSource, find_model, load_found
from lightning_mixcn.model.options import chosen_device
from lightning_mixcn.studies.models import model_fingerprint
from lightning_mixcn.studies.parts import StudyParts, finished_before
from lightning_mixcn.studies.texts import StudyText
from lightning_mixcn.text import EvaluationSet, PlainText, load_tokenizer

from .gguf import GGUFFile, file_identity
from .report import REPORT, TABLE, FormatResult, SourceSums, write_formats
from .weights import (
    Sizes,
    relative_error,
    round_singly,
    rounded_entries,
    single_sizes,
    sizes_in_memory,
)

DOUBLE, SINGLE = "nf4-double", "nf4-single"
Score = Callable[[dict[str, Tensor]], Tensor]


def study_formats(
    src: str, folder: Path, text: StudyText, gguf: Sequence[str], dtype: str | None, device: str | None
) -> None:
    """Measure every format and write the tables; arguments as in the command ``quantization``."""
    found, base = _open(src)
    text.check_context(model_config(base))
    chosen, place = torch_dtype(dtype) if dtype else _own_dtype(base), chosen_device(device)
    documents = text.documents()
    encoder = PlainText(load_tokenizer(found.tokenizer))
    settings: dict[str, Any] = {
        "src": src, "base_sha256": base.sha256, "tokenizer": encoder.fingerprint["tokenizer"],
        "text": text.paths, "text_fingerprint": {part.name: part.corpus.fingerprint for part in documents},
        "gguf": [file_identity(path) for path in gguf], "max_tokens": text.max_tokens,
        "sequence_length": text.sequence_length, "micro_batch_size": text.micro_batch_size,
        "document_unit": text.document_unit, "dtype": _name(chosen), "device": place.type,
    }  # fmt: skip
    if found.adapters:
        settings["adapter_sha256"] = model_fingerprint(found)["adapter_sha256"]
    if finished_before(folder, REPORT, settings, table=TABLE):
        return
    parts = StudyParts(folder, settings)
    whole = _merged(found, src, parts) if found.adapters else found
    files = [GGUFFile(path, whole.base) for path in gguf]
    rows = EvaluationSet(documents, encoder, text.sequence_length, text.rows)
    study = _Study(whole, chosen, place, EvaluationLoader(rows, text.micro_batch_size, 1, 0), parts)
    names = [part.name for part in documents]
    results = [study.of_model(name, names) for name in (_name(chosen), DOUBLE, SINGLE)]
    results += [study.of_file(number, file, names, text.sequence_length) for number, file in enumerate(files)]
    with new_folder(folder) as unfinished:
        table = write_formats(unfinished, settings, results)
    parts.delete()
    print(table)


class _Study:
    """Measures format after format; what is kept is not measured again."""

    def __init__(
        self,
        found: ModelSource,
        dtype: torch.dtype,
        device: torch.device,
        loader: EvaluationLoader,
        parts: StudyParts,
    ) -> None:
        self._found, self._checkpoint, self._dtype, self._device = found, found.base, dtype, device
        self._loader, self._parts = loader, parts

    def of_model(self, name: str, sources: Sequence[str]) -> FormatResult:
        """Measure a format that this package computes with."""
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
        """Measure a GGUF file."""
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
        model = load_found(self._found, quantization=quantization, dtype=self._dtype, device=self._device)
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


def _open(src: str) -> tuple[ModelSource, Checkpoint]:
    """Return a model, and the unquantised checkpoint that it is, or that its adapter is merged onto."""
    found = find_model(src)
    model_config(found.base)
    if found.adapters:
        try:
            return found, merge_base(found, "original", None)
        except (FileNotFoundError, ValueError) as error:
            raise MissingFileError(
                f"`src={src!r}` was trained on 4 bits, and the unquantised base that its adapter is merged onto is not "
                "here. Merge it with `mixcn export --original FOLDER`, and give what that writes"
            ) from error
    if is_quantised(found.base):
        raise UserError(f"`src={src!r}` is in 4 bits, of which nothing unquantised is left. Give the original")
    return found, found.base


def _merged(found: ModelSource, src: str, parts: StudyParts) -> ModelSource:
    """Return the model with its adapter merged, as a checkpoint among the parts, which a resumed study finds there."""
    folder = parts.folder_of("merged")
    if not folder.is_dir():
        export_checkpoint(found, folder, ExportOptions(src, "hf"))
    return find_model(str(folder))


def _own_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """Return the type of its experts."""
    return checkpoint.dtype(rounded_entries(checkpoint)[-1].segments[0].name)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
