"""What a batch must hold, and what it may leave out.

Legend: B rows, S positions of a row.
"""

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_mixcn.errors import UserError

from .attention.packed import document_starts
from .head import IGNORED

_SIGNED = (torch.int8, torch.int16, torch.int32, torch.int64)


class _Field(NamedTuple):
    """One tensor of a batch: its meaning, types, the least value, and whether one value a row is enough."""

    meaning: str
    dtypes: tuple[torch.dtype, ...]
    least: int = 0
    by_row: bool = False

    @property
    def expected(self) -> str:
        """Return shape and type in words."""
        types = "integers" if len(self.dtypes) > 1 else str(self.dtypes[0]).removeprefix("torch.")
        return f"{types} [B, S]{' or [B]' if self.by_row else ''}, {self.meaning}"


_FIELDS = {
    "input_ids": _Field("the token ids", (torch.int64,)),
    "labels": _Field("aligned with input_ids (the module shifts), -100 where there is none", (torch.int64,)),
    "attention_mask": _Field("1 on tokens, 0 on padding", (*_SIGNED, torch.uint8, torch.bool)),
    "document_ids": _Field("0-based in a row, -1 on padding", _SIGNED, -1),
    "position_ids": _Field("from 0 in each document", (torch.int64,)),
    "source_ids": _Field("0-based, -1 on padding", _SIGNED, -1, by_row=True),
    "label_bytes": _Field("UTF-8 bytes of each label", _SIGNED),
    "text_mask": _Field("true where the label is text", (torch.bool,)),
    "document_index": _Field("number of the document in the evaluation set, -1 on padding", _SIGNED, -1),
    "sides": _Field("1 on a chosen answer, -1 on a rejected one", _SIGNED, -1),
}
_REMEDY = "See docs/data.md, A batch"


def check_batch(
    batch: Any, *, what: str, required: Sequence[str], pieces: int | None, sources: int, device: torch.device
) -> None:
    """Compare a batch with the contract, which waits for the device.

    Args:
        batch: What the loader gave.
        what: The batch in words, for messages.
        required: Names of the tensors that it must hold.
        pieces: Number of the model's embeddings; None does not compare.
        sources: Number of sources that ``source_ids`` may count.
        device: The model's.

    Raises:
        ValueError: names the tensor, what was expected, what came and what to do.
    """
    if not isinstance(batch, MutableMapping):
        raise UserError(
            f"{what} is a {type(batch).__name__}, expected a dict with the tensors input_ids and labels. Give the "
            "loader a `collate_fn`, e.g. transformers' DataCollatorForLanguageModeling(tokenizer, mlm=False). "
            f"{_REMEDY}"
        )
    if missing := next((name for name in required if name not in batch), None):
        raise UserError(
            f"{what}: `{missing}` is missing, expected {_FIELDS[missing].expected}; it holds "
            f"{', '.join(map(str, batch)) or 'nothing'}. Add it in the loader's `collate_fn`. {_REMEDY}"
        )
    shape = getattr(batch["input_ids"], "shape", None)
    for name in (name for name in _FIELDS if name in batch):
        _check_field(name, batch[name], shape, what, device)
    limits = {"input_ids": pieces, "labels": pieces, "source_ids": sources, "attention_mask": 2}
    for name in (name for name in _FIELDS if name in batch):
        _check_values(name, batch[name], limits.get(name), what)


def _check_field(name: str, value: Any, shape: Any, what: str, device: torch.device) -> None:
    field = _FIELDS[name]
    if not isinstance(value, Tensor):
        raise UserError(f"{what}: `{name}` is a {type(value).__name__}, expected {field.expected}. {_REMEDY}")
    if value.dtype not in field.dtypes:
        raise UserError(
            f"{what}: `{name}` is {str(value.dtype).removeprefix('torch.')}, expected {field.expected}. Convert it in "
            f"the loader's `collate_fn`. {_REMEDY}"
        )
    allowed = [shape, shape[:1]] if field.by_row else [shape]
    if value.ndim == 0 or len(shape) != 2 or value.shape not in allowed:
        of_ids = "" if name == "input_ids" else f" where `input_ids` has {list(shape)}"
        raise UserError(
            f"{what}: `{name}` has the shape {list(value.shape)}{of_ids}, expected {field.expected}. Pad rows to one "
            f"length, and keep the dimension of rows. {_REMEDY}"
        )
    if value.device.type != device.type:
        raise UserError(
            f"{what}: `{name}` is on {value.device}, expected {device}. Leave `transfer_batch_to_device` to Lightning, "
            f"or move every tensor in it. {_REMEDY}"
        )


def _check_values(name: str, value: Tensor, limit: int | None, what: str) -> None:
    field = _FIELDS[name]
    if value.dtype is torch.bool or not value.numel():
        return
    strange = value < field.least
    if limit is not None:
        strange |= value >= limit
    if name == "labels":
        strange &= value != IGNORED
    if not bool(strange.any()):
        return
    remedy = "Take the tokenizer of the base, or one that `model.init_args.tokenizer` names"
    if name == "source_ids":
        remedy = "Name every source in `source_names(stage)` of the data module, or leave `source_ids` out"
    elif limit is None or int(value.min()) < field.least:
        remedy = _REMEDY
    most = "" if limit is None else f" to {limit - 1}"
    raise UserError(
        f"{what}: `{name}` holds {int(value[strange][0])}, expected {field.least}{most}"
        f"{' or more' if limit is None else ''}{' or -100' if name == 'labels' else ''}. {remedy}"
    )


def complete_batch(batch: MutableMapping[str, Tensor], *, is_scored: bool) -> None:
    """Add what a batch leaves out, on its device and without waiting for it.

    Without ``document_ids``, a document begins where ``position_ids`` begin again, else each row is one; tokens with
    an ``attention_mask`` of 0 are padding. Without ``position_ids``, documents are isolated. Without ``source_ids``,
    all is of the only source; one source a row becomes one a position.

    Args:
        batch: Batch that has passed `check_batch`; it is changed.
        is_scored: Add ``label_bytes``, 0 where they are not known, and ``text_mask``, by which every label is text.
    """
    if "document_ids" not in batch:
        batch["document_ids"] = _document_ids(batch)
    documents_BS = batch["document_ids"]
    if "position_ids" not in batch:
        batch["position_ids"] = _position_ids(documents_BS)
    sources = batch.get("source_ids", documents_BS.new_zeros(len(documents_BS)))
    if sources.ndim == 1:  # one a row
        batch["source_ids"] = torch.where(documents_BS >= 0, sources[:, None], -1).short()
    if is_scored:
        batch.setdefault("label_bytes", torch.zeros_like(documents_BS))
        batch.setdefault("text_mask", torch.ones_like(documents_BS, dtype=torch.bool))


def _document_ids(batch: Mapping[str, Tensor]) -> Tensor:
    documents_BS = torch.zeros_like(batch["input_ids"], dtype=torch.int32)
    if "position_ids" in batch:
        documents_BS = document_starts(batch["position_ids"]).cumsum(1, dtype=torch.int32) - 1
    if "attention_mask" in batch:
        documents_BS = documents_BS.masked_fill(batch["attention_mask"] == 0, -1)
    return documents_BS


def _position_ids(documents_BS: Tensor) -> Tensor:
    """Count from 0 in each document; padding is one, too, so that it attends to no other."""
    starts_BS = F.pad(documents_BS.diff(dim=1) != 0, (1, 0), value=True)
    place_S = torch.arange(documents_BS.shape[1], device=documents_BS.device)
    return place_S - torch.where(starts_BS, place_S, 0).cummax(1).values
