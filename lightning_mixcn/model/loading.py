"""Making a model: from a checkpoint folder, or with random weights.

A checkpoint is read and quantised piece by piece, so the host never holds more than the 4-bit model and one piece.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import MixtralConfig

from .adapters import MixtralPeftModel, attach_lora, load_adapter, reset_lora
from .bitsandbytes_source import BitsAndBytesSource, is_bitsandbytes
from .checkpoint import Checkpoint, Segment
from .frozen_linear import FrozenLinear
from .identity import QUANTISED_MODEL_TYPE, base_identity, is_own_format, stock_base
from .inventory import verify_quantised
from .layout import Entry, entries, stored_entries
from .local_rows import copy_rows, held_elements, local_rows, write_elements
from .mixtral import MixtralForCausalLM, meta_model, move_to_device
from .nf4 import SUPERBLOCK, dequantize
from .vocabulary_extension import NewRows, find_extension
from .weights import NF4Weight

# Elements read, quantised and written at a time: 128 MB of float32, a whole number of superblocks.
CHUNK = 2048 * SUPERBLOCK
# Buffers that old versions of transformers saved; they are computed.
_COMPUTED = re.compile(r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_mixtral(
    path: str | Path,
    *,
    quantization: str = "nf4",
    lora: LoraConfig | None = None,
    dtype: str | torch.dtype = "bfloat16",
    device: str | torch.device | None = None,
    train_embeddings: bool = False,
    seed: int = 0,
    adapter: str | Path | None = None,
    tokenizer: str | Path | None = None,
    new_rows: NewRows = "mean",
    shard: Callable[[nn.Module], None] | None = None,
) -> MixtralForCausalLM | MixtralPeftModel:
    """Load a Mixtral, its experts quantised on the way.

    Args:
        path: Hugging Face folder (safetensors, per-expert or fused names), 4-bit folder of `mixcn quantize` or of
            bitsandbytes (NF4, double quantised, saved with transformers 4), or hub id.
        quantization: ``nf4``: attention projections and experts in 4 bits, double quantised; embeddings, head, norms
            and router stay in ``dtype``. ``none``: everything in ``dtype``.
        lora: PEFT's configuration, or ``None`` for the bare base.
        dtype: Compute dtype. LoRA masters and trained embeddings are float32 whatever it is.
        device: Where to; ``None`` is the CPU.
        train_embeddings: Train ``embed_tokens`` and ``lm_head`` fully.
        seed: Of LoRA's random start.
        adapter: PEFT adapter folder to continue from; needs ``lora`` with its rank and targets.
        tokenizer: Folder or hub id of a tokenizer that continues the base's. Embedding and head get rows for its
            further pieces, and must train; an adapter that was trained so brings them itself.
        new_rows: How those rows start. ``mean``: of the rows of the old pieces that the base's tokenizer splits the
            new piece into; ``byte_mean``: the same, weighted by the bytes of each; ``random``: normal with the
            config's ``initializer_range``; ``zeros``.
        shard: Called with the model while it is on the meta device, to shard it (see `shard_model`): a rank then reads,
            quantises and holds its share only, bit for bit that part of what one rank would hold.

    Returns:
        A `transformers.MixtralForCausalLM`, or the `peft.PeftModel` around it; only adapters (and embeddings) train.

    Raises:
        FileNotFoundError: no folder or no weights.
        ValueError: a broken or unsuitable checkpoint, or an option that does not fit.
        RuntimeError: the loaded model is not what was planned.
    """
    checkpoint = Checkpoint(path)
    config = mixtral_config(checkpoint)
    if is_quantised(checkpoint) and quantization != "nf4":
        raise ValueError(
            f"`quantization={quantization!r}`, but {checkpoint.path} holds 4-bit weights. Use nf4, or the original"
        )
    model = meta_model(config, quantization, torch_dtype(dtype))
    todo, source = open_entries(model, checkpoint, config)  # before anything is allocated
    if adapter is not None and lora is None:
        raise ValueError(
            f"`adapter={str(adapter)!r}` needs `lora` with its rank and targets. Set lora, or leave adapter out"
        )
    extension = find_extension(
        checkpoint, config, tokenizer=tokenizer, new_rows=new_rows, train_embeddings=train_embeddings,
        adapter=adapter, seed=seed,
    )  # fmt: skip
    if extension is not None:
        extension.grow(model)
    model.name_or_path = stock_base(path) or ""
    complete = _complete(model, lora, train_embeddings)
    if quantization == "nf4":
        verify_quantised(model, config)
    if shard is not None:
        shard(complete)
    move_to_device(model, torch_device(device or "cpu"))
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"  # of the processes that a launcher started on this machine
    for entry in tqdm(todo, desc="loading", unit=" weights", leave=False, delay=2, disable=not is_first):
        fill(entry, checkpoint, source)
    if extension is not None:
        extension.fill(model)
    if isinstance(complete, MixtralPeftModel):
        complete.base_identity = base_identity(path) if is_first else None
        reset_lora(complete, seed)
        if adapter is not None:
            load_adapter(complete, adapter)
    return complete


def build_mixtral(
    config: MixtralConfig,
    *,
    quantization: str = "nf4",
    lora: LoraConfig | None = None,
    dtype: str | torch.dtype = "bfloat16",
    device: str | torch.device | None = None,
    train_embeddings: bool = False,
    seed: int = 0,
) -> MixtralForCausalLM | MixtralPeftModel:
    """The same model with random weights, normal with ``config.initializer_range``; on ``meta`` without any.

    Args:
        config: Sizes.
        quantization: As in `load_mixtral`.
        lora: As in `load_mixtral`.
        dtype: As in `load_mixtral`.
        device: As in `load_mixtral`; ``meta`` allocates nothing.
        train_embeddings: As in `load_mixtral`.
        seed: Of the random weights and of LoRA's start.
    """
    model, device = meta_model(config, quantization, torch_dtype(dtype)), torch_device(device or "cpu")
    model.name_or_path = ""
    complete = _complete(model, lora, train_embeddings)
    if quantization == "nf4":
        verify_quantised(model, config)
    if device.type != "meta":
        move_to_device(model, device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            _randomise(model, config.initializer_range)
        if isinstance(complete, MixtralPeftModel):
            reset_lora(complete, seed)
    return complete


def _complete(
    model: MixtralForCausalLM, lora: LoraConfig | None, train_embeddings: bool
) -> MixtralForCausalLM | MixtralPeftModel:
    """Add what trains to a meta model: float32 embeddings, adapters."""
    if train_embeddings:
        _train_embeddings(model)
    return model if lora is None else attach_lora(model, lora)


def mixtral_config(checkpoint: Checkpoint) -> MixtralConfig:
    """The checkpoint's configuration, tied as its files are; refuses other architectures."""
    settings = stock_settings(checkpoint.config)
    if (kind := settings.get("model_type")) != "mixtral":
        raise ValueError(
            f"{checkpoint.path} holds a model of type {kind!r}. Expected 'mixtral'; a dense Llama or Mistral becomes "
            "one with `mixcn upcycle`"
        )
    return MixtralConfig.from_dict(settings | {"tie_word_embeddings": checkpoint.ties_head()})


def stock_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a ``config.json`` as that of the unquantised model; of a 4-bit folder, its original's."""
    settings = {key: value for key, value in config.items() if key != "quantization_config"}
    if settings.get("model_type") == QUANTISED_MODEL_TYPE:
        settings["model_type"] = "mixtral"
    return settings


def is_quantised(checkpoint: Checkpoint) -> bool:
    """Whether it is in 4 bits, by `mixcn quantize` or by bitsandbytes; refuses other quantised formats."""
    if is_own_format(checkpoint.config) or is_bitsandbytes(checkpoint):
        return True
    method = (checkpoint.config.get("quantization_config") or {}).get("quant_method")
    if method is not None:
        raise ValueError(
            f"{checkpoint.path} is quantised with {method!r}. Give the unquantised model, or one of `mixcn quantize`"
        )
    return False


def torch_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """``bfloat16``, ``float16`` or ``float32`` as torch's."""
    found = _DTYPES.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise ValueError(f"`dtype={dtype!r}` is not known. Expected one of {', '.join(_DTYPES)}")
    return found


def torch_device(device: str | torch.device) -> torch.device:
    """``cpu``, ``cuda``, ``cuda:1`` … as torch's. Raises: ValueError."""
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"`device={device!r}` is not known. Expected cpu, cuda, cuda:1 …") from error


def open_entries(
    model: nn.Module, checkpoint: Checkpoint, config: MixtralConfig
) -> tuple[list[Entry], BitsAndBytesSource | None]:
    """List everything that a model takes from a checkpoint.

    Args:
        model: On the meta device.
        checkpoint: High-precision, or in 4 bits.
        config: Of `mixtral_config`.

    Returns:
        The entries in the model's order, and bitsandbytes' 4-bit weights if that is what the checkpoint holds.

    Raises:
        ValueError: a tensor is missing, has another shape, or has no place in the model.
    """
    source = BitsAndBytesSource(checkpoint) if is_bitsandbytes(checkpoint) else None
    stored_nf4 = is_quantised(checkpoint) and source is None
    todo = list(stored_entries(model) if stored_nf4 else entries(model, checkpoint, config))
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
        raise ValueError(
            f"{checkpoint.path} holds {len(surplus)} tensors that have no place in a Mixtral of its config.json: "
            f"{', '.join(surplus[:3])}{' …' if len(surplus) > 3 else ''}. Is config.json of this model? Remove what is "
            "not part of it"
        )
    return todo, source


def check_entry(entry: Entry, checkpoint: Checkpoint) -> None:
    """Check that every part is there and that its shape is what the module needs. ValueError if not."""
    for part in entry.segments:
        if part.name not in checkpoint:
            raise ValueError(
                f"{checkpoint.path} lacks the tensor {part.name}. Download it again; is config.json of this model?"
            )
        found, expected = checkpoint.shape(part.name), _stored_shape(entry, part)
        if found != expected:
            raise ValueError(
                f"{checkpoint.path}: {part.name} has the wrong shape {found} for {entry.name}, which needs {expected}. "
                "Is config.json of this model?"
            )


def _stored_shape(entry: Entry, part: Segment) -> tuple[int, ...]:
    """Shape of the tensor that holds a part: a parameter as it is, one matrix, or a stack of all experts'."""
    if entry.attribute:
        return tuple(entry.shape)
    groups, rows, columns = entry.shape
    if part.index is None:
        return rows, columns
    return groups, rows * (1 if part.rows is None else 2), columns


def fill(entry: Entry, checkpoint: Checkpoint, source: BitsAndBytesSource | None = None) -> None:
    """Read what this rank holds of an entry, piece by piece, quantising where the module is quantised.

    Args:
        entry: What is read.
        checkpoint: Where from.
        source: bitsandbytes' 4-bit weights, which are taken over as they are.
    """
    if source is not None and source.holds(entry):
        _take_over(entry, source)
        return
    held = held_elements(entry.parameter) if entry.attribute else entry.storage.held()
    if entry.attribute and held.stop > (stored := prod(checkpoint.shape(entry.segments[0].name))):
        held = range(min(held.start, stored), stored)  # the rows of an extended vocabulary are not in the checkpoint
    target = _readable(entry, checkpoint)
    for start, values in pieces(entry, checkpoint, held, target):
        if entry.attribute is None:
            entry.storage.write(start, values)
        elif target is None:
            write_elements(entry.parameter, start, values)


def _take_over(entry: Entry, source: BitsAndBytesSource) -> None:
    packed, storage = source.stack(entry), entry.storage
    if isinstance(storage, NF4Weight):
        for name, tensor in packed._asdict().items():
            copy_rows(getattr(storage, name), tensor)
    else:  # the router, which is not quantised here
        held = storage.held()
        values = dequantize(packed, storage.values.dtype)[: prod(storage.shape)]
        storage.write(held.start, values[held.start : held.stop])


def _readable(entry: Entry, checkpoint: Checkpoint) -> Tensor | None:
    """The parameter's memory, flat, where the file's bytes can go straight into it."""
    if entry.attribute is None:
        return None
    rows, _ = local_rows(entry.parameter)
    fits = rows.device.type == "cpu" and rows.is_contiguous() and rows.dtype == checkpoint.dtype(entry.segments[0].name)
    return rows.view(-1) if fits else None


def pieces(
    entry: Entry, checkpoint: Checkpoint, held: range | None = None, target: Tensor | None = None
) -> Iterator[tuple[int, Tensor]]:
    """``(first element, flat values)`` of an entry, at most `CHUNK` elements each; refuses NaN and infinity.

    Args:
        entry: What is read.
        checkpoint: Where from.
        held: The elements wanted; ``None`` for all.
        target: Flat memory that they are read into, the first of ``held`` at its beginning; ``None`` for new tensors.
    """
    wanted = range(prod(entry.shape)) if held is None else held
    for start in range(wanted.start, wanted.stop, CHUNK):
        stop = min(start + CHUNK, wanted.stop)
        part = None if target is None else target[start - wanted.start : stop - wanted.start]
        values = checkpoint.read_segments(entry.segments, start, stop, part)
        # The extremes tell as much as isfinite of every element, which takes 20 times as long on the CPU.
        if values.is_floating_point() and not torch.stack(values.aminmax()).isfinite().all():
            raise ValueError(
                f"{checkpoint.path}: {entry.segments[0].name} holds NaN or infinite values. Download it again"
            )
        yield start, values


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


def _train_embeddings(model: MixtralForCausalLM) -> None:
    """Make embedding and head float32 masters that train; a tied pair stays one parameter."""
    embedding, head = model.model.embed_tokens, model.lm_head
    embedding.weight = nn.Parameter(embedding.weight.detach().float())
    head.weight = embedding.weight if model.config.tie_word_embeddings else nn.Parameter(head.weight.detach().float())
