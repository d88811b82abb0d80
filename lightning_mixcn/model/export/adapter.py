"""Write an adapter as a PEFT folder, in the layout of one kind of reader."""

import shutil
import sys
from pathlib import Path

from lightning_mixcn.errors import UserError
from lightning_mixcn.files.atomic import new_folder
from lightning_mixcn.model.checkpoints.identity import (
    IDENTITY_FILE,
    base_identity,
    stock_base,
    write_identity,
)
from lightning_mixcn.model.checkpoints.reading import model_config
from lightning_mixcn.model.find import ModelSource
from lightning_mixcn.model.lora.adapter_writer import write_adapter
from lightning_mixcn.tokenizer.files import generation_files, tokenizer_files

from .card import (
    CARD_NAME,
    base_shortcomings,
    model_card,
    resizing_note,
    scaling_note,
)
from .folder import ExportOptions

LAYOUTS = {
    "peft": "fused layout, which PEFT reads with transformers 5",
    "peft-per-expert": "per-expert layout, which PEFT, vLLM and llama.cpp read",
}


def export_adapter(found: ModelSource, out: Path, options: ExportOptions) -> None:
    """Write the adapter of a model, its tokenizer and a card.

    Args:
        found: The model; it has one adapter.
        out: Folder to make.
        options: Options of the export; the format is one of `LAYOUTS`.

    Raises:
        ValueError: no adapter, more than one, or one without factors.
        OSError: the disk is full.
    """
    if len(found.adapters) != 1:
        raise UserError(
            f"`format={options.format}` writes one adapter, but {options.src!r} gives {len(found.adapters)}. "
            "Give a run or an adapter folder, or merge with `--format hf`"
        )
    (adapter,) = found.adapters
    if not adapter.names:
        held = " but those that `layer_scale` reverts" if adapter.layer_scale else ", only embeddings"
        raise UserError(f"the adapter {adapter.name!r} holds no LoRA factors{held}. Merge it with `--format hf`")
    config = model_config(found.base)
    factors = {name: adapter.factors(name) for name in adapter.names}
    saved = {name: adapter.read_saved(name) for name in adapter.saved}
    rows = adapter.vocabulary_rows(tied=config.tie_word_embeddings)
    for line in base_shortcomings(found.base):
        print(line, file=sys.stderr)
    with new_folder(out) as folder:
        write_adapter(
            folder, factors, saved, config, stock_base(found.base),
            fused=options.format == "peft", start_rank=adapter.start_rank,
        )  # fmt: skip
        notes = resizing_note(rows, config.vocab_size) + scaling_note(found)
        made = f"A LoRA adapter in the {LAYOUTS[options.format]}.{notes}"
        card = model_card(found, options.src, made, "peft", onto=None, languages=options.languages)
        (folder / CARD_NAME).write_text(card, encoding="utf-8")
        if (adapter.folder / IDENTITY_FILE).is_file():  # as we write it now, whichever version wrote the adapter
            write_identity(folder, base_identity(found.base))
        for file in [*tokenizer_files(found.tokenizer), *generation_files(found.tokenizer)]:
            shutil.copyfile(file, folder / file.name)
