"""Which weights an export merges adapters onto."""

from typing import Literal

from .base_weights import BaseWeights
from .checkpoint import Checkpoint
from .hub import local_folder
from .identity import check_made_from, read_identity
from .loading import is_quantised
from .model_source import ModelSource

Precision = Literal["original", "dequantised"]


def open_base(found: ModelSource, precision: Precision, original: str | None) -> tuple[BaseWeights, Checkpoint]:
    """Open the base of a model.

    Args:
        found: The model.
        precision: ``original``: the high-precision weights; ``dequantised``: as 4 bits round them.
        original: Where the high-precision weights are, if not where the model says.

    Returns:
        The weights, and the checkpoint that they are read from.

    Raises:
        FileNotFoundError: the base is in 4 bits, and what it was made from is not there.
        ValueError: `original` is another base, in 4 bits itself, or given for dequantised weights.
    """
    checkpoint = Checkpoint(found.base)
    if precision == "dequantised":
        if original is not None:
            raise ValueError(f"`original={original!r}` is not used by `base=dequantised`. Leave out one of the two")
        return BaseWeights(checkpoint, dequantised=True), checkpoint
    if original is None and is_quantised(checkpoint):
        original = _recorded_original(checkpoint)
        if is_quantised(Checkpoint(original)):
            raise ValueError(
                f"the base {str(checkpoint.path)!r} was made from {original!r}, which bitsandbytes quantised: there is "
                "no unquantised one to merge onto. Give `--base dequantised`, or the published base with "
                "`--original FOLDER`"
            )
    if original is not None:
        stated = checkpoint
        checkpoint = Checkpoint(original)
        if is_quantised(checkpoint):
            raise ValueError(f"`original={original!r}` is in 4 bits. Give the unquantised model")
        # What was trained on 4 bits names those as its base, and they name what they were made from.
        chain = [stated.path] if is_quantised(stated) else [local_folder(adapter) for adapter in found.adapters[:1]]
        for folder in chain:
            check_made_from(folder, original)
    return BaseWeights(checkpoint, dequantised=False), checkpoint


def _recorded_original(checkpoint: Checkpoint) -> str:
    """Folder or hub id of what a 4-bit folder was quantised from."""
    recorded = read_identity(checkpoint.path)
    where = f"made from {recorded['path']!r}, which is not there" if recorded else "and does not say of what"
    try:
        if recorded is not None:
            local_folder(recorded["path"])
            return recorded["path"]
        reason = None
    except (FileNotFoundError, NotADirectoryError) as error:
        reason = error
    raise FileNotFoundError(
        f"the base {str(checkpoint.path)!r} is in 4 bits, {where}. Give the unquantised base with "
        "`--original FOLDER`, or `--base dequantised` to merge onto what the 4 bits hold"
    ) from reason
