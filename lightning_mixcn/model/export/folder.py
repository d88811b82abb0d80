"""Write a merged model as a Hugging Face folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from lightning_mixcn.model.architectures import architecture_named
from lightning_mixcn.model.checkpoints.reading import stock_settings, torch_dtype
from lightning_mixcn.model.checkpoints.writer import new_checkpoint
from lightning_mixcn.model.find import ModelSource
from lightning_mixcn.tokenizer.files import generation_files, tokenizer_files

from .card import CARD_NAME, model_card, scaling_note
from .instruct import InstructDelta
from .merge import (
    BaseWeights,
    Layout,
    MergedWeights,
    Precision,
    merge_base,
)

_SHARD_BYTES = 1_000_000_000
# A shard is held in memory, of which an instruct delta takes three of the largest tensor's and half a gigabyte.
_SMALL_SHARD_BYTES = 250_000_000
_DROPPED = ("_name_or_path", "torch_dtype")


def exported_config(config: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Return the base's configuration as that of an unquantised model in `dtype`.

    transformers 5 writes ``dtype``, ``rope_parameters`` and ``num_local_experts``; transformers 4, vLLM and llama.cpp
    read ``torch_dtype``, ``rope_theta`` and the published name of the latter, and would silently fall back to a
    default. Both are written.

    Args:
        config: Content of the base's ``config.json``.
        dtype: Dtype of the exported weights.
    """
    kept = {key: value for key, value in stock_settings(config).items() if key not in _DROPPED}
    name, architecture = str(dtype).removeprefix("torch."), architecture_named(kept["model_type"])
    kept |= {
        "architectures": [architecture.causal_lm.__name__],
        "dtype": name,
        "torch_dtype": name,
    }
    if "num_local_experts" in kept:
        kept.setdefault(architecture.expert_count, kept["num_local_experts"])
    rope = kept.get("rope_parameters") or {}
    if "rope_theta" in rope:
        kept.setdefault("rope_theta", rope["rope_theta"])
    if rope.get("rope_type", "default") != "default":
        kept.setdefault("rope_scaling", {key: value for key, value in rope.items() if key != "rope_theta"})
    return kept


_ONTO = {
    "original": "the base's own high-precision weights",
    "dequantised": "the base's weights as 4 bits (NF4) round them",
}


@dataclass(frozen=True)
class ExportOptions:
    """What is exported, and how; see `export`, whose arguments these are."""

    src: str
    format: str
    base: Precision = "original"
    original: str | None = None
    dtype: str | None = None
    layout: Layout = "per-expert"
    max_shard_bytes: int | None = None
    outtype: str | None = None
    llama_cpp: str | None = None
    languages: list[str] | None = None
    instruct_delta: str | None = None
    instruct_weight: float = 1.0


def export_checkpoint(found: ModelSource, out: Path, options: ExportOptions) -> None:
    """Write ``W + Σ s·B·A`` tensor by tensor, with tokenizer, chat template, generation config and a card.

    With `instruct_delta`, ``w·(W_instruct − W)`` is added (`instruct.py`), and these files are the instruct model's.

    Args:
        found: The model.
        out: Folder to make.
        options: Options of the export.
    """
    checkpoint = merge_base(found, options.base, options.original)
    base = BaseWeights(checkpoint, dequantised=options.base == "dequantised")
    # A merged weight that came out of 4 bits has no 16-bit original: rounding it would be a change of its own.
    exact = "float32" if options.base == "dequantised" else None
    dtype = None if (name := options.dtype or exact) is None else torch_dtype(name)
    instruct = None
    if options.instruct_delta is not None:
        weight = options.instruct_weight
        instruct = InstructDelta(options.instruct_delta, weight, checkpoint, base, found.tokenizer)
    merged = MergedWeights(base, found.adapters, options.layout, dtype, instruct)
    shape = {"vocab_size": merged.vocab_size, "tie_word_embeddings": base.config.tie_word_embeddings}
    settings = checkpoint.config if instruct is None else instruct.config  # the ids of tokens that end a text, too
    config = exported_config(settings | shape, merged.dtype(next(iter(base.modules))))
    max_shard_bytes = options.max_shard_bytes or (_SHARD_BYTES if instruct is None else _SMALL_SHARD_BYTES)
    with new_checkpoint(out, config, max_shard_bytes=max_shard_bytes) as writer:
        writer.require_free_bytes(merged.nbytes)
        if instruct is None:
            for file in [*tokenizer_files(found.tokenizer), *generation_files(found.tokenizer, checkpoint.path)]:
                writer.add_file(file)
        else:
            instruct.write_files(writer)
        made = _made(len(found.adapters), options.base) + scaling_note(found)
        added = "" if instruct is None else instruct.made
        card = model_card(
            found,
            options.src,
            made + added,
            "transformers",
            onto=options.base,
            languages=options.languages,
            instruct=None if instruct is None else instruct.name,
        )
        (writer.folder / CARD_NAME).write_text(card, encoding="utf-8")
        with tqdm(total=merged.nbytes, unit="B", unit_scale=True, desc="exporting", delay=1) as progress:
            for name, tensor in merged.tensors():
                writer.add(name, tensor)
                progress.update(tensor.nbytes)
                del tensor  # else it is held while the next one is made


def _made(num_adapters: int, base: Precision) -> str:
    if not num_adapters:
        return f"A copy of {_ONTO[base]}."
    what = f"{num_adapters} low-rank adapter{'s' if num_adapters > 1 else ''} (LoRA)"
    return f"{what} merged onto {_ONTO[base]}, computed in float32."
