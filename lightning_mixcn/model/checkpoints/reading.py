"""Fill the weights of a model from a checkpoint folder, a bounded piece at a time."""

import re
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from lightning_mixcn.errors import UserError, one_line
from lightning_mixcn.model.architectures import architecture_named, check_supported
from lightning_mixcn.model.checkpoints.bitsandbytes import BitsAndBytesSource, is_bitsandbytes
from lightning_mixcn.model.checkpoints.folder import Checkpoint, TensorSlice
from lightning_mixcn.model.checkpoints.identity import (
    QUANTISED_PREFIX,
    is_own_format,
)
from lightning_mixcn.model.checkpoints.layout import StoredWeight
from lightning_mixcn.model.nf4.codec import SUPERBLOCK, dequantize_nf4
from lightning_mixcn.model.nf4.storage import NF4Weight, Weight
from lightning_mixcn.model.sharding import (
    copy_to_shard,
    local_shard,
    shard_elements,
    write_to_shard,
)

# Elements read, quantised and written at a time: 128 MB of float32, a whole number of superblocks.
CHUNK = 2048 * SUPERBLOCK


_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def model_config(checkpoint: Checkpoint) -> PreTrainedConfig:
    """Return the checkpoint's configuration, tied as its files are; refuse other architectures, and another depth."""
    config = config_of(stock_settings(checkpoint.config), str(checkpoint.path))
    config.tie_word_embeddings = checkpoint.ties_head()
    # Before a model of so many layers is made.
    layers = len({match[1] for name in checkpoint.names() if (match := _LAYER.match(name))})
    if layers != config.num_hidden_layers:
        raise UserError(
            f"{checkpoint.path}: config.json has num_hidden_layers={config.num_hidden_layers}, but the weights are of "
            f"{layers} layers. Is config.json of this model?"
        )
    return config


def config_of(settings: Mapping[str, Any], where: str) -> PreTrainedConfig:
    """Make transformers' configuration of the content of a ``config.json`` whose structure was checked.

    Args:
        settings: The content.
        where: Name of the folder, for messages.

    Raises:
        ValueError: the family is not supported, or transformers cannot use it, such as an unknown activation or kind of
            RoPE.
    """
    check_supported(settings, where)
    architecture = architecture_named(settings["model_type"])
    if (activation := settings.get("hidden_act", "silu")) not in ACT2FN:
        raise UserError(f"{where}: config.json has hidden_act={activation!r}, which transformers does not know")
    try:
        config: PreTrainedConfig = architecture.config.from_dict(dict(settings))
        frequencies = architecture.rotary(config).inv_freq
    except Exception as error:  # each kind of RoPE fails in its own way where a number is missing or zero
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"{where}: transformers cannot use config.json ({reason}). Download it again") from error
    if not frequencies.isfinite().all():
        raise UserError(f"{where}: config.json has RoPE parameters that give no finite frequencies. Download it again")
    return config


def is_quantised(checkpoint: Checkpoint) -> bool:
    """Tell whether a checkpoint is in 4 bits, by `mixcn quantize` or bitsandbytes; refuse other quantised formats."""
    if is_own_format(checkpoint.config) or is_bitsandbytes(checkpoint):
        return True
    method = (checkpoint.config.get("quantization_config") or {}).get("quant_method")
    if method is not None:
        raise UserError(
            f"{checkpoint.path} is quantised with {method!r}. Give the unquantised model, or one of `mixcn quantize`"
        )
    return False


def torch_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Return torch's dtype of the name ``bfloat16``, ``float16`` or ``float32``."""
    found = _DTYPES.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise UserError(f"`dtype={dtype!r}` is not known. Expected one of {', '.join(_DTYPES)}")
    return found


def torch_device(device: str | torch.device) -> torch.device:
    """Return torch's device of the name ``cpu``, ``cuda``, ``cuda:1`` …. Raises: ValueError."""
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise UserError(f"`device={device!r}` is not known. Expected cpu, cuda, cuda:1 …") from error


def check_entry(entry: StoredWeight, checkpoint: Checkpoint) -> None:
    """Check that every part is there and that its shape is what the module needs. ValueError if not."""
    for part in entry.segments:
        if part.name not in checkpoint:
            raise UserError(
                f"{checkpoint.path} lacks the tensor {part.name}. Download it again; is config.json of this model?"
            )
        found, expected = checkpoint.shape(part.name), _stored_shape(entry, part)
        if found != expected:
            raise UserError(
                f"{checkpoint.path}: {part.name} has the wrong shape {found} for {entry.name}, which needs {expected}. "
                "Is config.json of this model?"
            )


def fill(entry: StoredWeight, module: Any, checkpoint: Checkpoint, source: BitsAndBytesSource | None = None) -> None:
    """Read what this rank holds of a weight, piece by piece, quantising where the module is quantised.

    Args:
        entry: Weight to fill.
        module: Module that owns it.
        checkpoint: Checkpoint to read.
        source: bitsandbytes' 4-bit weights, which are taken over as they are.
    """
    if source is not None and source.holds(entry):
        _take_over(entry, module.storage, source)
        return
    parameter: nn.Parameter | None = getattr(module, entry.attribute) if entry.attribute else None
    held = module.storage.held() if parameter is None else shard_elements(parameter)
    if entry.attribute and held.stop > (stored := prod(checkpoint.shape(entry.segments[0].name))):
        held = range(min(held.start, stored), stored)  # the rows of an extended vocabulary are not in the checkpoint
    target = None if parameter is None else _readable(parameter, checkpoint.dtype(entry.segments[0].name))
    device = local_shard(next(module.parameters()))[0].device
    for start, values in pieces(entry, checkpoint, held, target, device):
        if parameter is None:
            module.storage.write(start, values)
        elif target is None:
            write_to_shard(parameter, start, values)


def _readable(parameter: nn.Parameter, dtype: torch.dtype) -> Tensor | None:
    """Return the parameter's memory, flat, where the file's bytes can go straight into it."""
    rows, _ = local_shard(parameter)
    fits = rows.device.type == "cpu" and rows.is_contiguous() and rows.dtype == dtype
    return rows.view(-1) if fits else None


def pieces(
    entry: StoredWeight,
    checkpoint: Checkpoint,
    held: range | None = None,
    target: Tensor | None = None,
    device: torch.device | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Yield ``(first element, flat values)`` of a weight, at most `CHUNK` elements each; refuse NaN and infinity.

    Args:
        entry: Weight to read.
        checkpoint: Checkpoint to read.
        held: Elements wanted; ``None`` for all.
        target: Flat memory that they are read into, the first of ``held`` at its beginning; ``None`` for new tensors.
        device: Device that they are copied to, and looked through on: a GPU does in no time what takes one core of the
            host seconds for Mixtral-8x7B's 93 GB.
    """
    wanted = range(prod(entry.shape)) if held is None else held
    for start in range(wanted.start, wanted.stop, CHUNK):
        stop = min(start + CHUNK, wanted.stop)
        part = None if target is None else target[start - wanted.start : stop - wanted.start]
        values = checkpoint.read_segments(entry.segments, start, stop, part).to(device)
        # The extremes tell as much as isfinite of every element, which takes 20 times as long on the CPU.
        if values.is_floating_point() and not torch.stack(values.aminmax()).isfinite().all():
            raise UserError(
                f"{checkpoint.path}: {entry.segments[0].name} holds NaN or infinite values. Download it again"
            )
        yield start, values


def stock_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a ``config.json`` as that of the unquantised model; of a 4-bit folder, its original's."""
    settings = {key: value for key, value in config.items() if key != "quantization_config"}
    if is_own_format(config):
        settings["model_type"] = str(settings.get("model_type")).removeprefix(QUANTISED_PREFIX)
    return settings


def _stored_shape(entry: StoredWeight, part: TensorSlice) -> tuple[int, ...]:
    """Return the shape of the tensor that holds a part: a parameter as it is, one matrix, or all experts' stack."""
    if entry.attribute:
        return tuple(entry.shape)
    groups, rows, columns = entry.shape
    if part.index is None:
        return rows, columns
    return groups, rows * (1 if part.rows is None else 2), columns


def _take_over(entry: StoredWeight, storage: Weight, source: BitsAndBytesSource) -> None:
    packed = source.stack(entry)
    if isinstance(storage, NF4Weight):
        for name, tensor in packed._asdict().items():
            copy_to_shard(getattr(storage, name), tensor)
    else:  # the router, which is not quantised here
        held = storage.held()
        values = dequantize_nf4(packed, storage.values.dtype)[: prod(storage.shape)]
        storage.write(held.start, values[held.start : held.stop])
