"""Open what a user calls a model (a checkpoint, a 4-bit folder, a run, an adapter) as a base and its adapters."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
import yaml
from peft import LoraConfig
from torch import nn

from lightning_mixcn.errors import MissingFileError, UserError
from lightning_mixcn.files.configuration import read_configuration
from lightning_mixcn.files.hub import local_folder, public_name
from lightning_mixcn.tokenizer.pieces import has_tokenizer

from .architectures import Architecture, architecture_of
from .causal_lm import MoeForCausalLM
from .checkpoints.folder import Checkpoint
from .checkpoints.identity import check_made_from, read_identity
from .checkpoints.reading import model_config
from .loading import load_moe
from .lora.adapter_file import CONFIG_NAME, AdapterFile
from .lora.attach import MoePeftModel

ADAPTER_FOLDER = "adapter"

_MATRIX = re.compile(r"model\.layers\.(\d+)\.(self_attn|\w+?(?:\.experts\.\d+)?)\.(\w+)")


@dataclass(frozen=True)
class ModelSource:
    """The opened parts of a model.

    Attributes:
        base: Its base: an unquantised checkpoint or one in 4 bits.
        adapters: Adapters in the order in which they are applied; none or one, unless more were asked for.
        tokenizer: Folder of the tokenizer, and chat template, that belong to the model.
    """

    base: Checkpoint
    adapters: tuple[AdapterFile, ...]
    tokenizer: Path

    @property
    def architecture(self) -> Architecture:
        """Return the base's family. Raises: ValueError, it is not supported."""
        return architecture_of(model_config(self.base))

    def with_adapter(self, adapter: AdapterFile) -> Self:
        """Return the model with a further adapter, whose tokenizer counts if it has one."""
        tokenizer = adapter.folder if has_tokenizer(adapter.folder) else self.tokenizer
        return replace(self, adapters=(*self.adapters, adapter), tokenizer=tokenizer)

    def scaled_by_layer(self, factors: Mapping[int, float]) -> Self:
        """Return the model with all adapters scaled, see `AdapterFile.scaled_by_layer`."""
        return replace(self, adapters=tuple(adapter.scaled_by_layer(factors) for adapter in self.adapters))


def find_model(src: str) -> ModelSource:
    """Open the parts of a model, and check that an adapter goes with the base that it was trained on.

    Args:
        src: Hugging Face folder or hub id, 4-bit folder of `mixcn quantize`, run folder, or PEFT adapter folder, whose
            configuration names its base.

    Returns:
        The parts; nothing but headers and samples of them has been read.

    Raises:
        FileNotFoundError: there is no such folder, the run has no adapter, or the adapter's base is not there.
        ValueError: an adapter that names no base, or was trained on another one; a broken checkpoint.
    """
    folder = local_folder(src)
    if (folder / "config.json").is_file():
        return ModelSource(Checkpoint(src), (), folder)
    for adapter in (folder, folder / ADAPTER_FOLDER):
        if (adapter / CONFIG_NAME).is_file():
            return _with_base(AdapterFile(adapter))
    if (folder / "config.yaml").is_file() or (folder / "checkpoints").is_dir():
        raise MissingFileError(
            f"the run {src!r} has no {ADAPTER_FOLDER}/. Train it with the callback AdapterCheckpoint and with `lora`"
        )
    raise MissingFileError(
        f"{src!r} is no model: it has neither config.json (a checkpoint) nor {CONFIG_NAME} (a PEFT adapter) nor "
        f"{ADAPTER_FOLDER}/ (a run). Give a folder that has one, or a hub id owner/name"
    )


def _with_base(adapter: AdapterFile) -> ModelSource:
    """Open the 4-bit folder that an adapter was trained on while it is there, else the base that its config names."""
    config, folder = adapter.config, adapter.folder
    base, loaded = config.base_model_name_or_path, read_identity(folder)
    # The configuration names the original, which other tools read. Another name is a person's, and goes first.
    if loaded is not None:
        ours = {key: {loaded[key], public_name(loaded[key])} for key in ("path", "original_path") if key in loaded}
        if Path(loaded["path"]).is_dir() and (base is None or any(base in names for names in ours.values())):
            base = loaded["path"]
        elif base in ours.get("original_path", ()):
            base = loaded["original_path"]
        if base in set().union(*ours.values()) and not Path(base).is_dir():
            base = _base_of_run(folder.parent) or base
    if base and config.revision not in (None, "main") and not Path(base).is_dir():
        raise UserError(
            f"the adapter {adapter.name!r} belongs to the revision {config.revision!r} of {base!r}. Download that "
            f"revision, and set base_model_name_or_path in {CONFIG_NAME} to its folder"
        )
    if not base:
        raise UserError(
            f"the adapter {adapter.name!r} names no base. Set base_model_name_or_path in its {CONFIG_NAME} to the "
            "folder of its base"
        )
    try:
        local_folder(base)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingFileError(
            f"the adapter {adapter.name!r} needs its base {base!r}, which is not there. Move it back, or set "
            f"base_model_name_or_path in {CONFIG_NAME} to where it is"
        ) from error
    checkpoint = Checkpoint(base)
    check_made_from(folder, checkpoint)
    found = ModelSource(checkpoint, (), checkpoint.path)
    return found.with_adapter(AdapterFile(adapter.name, found.architecture))


def _base_of_run(root: Path) -> str | None:
    """Return the base in the configuration of the run that an adapter lies in, where it is a folder."""
    try:
        settings = yaml.safe_load(read_configuration(root / "config.yaml", "config.yaml"))
        base = str(settings["model"]["init_args"]["base"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return base if Path(base).is_dir() else None


def load_found(
    found: ModelSource,
    *,
    quantization: str = "nf4",
    dtype: str | torch.dtype = "bfloat16",
    device: str | torch.device | None = None,
    shard: Callable[[nn.Module], None] | None = None,
) -> MoeForCausalLM | MoePeftModel:
    """Load a model to be used, not trained: in evaluation mode, nothing requires a gradient.

    Args:
        found: Parts of the model.
        quantization: As in `load_moe`.
        dtype: As in `load_moe`.
        device: As in `load_moe`.
        shard: As in `load_moe`.

    Raises:
        ValueError: more than one adapter, an adapter that does not fit the base, or what `load_moe` refuses.
    """
    if len(found.adapters) > 1:
        raise UserError(
            f"{len(found.adapters)} adapters are stacked on {found.base.name}, but one can be loaded. "
            "Merge them first with `mixcn export`"
        )
    if not found.adapters:
        model = load_moe(found.base, quantization=quantization, dtype=dtype, device=device, shard=shard)
    else:
        (adapter,) = found.adapters
        adapter = adapter.on_rounded_base() if quantization == "nf4" else adapter
        model = load_moe(
            found.base,
            quantization=quantization,
            lora=lora_of(adapter),
            dtype=dtype,
            device=device,
            train_embeddings=bool(adapter.saved),
            adapter=adapter,
            shard=shard,
        )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.eval()
    return model


def lora_of(adapter: AdapterFile) -> LoraConfig:
    """Return the configuration with which `load_moe` makes room for an adapter, read off its tensors.

    Args:
        adapter: Adapter with equal ranks for all experts of a projection; other ranks may differ.

    Raises:
        ValueError: it adapts what is no projection of its base, or some experts of a projection with other ranks.
    """
    short_names = adapter.architecture.short_names if adapter.architecture else ()
    ranks: dict[str, int] = {}
    of_stacks: dict[str, int] = {}
    for name in adapter.names:
        match = _MATRIX.fullmatch(name)
        if match is None or match[3] not in short_names:
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
