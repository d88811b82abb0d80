"""Make a model: from a checkpoint folder, or with random weights.

A checkpoint is read and quantised piece by piece, so the host never holds more than the 4-bit model and one piece.
"""

import os
import re
from collections.abc import Callable
from math import prod
from pathlib import Path

import torch
from peft import LoraConfig
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedConfig

from lightning_mixcn.errors import UserError

from .architectures import architecture_of
from .causal_lm import MoeForCausalLM, meta_model, move_to_device, verify_quantised
from .checkpoints.bitsandbytes import BitsAndBytesSource, is_bitsandbytes
from .checkpoints.folder import Checkpoint
from .checkpoints.identity import (
    base_identity,
    stock_base,
)
from .checkpoints.layout import StoredWeight, nf4_weights, stored_weights
from .checkpoints.reading import CHUNK, check_entry, fill, is_quantised, model_config, torch_device, torch_dtype
from .lora.adapter_file import AdapterFile
from .lora.attach import (
    LoraFrozenLinear,
    MoePeftModel,
    attach_lora,
    load_adapter,
    lora_layers,
    reset_lora,
)
from .lora.choice import TrainOnly
from .lora.rounding_start import LoraStart, check_start, start_from_rounding_error
from .nf4.linear import FrozenLinear
from .nf4.storage import NF4Weight
from .vocabulary import NewRows, find_extension

# Buffers that old versions of transformers saved; they are computed.
_COMPUTED = re.compile(r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$")


def load_moe(
    path: str | Path | Checkpoint,
    *,
    quantization: str = "nf4",
    lora: LoraConfig | None = None,
    dtype: str | torch.dtype = "bfloat16",
    device: str | torch.device | None = None,
    train_embeddings: bool = False,
    seed: int = 0,
    adapter: str | Path | AdapterFile | None = None,
    tokenizer: str | Path | None = None,
    new_rows: NewRows = "mean",
    shard: Callable[[nn.Module], None] | None = None,
    train_only: TrainOnly | str | Path | None = None,
    lora_start: LoraStart | None = None,
) -> MoeForCausalLM | MoePeftModel:
    """Load a mixture of a supported family, its experts quantised on the way.

    Args:
        path: Hugging Face folder (safetensors, per-expert or fused names), 4-bit folder of `mixcn quantize` or of
            bitsandbytes (NF4, double quantised, saved with transformers 4), hub id, or one of these that is opened.
        quantization: ``nf4``: attention projections and experts in 4 bits, double quantised; embeddings, head, norms
            and router stay in ``dtype``. ``none``: everything in ``dtype``.
        lora: PEFT's configuration, or ``None`` for the bare base or an ``adapter``'s own.
        dtype: Compute dtype. LoRA masters and trained embeddings are float32 whatever it is.
        device: Device of the model; ``None`` is the CPU.
        train_embeddings: Train ``embed_tokens`` and ``lm_head`` fully.
        seed: Seed of LoRA's random start, and of random new rows.
        adapter: PEFT adapter folder to continue from, opened or not; without ``lora`` with its own rank, scaling and
            targets.
        tokenizer: Folder or hub id of a tokenizer that continues the base's. Embedding and head get rows for its
            further pieces, and must train; an adapter that was trained so brings them itself.
        new_rows: Start of those rows. ``mean``: the mean of the rows of the old pieces that the base's tokenizer splits
            the new piece into; ``byte_mean``: the same, weighted by the bytes of each; ``multivariate``: normal with
            the mean and the covariance of the old pieces' rows, those of embedding and head each; ``random``: normal
            with the config's ``initializer_range``; ``zeros``.
        shard: Function that shards the model while it is on the meta device (see `shard_model`): a rank then reads,
            quantises and holds its share only, bit for bit that part of what one rank would hold.
        train_only: What of `lora` there is, see `lora.choice.TrainOnly`, or the path of a JSON file with that. Experts
            that are not chosen have no factors.
        lora_start: ``rounding_error``: factors of attention and experts start as the best approximation, of their rank,
            of what NF4 rounds off (LoftQ, arXiv 2310.08659); needs a high-precision base. ``None``: as `lora` says.

    Returns:
        transformers' causal LM of the family, or the `peft.PeftModel` around it; only adapters (and embeddings) train.

    Raises:
        FileNotFoundError: no folder or no weights.
        ValueError: a broken or unsuitable checkpoint, or an option that does not fit.
        RuntimeError: the loaded model is not what was planned.
    """
    checkpoint = path if isinstance(path, Checkpoint) else Checkpoint(path)
    config = model_config(checkpoint)
    if is_quantised(checkpoint) and quantization != "nf4":
        raise UserError(
            f"`quantization={quantization!r}`, but {checkpoint.path} holds 4-bit weights. Use nf4, or the original"
        )
    model = meta_model(config, quantization, torch_dtype(dtype))
    todo, source = open_entries(checkpoint, config)  # before anything is allocated
    modules = [model.get_submodule(entry.name) for entry in todo]  # before PEFT puts its layers in between
    if lora_start is not None:
        check_start(checkpoint, quantization, has_lora=lora is not None, has_adapter=adapter is not None)
    stored = AdapterFile(adapter, architecture_of(config)) if isinstance(adapter, str | Path) else adapter
    if stored is not None and quantization == "nf4":
        stored = stored.on_rounded_base()
    if stored is not None and lora is None:
        lora = stored.lora_config(config.num_hidden_layers)
    extension = find_extension(
        checkpoint, config, tokenizer=tokenizer, new_rows=new_rows, train_embeddings=train_embeddings,
        adapter=stored, seed=seed,
    )  # fmt: skip
    if extension is not None:
        extension.grow(model)
    model.name_or_path = stock_base(checkpoint) or ""
    complete = _complete(model, lora, train_embeddings, train_only)
    if quantization == "nf4":
        verify_quantised(model, config)
    if shard is not None:
        shard(complete)
    move_to_device(model, torch_device(device or "cpu"))
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"  # of the processes that a launcher started on this machine
    started: dict[str, LoraFrozenLinear] = {}
    if isinstance(complete, MoePeftModel):
        reset_lora(complete, seed)
        started = dict(lora_layers(complete)) if lora_start is not None else {}
    weights = list(zip(todo, modules, strict=True))
    for entry, module in tqdm(weights, desc="loading", unit=" weights", leave=False, delay=2, disable=not is_first):
        fill(entry, module, checkpoint, source)
        if entry.is_rounded and (layer := started.get(entry.name)) is not None:  # its bytes are in the host's cache
            start_from_rounding_error(layer, entry, checkpoint)
    if extension is not None:
        extension.fill(model)
    if isinstance(complete, MoePeftModel):
        complete.base_identity = base_identity(checkpoint) if is_first else None
        if stored is not None:
            load_adapter(complete, stored)
    return complete


def build_moe(
    config: PreTrainedConfig,
    *,
    quantization: str = "nf4",
    lora: LoraConfig | None = None,
    dtype: str | torch.dtype = "bfloat16",
    device: str | torch.device | None = None,
    train_embeddings: bool = False,
    seed: int = 0,
    train_only: TrainOnly | str | Path | None = None,
) -> MoeForCausalLM | MoePeftModel:
    """Make the same model with random weights, normal with ``config.initializer_range``; on ``meta`` without any.

    Args:
        config: Configuration with the sizes.
        quantization: As in `load_moe`.
        lora: As in `load_moe`.
        dtype: As in `load_moe`.
        device: As in `load_moe`; ``meta`` allocates nothing.
        train_embeddings: As in `load_moe`.
        seed: Seed of the random weights and of LoRA's start.
        train_only: As in `load_moe`.
    """
    model, device = meta_model(config, quantization, torch_dtype(dtype)), torch_device(device or "cpu")
    model.name_or_path = ""
    complete = _complete(model, lora, train_embeddings, train_only)
    if quantization == "nf4":
        verify_quantised(model, config)
    if device.type != "meta":
        move_to_device(model, device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            _randomise(model, config.initializer_range)
        if isinstance(complete, MoePeftModel):
            reset_lora(complete, seed)
    return complete


load_mixtral = load_moe
"""`load_moe` under its name of the time when there was one family."""

build_mixtral = build_moe
"""`build_moe` under its name of that time."""


def _complete(
    model: MoeForCausalLM,
    lora: LoraConfig | None,
    train_embeddings: bool,
    train_only: TrainOnly | str | Path | None,
) -> MoeForCausalLM | MoePeftModel:
    """Add what trains to a meta model: float32 embeddings, adapters."""
    if train_embeddings:
        _train_embeddings(model)
    if lora is not None:
        return attach_lora(model, lora, train_only)
    if train_only is not None:
        raise UserError("`train_only` chooses what has LoRA, but `lora` is null. Set lora, or leave train_only out")
    return model


def open_entries(
    checkpoint: Checkpoint, config: PreTrainedConfig
) -> tuple[list[StoredWeight], BitsAndBytesSource | None]:
    """List everything that a model takes from a checkpoint.

    Args:
        checkpoint: High-precision, or in 4 bits.
        config: Configuration of `model_config`.

    Returns:
        The entries in the model's order, and bitsandbytes' 4-bit weights if that is what the checkpoint holds.

    Raises:
        ValueError: a tensor is missing, has another shape, or has no place in the model.
    """
    source = BitsAndBytesSource(checkpoint) if is_bitsandbytes(checkpoint) else None
    stored_nf4 = is_quantised(checkpoint) and source is None
    todo = nf4_weights(config) if stored_nf4 else stored_weights(config, checkpoint)
    left = set(checkpoint.names()) - ({"lm_head.weight"} if config.tie_word_embeddings else set())
    for entry in todo:
        if source is not None and source.holds(entry):
            source.check(entry)
            left.difference_update(source.names(entry))
        else:
            check_entry(entry, checkpoint)
            left.difference_update(part.name for part in entry.segments)
    surplus = sorted(name for name in left if not _COMPUTED.search(name))
    if surplus:
        raise UserError(
            f"{checkpoint.path} holds {len(surplus)} tensors that have no place in the model of its config.json: "
            f"{', '.join(surplus[:3])}{' …' if len(surplus) > 3 else ''}. Is config.json of this model? Remove what is "
            "not part of it"
        )
    return todo, source


def _randomise(model: nn.Module, std: float) -> None:
    for module in model.modules():
        if isinstance(module, FrozenLinear):
            numel = prod(module.storage.shape)
            for start in range(0, numel, CHUNK):
                module.storage.write(start, torch.randn(min(CHUNK, numel - start)) * std)
        elif isinstance(module, nn.Embedding | nn.Linear):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(getattr(module, "weight", None), nn.Parameter) and not isinstance(module, NF4Weight):
            nn.init.ones_(module.weight)  # type: ignore[arg-type]  # a norm's


def _train_embeddings(model: MoeForCausalLM) -> None:
    """Make embedding and head float32 masters that train; a tied pair stays one parameter."""
    embedding, head = model.model.embed_tokens, model.lm_head
    embedding.weight = nn.Parameter(embedding.weight.detach().float())
    head.weight = embedding.weight if model.config.tie_word_embeddings else nn.Parameter(head.weight.detach().float())
