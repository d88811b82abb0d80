"""Leave out single lines that libraries log or warn of and that concern nobody here; what else they say is heard."""

import logging
import warnings
from collections.abc import Mapping
from functools import partial

# Logger → what the line holds.
AT_IMPORT = {
    # An optional kernel for products in 4 bits is missing, which nothing here would use.
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU gemm_4bit_forward",),
}
# Offers of Lightning's maker's other products, and that it adds no summary of the model beside this package's.
_OF_A_TRAINER = ("Tip:", "already configured with model summary callbacks")
_OF_RUNS = {f"lightning.{part}.utilities.rank_zero": _OF_A_TRAINER for part in ("pytorch", "fabric")}
_WARNINGS = (
    ".*Checkpoint directory .* exists and is not empty",  # every resumed run
    "FSDP2-wrapped module .* returned a view",  # nothing changes it in place
    ".*isinstance.treespec, LeafSpec",  # Lightning's, of torch
)


def leave_out(lines: Mapping[str, tuple[str, ...]]) -> None:
    """Drop the records of some loggers that hold a text; twice is the same as once.

    Args:
        lines: Name of each logger, and the texts.
    """
    for name, texts in lines.items():
        logger = logging.getLogger(name)
        if not any(isinstance(known, partial) and known.args == (texts,) for known in logger.filters):
            logger.addFilter(partial(_has_none, texts))


def _has_none(texts: tuple[str, ...], record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return not any(text in message for text in texts)


def leave_out_of_runs() -> None:
    """Drop what Lightning and torch say of every run of this package."""
    leave_out(_OF_RUNS)
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message)
