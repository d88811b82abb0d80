"""The model that preference optimisation stays near: the trained one as it was before the first step.

It is never a second model. The frozen weights, in 4 bits, are shared; what differs is what trains, and of that there
are three ways to have the start: leave it out where it adds nothing yet (a new adapter), keep a copy (a continued
adapter, trained embeddings), or compute the losses of all answers' tokens before the first step.

Legend: B rows, S positions of a row.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_mixcn.errors import UserError
from lightning_mixcn.files.atomic import new_file
from lightning_mixcn.files.safetensors import SafetensorsFile, write_safetensors
from lightning_mixcn.metrics import scored_positions
from lightning_mixcn.model.sharding import local_shard

FILE = "reference.safetensors"
_TENSORS = {"start": torch.uint8, "answers": torch.int64, "tokens": torch.int64, "nll": torch.float32}


class StartingValues:
    """A copy of what trains, of this rank's shards, in the compute dtype.

    That is the dtype in which factors take part in a product, so nothing is lost; trained embeddings likewise.

    Args:
        model: The model before its first step.
        dtype: Compute dtype.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Copy the values."""
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._copies = [(parameter, local_shard(parameter)[0].to(dtype, copy=True)) for parameter in trained]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Compute with the starting values; the present ones come back bit for bit."""
        with torch.no_grad():
            present = [local_shard(parameter)[0].clone() for parameter, _ in self._copies]
            for parameter, start in self._copies:
                local_shard(parameter)[0].copy_(start)
        try:
            yield
        finally:
            with torch.no_grad():
                for (parameter, _), values in zip(self._copies, present, strict=True):
                    local_shard(parameter)[0].copy_(values)


def answer_keys(batch: Mapping[str, Tensor]) -> Iterator[tuple[int, NDArray[np.int64], int]]:
    """Name the answers of a batch on the CPU by what they are.

    Yields:
        Row of an answer, positions of its labels, and a hash of its tokens, its prompt's and of which are labels, an
        int64.
    """
    ids, documents = batch["input_ids"].numpy(), batch["document_ids"].numpy()
    scored = scored_positions(batch["labels"]).numpy()
    for row in range(len(ids)):
        edges = np.flatnonzero(np.diff(documents[row], prepend=-2, append=-2)).tolist()
        for start, stop in pairwise(edges):
            own = slice(start, stop)
            if documents[row, start] >= 0 and scored[row, own].any():
                content = ids[row, own].tobytes() + scored[row, own].tobytes()
                key = hashlib.blake2b(content, digest_size=8).digest()
                yield row, np.flatnonzero(scored[row, own]) + start, int.from_bytes(key, "little", signed=True)


def answer_losses(nll_BS: Tensor, batch: Mapping[str, Tensor]) -> dict[int, NDArray[np.float32]]:
    """Return the losses of each answer's tokens in nats, by its key of `answer_keys`.

    Args:
        nll_BS: Loss of each label, 0 where there is none, on any device.
        batch: The batch on the CPU.
    """
    losses_BS = nll_BS.detach().cpu().numpy()
    return {key: losses_BS[row, own] for row, own, key in answer_keys(batch)}


class PrecomputedReference:
    """Losses of the tokens of every answer of a run, by what the answer is; 4 bytes a token.

    Args:
        answers: Losses in nats by key of `answer_keys`, see `answer_losses`.
    """

    def __init__(self, answers: Mapping[int, NDArray[np.float32]]) -> None:
        """Keep the values."""
        self._answers = answers

    def nll(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the loss of each label, float32 ``[B, S]``, 0 where there is none.

        Args:
            batch: A batch on the CPU.

        Raises:
            ValueError: an answer is not among those computed.
        """
        nll_BS = torch.zeros(batch["input_ids"].shape, dtype=torch.float32)
        for row, own, key in answer_keys(batch):
            if key not in self._answers:
                raise UserError(
                    f"`reference: precompute`: {FILE} lacks an answer: the text, the template or the tokenizer is "
                    "another than when it was written. Begin a new run"
                )
            nll_BS[row, own] = torch.from_numpy(self._answers[key])
        return nll_BS

    def write(self, path: Path, start: bytes) -> None:
        """Write the values.

        Args:
            path: File to make or replace.
            start: Digest of what they were computed with.
        """
        keys = sorted(self._answers)
        losses = [self._answers[key] for key in keys]
        tensors = {
            "start": torch.tensor(list(start), dtype=torch.uint8),
            "answers": torch.tensor(keys, dtype=torch.int64),
            "tokens": torch.tensor([len(each) for each in losses], dtype=torch.int64),
            "nll": torch.from_numpy(np.concatenate([np.zeros(0, np.float32), *losses])),
        }
        with new_file(path, replace=True) as unfinished:
            write_safetensors(unfinished, tensors, with_sum=True)

    @classmethod
    def read(cls, path: Path, start: bytes) -> Self:
        """Read what `write` has written.

        Args:
            path: The file.
            start: Digest of what this run computes with.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is broken, or was computed with something else.
        """
        file = SafetensorsFile(path)
        if {name: entry.dtype for name, entry in file.entries.items()} != _TENSORS:
            raise UserError(f"{str(path)!r} holds no losses of a reference. Restore it from a copy")
        file.check_sum()
        if bytes(file.read("start").tolist()) != start:
            raise UserError(
                f"`reference: precompute`: {str(path)!r} was computed with another base, adapter, text or template. "
                "Restore the file of this run, or begin a new one"
            )
        losses = np.split(file.read("nll").numpy(), np.cumsum(file.read("tokens").numpy())[:-1])
        return cls(dict(zip(file.read("answers").tolist(), losses, strict=True)))


def digest(*parts: Any) -> bytes:
    """Return 16 bytes that depend on plain values."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).digest()
