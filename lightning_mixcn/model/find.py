"""What a person calls a model — a checkpoint, a 4-bit folder, a run, an adapter — as a base and its adapters."""

import re
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig
from torch import nn

from lightning_mixcn.errors import MissingFileError, UserError
from lightning_mixcn.files.hub import local_folder

from .checkpoints.identity import ModelSource, check_made_from, read_identity
from .loading import load_mixtral
from .lora.adapter_file import CONFIG_NAME, AdapterFile
from .lora.attach import MixtralPeftModel
from .lora.targets import SHORT_NAMES
from .mixtral import MixtralForCausalLM

ADAPTER_FOLDER = "adapter"

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
_MATRIX = re.compile(r"model\.layers\.(\d+)\.(self_attn|block_sparse_moe(?:\.experts\.\d+)?)\.(\w+)")


def find_model(src: str) -> ModelSource:
    """Find the parts of a model, and check that an adapter stands on the base that it was trained on.

    Args:
        src: Hugging Face folder or hub id, 4-bit folder of `mixcn quantize`, run folder, or PEFT adapter folder, whose
            configuration names its base.

    Returns:
        The parts; nothing but headers and samples of them has been read.

    Raises:
        FileNotFoundError: there is no such folder, the run has no adapter, or the adapter's base is not there.
        ValueError: an adapter that names no base, or stands on another one than it was trained on.
    """
    folder = local_folder(src)
    if (folder / "config.json").is_file():
        return ModelSource(src, (), src)
    if (folder / CONFIG_NAME).is_file():
        return _find_base(src, folder)
    if (folder / ADAPTER_FOLDER / CONFIG_NAME).is_file():
        return _find_base(str(folder / ADAPTER_FOLDER), folder / ADAPTER_FOLDER)
    if (folder / "config.yaml").is_file() or (folder / "checkpoints").is_dir():
        raise MissingFileError(
            f"the run {src!r} has no {ADAPTER_FOLDER}/. Train it with the callback AdapterCheckpoint and with `lora`"
        )
    raise MissingFileError(
        f"{src!r} is no model: it has neither config.json (a checkpoint) nor {CONFIG_NAME} (a PEFT adapter) nor "
        f"{ADAPTER_FOLDER}/ (a run). Give a folder that has one, or a hub id owner/name"
    )


def _find_base(adapter: str, folder: Path) -> ModelSource:
    """The 4-bit folder that an adapter was trained on while it is there, else the base that its configuration names."""
    config = AdapterFile(folder).config
    base, loaded = config.base_model_name_or_path, read_identity(folder)
    # The configuration names the original, which other tools read. Another name is a person's, and goes first.
    if loaded is not None and base in (None, loaded.get("original_path")) and Path(loaded["path"]).is_dir():
        base = loaded["path"]
    if base and config.revision not in (None, "main") and not Path(base).is_dir():
        raise UserError(
            f"the adapter {adapter!r} belongs to the revision {config.revision!r} of {base!r}. Download that revision, "
            f"and set base_model_name_or_path in {CONFIG_NAME} to its folder"
        )
    if not base:
        raise UserError(
            f"the adapter {adapter!r} names no base. Set base_model_name_or_path in its {CONFIG_NAME} to the folder of "
            "its base"
        )
    try:
        local_folder(base)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingFileError(
            f"the adapter {adapter!r} needs its base {base!r}, which is not there. Move it back, or set "
            f"base_model_name_or_path in {CONFIG_NAME} to where it is"
        ) from error
    check_made_from(folder, base)
    return ModelSource(base, (adapter,), tokenizer_of(adapter, otherwise=base))


def tokenizer_of(adapter: str, *, otherwise: str) -> str:
    """The adapter's folder if it has a tokenizer, as a run's has; else what the tokenizer is otherwise."""
    folder = local_folder(adapter)
    return adapter if any((folder / name).is_file() for name in _TOKENIZER_FILES) else otherwise


def load_found(
    found: ModelSource,
    *,
    quantization: str = "nf4",
    dtype: str | torch.dtype = "bfloat16",
    device: str | torch.device | None = None,
    shard: Callable[[nn.Module], None] | None = None,
) -> MixtralForCausalLM | MixtralPeftModel:
    """Load a model to be used, not trained: in evaluation mode, nothing requires a gradient.

    Args:
        found: The parts.
        quantization: As in `load_mixtral`.
        dtype: As in `load_mixtral`.
        device: As in `load_mixtral`.
        shard: As in `load_mixtral`.

    Raises:
        ValueError: more than one adapter, an adapter that does not fit the base, or what `load_mixtral` refuses.
    """
    if len(found.adapters) > 1:
        raise UserError(
            f"{len(found.adapters)} adapters are stacked on {found.base}, but one can be loaded. "
            "Merge them first with `mixcn export`"
        )
    if not found.adapters:
        model = load_mixtral(found.base, quantization=quantization, dtype=dtype, device=device, shard=shard)
    else:
        adapter = AdapterFile(found.adapters[0])
        model = load_mixtral(
            found.base,
            quantization=quantization,
            lora=lora_of(adapter),
            dtype=dtype,
            device=device,
            train_embeddings=bool(adapter.saved),
            adapter=adapter.folder,
            shard=shard,
        )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.eval()
    return model


def lora_of(adapter: AdapterFile) -> LoraConfig:
    """Return the configuration with which `load_mixtral` makes room for an adapter, read off its tensors.

    Args:
        adapter: Of equal rank for all experts of a projection; other ranks may differ.

    Raises:
        ValueError: it adapts what is no projection of a Mixtral, or some experts of a projection with other ranks.
    """
    ranks: dict[str, int] = {}
    of_stacks: dict[str, int] = {}
    for name in adapter.names:
        match = _MATRIX.fullmatch(name)
        if match is None or match[3] not in SHORT_NAMES:
            raise UserError(f"the adapter {str(adapter.folder)!r} adapts {name}, which is not supported here")
        ranks[name] = adapter.rank(name)
        shared = of_stacks.setdefault(f"{match[1]}.{match[3]}", ranks[name])
        if shared != ranks[name]:
            raise UserError(
                f"the adapter {str(adapter.folder)!r} has the rank {ranks[name]} for {name} and {shared} for other "
                "experts of the layer, which cannot be loaded. Merge it with `mixcn export --format hf`"
            )
    rank = max(ranks.values(), default=1)
    # `load_adapter` puts the adapter's own scaling into B, so alpha may be anything.
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(ranks),
        rank_pattern={re.escape(name): here for name, here in ranks.items() if here != rank},
        base_model_name_or_path=adapter.config.base_model_name_or_path,
        task_type="CAUSAL_LM",
    )
