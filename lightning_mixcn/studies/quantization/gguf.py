"""A GGUF file of a mixture: its sizes, how far its weights are from a checkpoint's, and its likelihood of text.

Everything is read with other people's programs: the package gguf, and llama.cpp through llama-cpp-python.

Legend: B rows, S positions of a row, N tokens of a document's piece, V vocabulary, n weights of a piece.
"""

import re
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_mixcn.errors import MissingFileError, UserError, require_package
from lightning_mixcn.model.architectures import architecture_of
from lightning_mixcn.model.checkpoints.folder import Checkpoint
from lightning_mixcn.model.checkpoints.layout import StoredWeight
from lightning_mixcn.model.checkpoints.reading import model_config

from .weights import Sizes, error_of, rounded_entries

_PACKAGES = ("gguf", "llama_cpp")
_LEAVES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
}
_FLOAT32_CACHE = 0  # ggml's number of the type; the cache's default, float16, moves logits by 0.02


def file_identity(path: str) -> dict[str, Any]:
    """Return what changes when a GGUF file does; nothing of it is read.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a package that reads it is not installed.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise MissingFileError(f"`gguf` has {path!r}, which is no file. Make one with `mixcn export --format gguf`")
    for module in _PACKAGES:
        require_package(module, "`gguf`")
    stat = file.stat()
    return {"path": str(file), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


class GGUFFile:
    """A file, of which headers have been read.

    Args:
        path: The file.
        checkpoint: Checkpoint of the model that it was made of.

    Attributes:
        path: The file.
        sizes: Sizes of its tensors.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a package is not installed, or it is no GGUF of this model.
    """

    def __init__(self, path: str, checkpoint: Checkpoint) -> None:
        """Read the headers, and compare names and shapes with the checkpoint's."""
        self.path, self._checkpoint = Path(file_identity(path)["path"]), checkpoint
        self._config = model_config(checkpoint)
        self._entries = rounded_entries(checkpoint)
        self._tensors = self._read()
        rounded = [self._tensors[_gguf_name(entry)] for entry in self._entries]
        self.sizes = Sizes(
            sum(int(tensor.n_bytes) for tensor in self._tensors.values()),
            sum(int(tensor.n_elements) for tensor in self._tensors.values()),
            sum(int(tensor.n_bytes) for tensor in rounded),
            sum(int(tensor.n_elements) for tensor in rounded),
        )

    def relative_error(self) -> float:
        """Compute what `relative_error` does; one tensor at a time is decoded, into float32."""
        from gguf.quants import dequantize

        held: dict[str, Tensor] = {}

        def decoded(entry: StoredWeight, start: int, count: int) -> Tensor:
            if entry.name not in held:
                held.clear()
                tensor = self._tensors[_gguf_name(entry)]
                held[entry.name] = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type))).flatten()
                if heads := self._rotated_heads(entry):
                    held[entry.name] = _halves(held[entry.name], heads, entry.shape[-1])
            return held[entry.name][start : start + count]

        return error_of(self._entries, self._checkpoint, decoded)

    def open(self, sequence_length: int, *, use_gpu: bool) -> "GGUFLikelihood":
        """Load the weights into llama.cpp."""
        return GGUFLikelihood(self.path, sequence_length, use_gpu=use_gpu)

    def _read(self) -> dict[str, Any]:
        from gguf import GGUFReader

        try:
            reader = GGUFReader(self.path)
        except (ValueError, IndexError, KeyError) as error:
            raise UserError(f"`gguf`: {str(self.path)!r} is no whole GGUF file ({error}). Make it again") from error
        tensors = {str(tensor.name): tensor for tensor in reader.tensors}
        wanted = {_gguf_name(entry): prod(entry.shape) for entry in self._entries}
        vocabulary = self._config.vocab_size * self._config.hidden_size
        for name, numel in {**wanted, "token_embd.weight": vocabulary}.items():
            found = int(tensors[name].n_elements) if name in tensors else 0
            if found != numel:
                raise UserError(
                    f"`gguf`: {str(self.path)!r} has {found:,} weights in {name}, but the model has {numel:,}. Give a "
                    "file that was made of this model"
                )
        return tensors

    def _rotated_heads(self, entry: StoredWeight) -> int:
        """Count the heads of a projection whose rows llama.cpp orders otherwise; 0 if it does not."""
        if not architecture_of(self._config).gguf_pairs:
            return 0
        if entry.name.endswith("q_proj"):
            return int(self._config.num_attention_heads)
        return int(self._config.num_key_value_heads) if entry.name.endswith("k_proj") else 0


class GGUFLikelihood:
    """llama.cpp with a file's weights.

    Args:
        path: The file.
        sequence_length: Tokens of the longest piece of a document.
        use_gpu: Let llama.cpp use a GPU, if it was built for one.

    Raises:
        ValueError: llama.cpp cannot load the file.
    """

    def __init__(self, path: Path, sequence_length: int, *, use_gpu: bool) -> None:
        from llama_cpp import Llama

        try:
            self._llama: Any = Llama(
                model_path=str(path), n_ctx=sequence_length, logits_all=True, verbose=False,
                n_gpu_layers=-1 if use_gpu else 0, type_k=_FLOAT32_CACHE, type_v=_FLOAT32_CACHE,
                n_threads=torch.get_num_threads(), n_threads_batch=torch.get_num_threads(),
            )  # fmt: skip
        except ValueError as error:
            raise UserError(f"`gguf`: llama.cpp cannot load {str(path)!r} ({error}). Make the file again") from error

    def nll(self, batch: dict[str, Tensor]) -> Tensor:
        """Score a batch, each document's piece alone, by its token ids.

        Args:
            batch: An evaluation batch.

        Returns:
            float32 ``[B, S]``, nats of each label, 0 where there is none.
        """
        nll_BS = torch.zeros(batch["labels"].shape)
        for row, number_S in enumerate(batch["document_ids"]):
            for number in range(int(number_S.max()) + 1):
                place_N = (number_S == number).nonzero().flatten()
                ids_N = batch["input_ids"][row, place_N]
                self._llama.reset()
                self._llama.eval(ids_N.tolist())
                logits_NV = torch.from_numpy(self._llama.scores[: len(ids_N)])
                piece_N = torch.nn.functional.cross_entropy(logits_NV[:-1], ids_N[1:], reduction="none")
                nll_BS[row, place_N[1:]] = piece_N
        return nll_BS.masked_fill(batch["labels"] < 0, 0.0)

    def close(self) -> None:
        """Give the memory back."""
        self._llama.close()


def _gguf_name(entry: StoredWeight) -> str:
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", entry.name)
    assert match is not None, entry.name
    return f"blk.{match[1]}.{_LEAVES[match[2]]}.weight"


def _halves(values_n: Tensor, heads: int, columns: int) -> Tensor:
    """Undo llama.cpp's order of rows, which rotates neighbouring dimensions where transformers rotates two halves."""
    return values_n.view(heads, -1, 2, columns).transpose(1, 2).flatten()
