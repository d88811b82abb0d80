"""The meaning of SRC in a benchmark table: one model, or a base beside its adapted self."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from lightning_mixcn.errors import UserError
from lightning_mixcn.model.find import ModelSource
from lightning_mixcn.model.lora.adapter_file import CONFIG_NAME, WEIGHTS_NAME
from lightning_mixcn.model.options import ModelOptions
from lightning_mixcn.text import TextTokenizer, load_tokenizer
from lightning_mixcn.tokenizer.pieces import has_tokenizer

AdapterChoice = Literal["on", "off", "both"]


@dataclass(frozen=True)
class EvaluatedModel:
    """A column of the table.

    Args:
        name: ``base``, ``adapted``, or ``model`` where SRC has no adapter.
        found: Places of its parts.
        switched_off: True for another column's model with its adapter switched off.
    """

    name: str
    found: ModelSource
    switched_off: bool = False

    def tokenizer(self) -> TextTokenizer:
        """Load the model's tokenizer."""
        return load_tokenizer(self.found.tokenizer)


def evaluated_models(src: str, found: ModelSource, adapter: AdapterChoice | None) -> list[EvaluatedModel]:
    """Return the columns of the table.

    Args:
        src: The user's name of the model, for errors.
        found: Its parts.
        adapter: ``None`` is ``both`` where there is an adapter.

    Returns:
        One or two; the base comes first.

    Raises:
        ValueError: an adapter is asked for, but there is none.
    """
    if not found.adapters:
        if adapter in ("on", "both"):
            raise UserError(f"`adapter={adapter}`, but {src!r} has no adapter. Leave it out, or give a run or adapter")
        return [EvaluatedModel("model", found)]
    tokenizer = found.base.path if has_tokenizer(found.base.path) else found.tokenizer
    bare = ModelSource(found.base, (), tokenizer)
    chosen = adapter or "both"
    models = []
    if chosen in ("off", "both"):
        together = chosen == "both" and _can_switch_off(found, bare)
        models.append(EvaluatedModel("base", found if together else bare, switched_off=together))
    if chosen in ("on", "both"):
        models.append(EvaluatedModel("adapted", found))
    return models


def model_fingerprint(found: ModelSource) -> dict[str, Any]:
    """Return what a model's figures depend on: hashes of its base and adapters."""
    digests = []
    for adapter in found.adapters:
        digest = hashlib.sha256()
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            with (adapter.folder / name).open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        digests.append(digest.hexdigest())
    return {"base_sha256": found.base.sha256, "adapter_sha256": digests}


class LoadedModels:
    """Loads a model when it is first needed, and keeps one at a time.

    Args:
        options: Storage and compute type.
        device: Device of this process.
        shard: As in `load_moe`.
    """

    def __init__(
        self, options: ModelOptions, device: torch.device, shard: Callable[[nn.Module], None] | None = None
    ) -> None:
        self._options, self._device, self._shard = options, device, shard
        self._found: ModelSource | None = None
        self._model: Any = None

    @contextmanager
    def use(self, wanted: EvaluatedModel) -> Iterator[nn.Module]:
        """Yield the model of a column, ready to be evaluated."""
        if self._found != wanted.found:
            self._model = self._found = None  # before the next one takes its memory
            self._model = self._options.load(wanted.found, device=self._device, shard=self._shard)
            self._found = wanted.found
        if wanted.switched_off:
            with self._model.disable_adapter():
                yield self._model
        else:
            yield self._model


def _can_switch_off(found: ModelSource, bare: ModelSource) -> bool:
    """Tell whether disabling the adapter gives the base: no embedding was trained, the tokenizer is the base's."""
    if any(adapter.saved for adapter in found.adapters):
        return False
    tokenizers = [load_tokenizer(source.tokenizer).fingerprint for source in (found, bare)]
    return tokenizers[0] == tokenizers[1]
