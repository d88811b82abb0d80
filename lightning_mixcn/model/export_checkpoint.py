"""A merged model as a Hugging Face folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from .adapter_file import AdapterFile
from .export_base import Precision, open_base
from .export_config import exported_config
from .export_merge import Layout, MergedWeights
from .hub import local_folder
from .loading import torch_dtype
from .model_card import CARD_NAME, model_card
from .model_source import ModelSource
from .shard_writer import ShardWriter
from .tokenizer_files import generation_files, tokenizer_files

_ONTO = {
    "original": "the base's own high-precision weights",
    "dequantised": "the base's weights as 4 bits (NF4) round them",
}


@dataclass(frozen=True)
class MergeOptions:
    """How weights are merged and written; see `export`, whose arguments these are."""

    precision: Precision = "original"
    original: str | None = None
    dtype: str | None = None
    layout: Layout = "per-expert"
    max_shard_bytes: int = 1_000_000_000
    languages: list[str] | None = None


def export_checkpoint(found: ModelSource, src: str, out: Path, options: MergeOptions) -> None:
    """Write ``W + Σ s·B·A`` tensor by tensor, with tokenizer, chat template, generation config and a card.

    Args:
        found: The model.
        src: What the person named.
        out: Folder to make.
        options: How.
    """
    base, checkpoint = open_base(found, options.precision, options.original)
    adapters = [AdapterFile(path) for path in found.adapters]
    # A merged weight that came out of 4 bits has no 16-bit original: rounding it would be a change of its own.
    exact = "float32" if options.precision == "dequantised" else None
    dtype = None if (name := options.dtype or exact) is None else torch_dtype(name)
    merged = MergedWeights(base, adapters, options.layout, dtype)
    shape = {"vocab_size": merged.vocab_size, "tie_word_embeddings": base.config.tie_word_embeddings}
    extended = checkpoint.config | shape
    config = exported_config(extended, merged.dtype(next(iter(base.modules))))
    with ShardWriter(out, config, max_shard_bytes=options.max_shard_bytes) as writer:
        writer.require_free_bytes(merged.nbytes)
        tokenizer = local_folder(found.tokenizer)
        for file in [*tokenizer_files(tokenizer), *generation_files(tokenizer, checkpoint.path)]:
            writer.add_file(file)
        made = _made(adapters, options)
        card = model_card(found, src, made, "transformers", onto=options.precision, languages=options.languages)
        (writer.folder / CARD_NAME).write_text(card, encoding="utf-8")
        with tqdm(total=merged.nbytes, unit="B", unit_scale=True, desc="exporting", delay=1) as progress:
            for name, tensor in merged.tensors():
                writer.add(name, tensor)
                progress.update(tensor.nbytes)


def _made(adapters: Sequence[AdapterFile], options: MergeOptions) -> str:
    if not adapters:
        return f"A copy of {_ONTO[options.precision]}."
    what = f"{len(adapters)} low-rank adapter{'s' if len(adapters) > 1 else ''} (LoRA)"
    return f"{what} merged onto {_ONTO[options.precision]}, computed in float32."
