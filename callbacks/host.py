"""Check the module that a callback of this package runs in, and the names of the files that it writes."""

import re
from collections.abc import Collection

from lightning.pytorch import Callback, LightningModule

from lightning_mixcn.errors import UserError
from lightning_mixcn.modules import CausalLMModule

# Files that a run may write into its folder, by whichever callback, and with its folders all names that are taken.
RUN_FILES = (
    "config.yaml",
    "config.validate.yaml",
    "config.test.yaml",
    "config.predict.yaml",
    "epochs.json",
    "validate.json",
    "test.json",
    "predictions.jsonl",
    "samples.jsonl",
    "answers.jsonl",
    "benchmarks.jsonl",
    "experts.csv",
    "facts.json",
)
CHECKPOINTS = "checkpoints"
TENSORBOARD = "tensorboard"
LONG_CONTEXT = "long_context"
_RUN_NAMES = {*RUN_FILES, CHECKPOINTS, TENSORBOARD, LONG_CONTEXT}
_MAX_NAME_BYTES = 200  # file systems take 255; the hidden names of unfinished output are longer


def plain_name(argument: str, name: str, own: Collection[str] = ()) -> str:
    """Return the name of a file or folder in the run's folder.

    Args:
        argument: Name of the argument.
        name: Its value.
        own: Names of a run's outputs that are the callback's own.

    Raises:
        ValueError: it is a path, could not be typed or seen, or is the name of another output of the run.
    """
    is_plain = re.fullmatch(r"[^./\\\x00-\x1f\x7f-\x9f][^/\\\x00-\x1f\x7f-\x9f]*", name) and name == name.strip()
    if not is_plain or len(name.encode(errors="surrogatepass")) > _MAX_NAME_BYTES:
        raise UserError(
            f"`{argument}={name[:_MAX_NAME_BYTES]!r}`: expected a plain name in the run's folder, without slashes, a "
            f"dot in front or control characters, of at most {_MAX_NAME_BYTES} bytes. Give e.g. "
            f"{next(iter(own), 'adapter')}"
        )
    if name.casefold() in _RUN_NAMES - {*own}:
        raise UserError(f"`{argument}={name!r}` is what a run calls another of its outputs. Choose another name")
    return name


def causal_lm(callback: Callback, module: LightningModule) -> CausalLMModule:
    """Return the module, if it is one that the callback can work with.

    Args:
        callback: Callback that asks.
        module: The LightningModule that is trained or evaluated.

    Raises:
        ValueError: The module is none of this package's, nor a subclass of one.
    """
    if not isinstance(module, CausalLMModule):
        raise UserError(
            f"{type(callback).__name__} works with a CausalLMModule, but `model` is {type(module).__name__}. "
            "Subclass CausalLMModule, or leave the callback out"
        )
    return module
