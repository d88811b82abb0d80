"""Add what instruction tuning changed in a base, ``w·(W_instruct − W_base)``, to every weight of an exported model.

A base that was adapted to a language on plain text answers in conversations once this difference is added to it: the
chat vector of Huang et al. 2023 (https://arxiv.org/abs/2310.04799), or instruction residual of Jindal et al. 2024
(https://arxiv.org/abs/2410.10739). No instruction data of that language is needed.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from lightning_mixcn.errors import MissingFileError, UserError
from lightning_mixcn.files.atomic import write_json
from lightning_mixcn.files.hub import local_folder, public_name
from lightning_mixcn.files.json_object import read_object
from lightning_mixcn.model.architectures import architecture_of
from lightning_mixcn.model.architectures.record import head_size
from lightning_mixcn.model.checkpoints.folder import Checkpoint
from lightning_mixcn.model.checkpoints.reading import is_quantised, model_config
from lightning_mixcn.model.checkpoints.writer import ShardWriter
from lightning_mixcn.model.lora.adapter_file import EMBEDDINGS
from lightning_mixcn.tokenizer.files import generation_files, tokenizer_files
from lightning_mixcn.tokenizer.pieces import TokenizerPieces, has_tokenizer

from .merge import BaseWeights

# Elements that are summed at a time: 16 MB of float32 each of base, instruct model and sum.
_CHUNK = 2**22
_TUNED = "Give the instruct model that was tuned from this very base"
# A model with another of these computes otherwise with the same weights, so their difference means nothing.
_SHARED = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "num_local_experts",
    "num_experts_per_tok", "norm_topk_prob", "clip_qkv", "hidden_act", "rms_norm_eps", "sliding_window",
    "rope_parameters",
)  # fmt: skip
_CONFIG = "tokenizer_config.json"
_OF_CHAT = ("chat_template", "bos_token", "eos_token", "pad_token", "add_bos_token", "add_eos_token")
_CHAT_FILES = ("special_tokens_map.json", "chat_template.jinja", "chat_template.json")


class InstructDelta:
    """The difference between an instruct model and the base that it was tuned from, weight by weight.

    Args:
        instruct: Folder or hub id of the instruct model, with experts' weights in either layout.
        weight: Factor w of the difference.
        checkpoint: The unquantised base.
        base: Its weights.
        tokenizer: Folder of the exported model's tokenizer, which may have more pieces than the instruct model's.

    Attributes:
        config: Content of the instruct model's ``config.json``.
        made: Sentence for the card.
        name: The instruct model's public name.

    Raises:
        FileNotFoundError: the instruct model, or its tokenizer, is not there.
        ValueError: it is quantised, no other model than the base, or none that was tuned from it.
    """

    def __init__(
        self, instruct: str, weight: float, checkpoint: Checkpoint, base: BaseWeights, tokenizer: Path
    ) -> None:
        """Compare everything but the weights' values."""
        where, tuned = f"`instruct_delta={instruct!r}`", Checkpoint(instruct)
        if is_quantised(tuned):
            raise UserError(f"{where} is in 4 bits. Give the unquantised instruct model")
        if tuned.sha256 == checkpoint.sha256:
            raise UserError(f"{where} is the base itself, so there is no difference to add. {_TUNED}, or leave it out")
        _check_config(where, model_config(tuned), base.config)
        self._weights = BaseWeights(tuned, dequantised=False)
        self._weight, self._folder, self.config = weight, tuned.path, tuned.config
        self._pieces = pieces_folder(instruct, tokenizer)
        # Rows beyond the instruct model's pieces are of pieces that it never saw, even where it has rows to spare.
        extended = self._pieces != self._folder
        self._rows = len(TokenizerPieces(self._folder)) if extended else self._weights.config.vocab_size
        self.name = public_name(tuned.name)
        self.made = (
            f" To every weight {weight:g} times the difference between `{self.name}` and the base was added (a chat "
            "vector, arXiv 2310.04799)."
        )

    def matrices(self, module: str) -> Iterator[Tensor]:
        """Read the instruct model's matrices of a module one after the other."""
        return self._weights.matrices(module)

    def add(self, name: str, values: Tensor, base: Tensor, instruct: Tensor, dtype: torch.dtype) -> Tensor:
        """Return ``values + w·(instruct − base)``, computed in float32 and rounded once.

        Args:
            name: Name of the matrix.
            values: Base with adapters ``[out, in]``; an extended embedding has more rows.
            base: ``[out, in]``; overwritten with the result where that fits into it, to save the memory.
            instruct: The instruct model's; of a vocabulary, it may have fewer rows.
            dtype: Dtype of the result.
        """
        rows = min(self._rows, len(instruct)) if name in EMBEDDINGS else len(base)
        fits = base.dtype == dtype and base.shape == values.shape
        result = base if fits else torch.empty(values.shape, dtype=dtype)
        step = max(1, _CHUNK // (values.numel() // len(values)))
        for first in range(0, rows, step):
            part = slice(first, min(first + step, rows))
            difference = instruct[part].float() - base[part].float()
            result[part] = torch.add(values[part].float(), difference, alpha=self._weight)
        result[rows:] = values[rows:]
        return result

    def write_files(self, writer: ShardWriter) -> None:
        """Write the instruct model's tokenizer, chat template and generation config.

        An extended tokenizer keeps its pieces, and gets what the instruct model says about conversations.

        Args:
            writer: Writer of the exported folder.
        """
        files = tokenizer_files(self._folder)
        if self._pieces != self._folder:
            files = [file for file in files if file.name in _CHAT_FILES]
            files += [file for file in tokenizer_files(self._pieces) if file.name not in (*_CHAT_FILES, _CONFIG)]
            write_json(writer.folder / _CONFIG, _chat_settings(self._pieces, self._folder), indent=1)
        for file in [*files, *generation_files(self._folder)]:
            writer.add_file(file)


def pieces_folder(instruct: str, tokenizer: Path) -> Path:
    """Return the folder whose pieces a model with an instruct delta has.

    Args:
        instruct: Folder or hub id of the instruct model.
        tokenizer: Folder of the exported model's own tokenizer; without one, nothing is compared.

    Returns:
        The instruct model's, or `tokenizer` where that has further pieces.

    Raises:
        FileNotFoundError: the instruct model has no tokenizer.
        ValueError: an id is of another piece in each.
    """
    folder, where = local_folder(instruct), f"`instruct_delta={instruct!r}`"
    if not has_tokenizer(folder):
        raise MissingFileError(f"{where} has no tokenizer, which the exported model needs. Copy its own there")
    if not has_tokenizer(tokenizer):
        return folder
    theirs, ours = TokenizerPieces(folder), TokenizerPieces(tokenizer)
    for index, (their, our) in enumerate(zip(theirs.pieces, ours.pieces, strict=False)):
        if None not in (their, our) and their != our:
            raise UserError(
                f"{where} has the piece {their!r} for the id {index}, the model to export has {our!r}, so that one row "
                "of the embedding would mean two things. Give an instruct model with the base's tokenizer"
            )
    return tokenizer if len(ours) > len(theirs) else folder


def _chat_settings(tokenizer: Path, instruct: Path) -> dict[str, Any]:
    """Return an extended tokenizer's settings with those of conversations from the instruct model."""
    ours, theirs = (
        read_object(folder / _CONFIG) if (folder / _CONFIG).is_file() else {} for folder in (tokenizer, instruct)
    )
    of_chat = {key: theirs[key] for key in _OF_CHAT if key in theirs}
    return {key: value for key, value in ours.items() if key not in _OF_CHAT} | of_chat


def _check_config(where: str, instruct: PreTrainedConfig, base: PreTrainedConfig) -> None:
    """Refuse an instruct model whose weights cannot be compared with the base's, one by one."""
    if instruct.model_type != base.model_type:
        raise UserError(f"{where} is of the family {instruct.model_type}, the base of {base.model_type}. {_TUNED}")
    if instruct.tie_word_embeddings != base.tie_word_embeddings:
        has, not_, remedy = "one matrix", "two", "Save it with a head of its own, a copy of its embedding"
        if base.tie_word_embeddings:
            has, not_, remedy = not_, has, "Train on a copy of the base that has a head of its own"
        raise UserError(
            f"{where} has {has} for embed_tokens and lm_head (tie_word_embeddings={instruct.tie_word_embeddings}), the "
            f"base has {not_}. {remedy} and tie_word_embeddings=false"
        )
    keys = (*_SHARED, architecture_of(base).expert_width)
    pairs = {key: (getattr(instruct, key, None), getattr(base, key, None)) for key in keys}
    for key, (theirs, ours) in (pairs | {"head_dim": (head_size(instruct), head_size(base))}).items():
        if theirs != ours:
            raise UserError(f"{where} has {key}={theirs!r}, the base has {ours!r}. {_TUNED}")
    if instruct.vocab_size > base.vocab_size:
        raise UserError(
            f"{where} has {instruct.vocab_size} rows of embedding and head, the base has {base.vocab_size}: of the "
            f"further ones there is no difference. {_TUNED}, whose vocabulary is the base's"
        )
