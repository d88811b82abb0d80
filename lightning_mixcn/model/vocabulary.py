"""Give embedding and head new rows for the pieces that an extended tokenizer has beyond the base's.

The mean of the rows of the old pieces that a new piece was written with before is the start that Hewitt (2021,
https://nlp.stanford.edu/~johnhew/vocab-expansion.html) argues for, narrowed to those pieces, as in Chinese-LLaMA's
successors; `random` is what `resize_token_embeddings` of the paper's predecessors did. `multivariate` is Hewitt's other
start, compared with means in arXiv 2407.05841. transformers' `resize_token_embeddings(mean_resizing=True)` names the
same, but draws with 1e-9 of the covariance, which is the mean but for the seventh digit or so.

Legend: N = new rows, H = hidden.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from lightning_mixcn.errors import UserError
from lightning_mixcn.files.hub import local_folder
from lightning_mixcn.tokenizer.pieces import TokenizerPieces, has_tokenizer

from .causal_lm import MoeForCausalLM
from .checkpoints.folder import Checkpoint
from .lora.adapter_file import EMBEDDINGS, AdapterFile
from .sharding import local_shard

NewRows = Literal["mean", "byte_mean", "multivariate", "random", "zeros"]

# Rows drawn at a time: 16 MB of float32 at a width of 4,096.
_ROWS = 1024


class RowDistribution(NamedTuple):
    """A normal distribution of rows, float64.

    Args:
        mean: ``[H]``.
        root: ``[H, H]``, the lower triangle L of which L Lᵀ is the covariance.
    """

    mean: Tensor
    root: Tensor


# Added to the covariance's diagonal, of the mean variance: one of fewer rows than H is singular. 1e-5 of a deviation.
_JITTER = 1e-10


@dataclass(frozen=True)
class VocabularyExtension:
    """Rows that a model has beyond its base's pieces.

    A base may have rows to spare: Qwen3 has 267 more than its tokenizer has pieces, none of which was trained. New
    pieces take these first; those that are left over stay as they are.

    Args:
        checkpoint: The base.
        rows: Rows of embedding and head, in all.
        new_rows: Start of the new ones.
        old: The base's pieces; ``None`` where an adapter brings all rows.
        new: The extended tokenizer's.
        seed: Seed of ``random`` and ``multivariate``.
    """

    checkpoint: Checkpoint
    rows: int
    new_rows: NewRows = "mean"
    old: TokenizerPieces | None = None
    new: TokenizerPieces | None = None
    seed: int = 0

    def grow(self, model: MoeForCausalLM) -> None:
        """Give a meta model its further rows, before anything is trained, sharded or allocated."""
        embedding, head = model.model.embed_tokens, model.lm_head
        for module in (embedding, head):
            weight = torch.empty(self.rows, module.weight.shape[1], dtype=module.weight.dtype, device="meta")
            module.weight = nn.Parameter(weight, requires_grad=False)
        embedding.num_embeddings = head.out_features = self.rows
        if model.config.tie_word_embeddings:
            head.weight = embedding.weight
        model.config.vocab_size = model.vocab_size = model.model.vocab_size = self.rows

    def fill(self, model: MoeForCausalLM) -> None:
        """Write what this rank holds of the new rows; the same for any number of ranks."""
        if self.old is None:
            return
        names = EMBEDDINGS[:1] if model.config.tie_word_embeddings else EMBEDDINGS
        for name in names:
            weight: Any = model.get_submodule(name).weight
            held, first_held = local_shard(weight)
            for first in range(len(self.old), len(self._new), _ROWS):
                last = min(first + _ROWS, len(self._new))
                start, stop = max(first, first_held), min(last, first_held + len(held))
                if start < stop:
                    values_NH = self._values(name, first, last, model.config)
                    held[start - first_held : stop - first_held] = values_NH[start - first : stop - first].to(held)

    def _values(self, name: str, first: int, last: int, config: PreTrainedConfig) -> Tensor:
        """Return rows ``first`` to ``last`` of one matrix, float32 on the CPU."""
        values_NH = torch.zeros(last - first, config.hidden_size)
        # A seed for each block, so that a rank need not draw what it does not hold; torch's generator of the CPU takes
        # 32 bits of it, hence a hash.
        digest = hashlib.blake2b(f"{self.seed} {name} {first}".encode(), digest_size=4).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest))
        if self.new_rows == "random":
            return values_NH.normal_(std=config.initializer_range, generator=generator)
        if self.new_rows == "multivariate":
            mean_H, root_HH = self._distributions[name]
            return torch.addmm(mean_H, values_NH.double().normal_(generator=generator), root_HH.mT).float()
        if self.new_rows in ("mean", "byte_mean"):
            table = self._old_rows[name]
            for row, (ids, shares_P) in enumerate(self._parts[first - len(self._old) : last - len(self._old)]):
                values_NH[row] = shares_P @ torch.stack([table[index] for index in ids])
        return values_NH

    @property
    def _old(self) -> TokenizerPieces:
        assert self.old is not None
        return self.old

    @property
    def _new(self) -> TokenizerPieces:
        assert self.new is not None
        return self.new

    @cached_property
    def _parts(self) -> list[tuple[list[int], Tensor]]:
        """For each new piece the old ids it is split into, and their shares, which sum to 1."""
        parts = []
        for piece in self._new.pieces[len(self._old) :]:
            # An id without a piece never occurs; a piece that the old tokenizer cannot write has no part.
            ids = self._old.split(piece) if piece else []
            weights = [self._old.num_bytes(index) if self.new_rows == "byte_mean" else 1 for index in ids]
            shares_P = torch.tensor(weights, dtype=torch.float32)
            parts.append((ids, shares_P / shares_P.sum()) if sum(weights) else ([0], torch.zeros(1)))
        return parts

    @cached_property
    def _old_rows(self) -> dict[str, dict[int, Tensor]]:
        """The rows of the base that are needed, by matrix and id; read from its files, whatever this rank holds."""
        wanted = sorted({index for ids, _ in self._parts for index in ids})
        return {
            name: {index: self.checkpoint.read_rows(key, index, index + 1)[0].float() for index in wanted}
            for name in EMBEDDINGS
            if (key := f"{name}.weight") in self.checkpoint
        }

    @cached_property
    def _distributions(self) -> dict[str, RowDistribution]:
        """Mean and covariance of the old pieces' rows, by matrix; read from the base's files, `_ROWS` at a time."""
        return {name: self._distribution(key) for name in EMBEDDINGS if (key := f"{name}.weight") in self.checkpoint}

    def _distribution(self, key: str) -> RowDistribution:
        count, origin_H = len(self._old), self.checkpoint.read_rows(key, 0, 1)[0].double()
        sum_H = torch.zeros_like(origin_H)
        products_HH = torch.zeros(len(sum_H), len(sum_H), dtype=torch.float64)
        for first in range(0, count, _ROWS):
            # From the first row, not from 0: little is lost where the mean is large beside the deviations.
            rows_NH = self.checkpoint.read_rows(key, first, min(first + _ROWS, count)).double() - origin_H
            sum_H += rows_NH.sum(0)
            products_HH.addmm_(rows_NH.mT, rows_NH)
        mean_H = sum_H / count
        covariance_HH = products_HH.div_(count).addr_(mean_H, mean_H, alpha=-1)
        variances_H = covariance_HH.diagonal()
        variances_H += _JITTER * variances_H.mean() + torch.finfo(torch.float64).tiny  # rows that are all alike, too
        return RowDistribution(origin_H + mean_H, torch.linalg.cholesky(covariance_HH))


def find_extension(
    checkpoint: Checkpoint,
    config: PreTrainedConfig,
    *,
    tokenizer: str | Path | None,
    new_rows: NewRows,
    train_embeddings: bool,
    adapter: AdapterFile | None,
    seed: int,
) -> VocabularyExtension | None:
    """Find out whether a tokenizer, or an adapter, needs more rows than a base has.

    Args:
        checkpoint: The base.
        config: Its configuration.
        tokenizer: Folder or hub id of the tokenizer; ``None`` for the base's.
        new_rows: Start of the new rows.
        train_embeddings: The rows will train.
        adapter: Adapter to continue from, which may hold more rows than the base.
        seed: Seed of ``random`` and ``multivariate``.

    Returns:
        The extension, ``None`` where there is no new piece.

    Raises:
        ValueError: the tokenizer does not continue the base's, the rows would not train, or the adapter has others.
        FileNotFoundError: the base, or the folder, has no tokenizer.
    """
    if new_rows not in get_args(NewRows):
        raise UserError(f"`new_rows={new_rows!r}` is not known. Expected one of {', '.join(get_args(NewRows))}")
    present = config.vocab_size
    stored = None if adapter is None else adapter.vocabulary_rows(tied=config.tie_word_embeddings)
    rows, old, new, further = max(stored or 0, present), None, None, 0
    if tokenizer is not None and (folder := local_folder(tokenizer)) != checkpoint.path:
        new = TokenizerPieces(folder)
        old = TokenizerPieces(checkpoint.path) if has_tokenizer(checkpoint.path) else None
        if old is not None:
            _check_continues(old, new, checkpoint)
            further = len(new) - len(old)
        rows = max(len(new), present)
        if stored not in (None, rows):
            raise UserError(
                f"`adapter={adapter and adapter.name!r}` has {stored} rows of embedding and head, "
                f"`tokenizer={str(tokenizer)!r}` needs {rows}. Give the tokenizer that the adapter was trained with; a "
                "merged model (`mixcn export`) can be extended again"
            )
    if rows == present and (not further or stored is not None):  # an adapter brings all rows
        return None
    if not train_embeddings and rows == present:
        raise UserError(
            f"`tokenizer={str(tokenizer)!r}` has {further} pieces that the base's lacks. Rows of the base are free for "
            "them, but were never trained: they must train. Set `train_embeddings: true`, or leave it out"
        )
    if not train_embeddings:
        asks = f"`adapter={adapter and adapter.name!r}`" if new is None else f"`tokenizer={str(tokenizer)!r}`"
        raise UserError(
            f"{asks} needs {rows} rows of embedding and head, but the base has {present}: the new ones must train. "
            "Set `train_embeddings: true`, or leave it out"
        )
    if stored is not None:
        return VocabularyExtension(checkpoint, rows)
    if old is None or len(old) > present:
        raise UserError(
            f"`tokenizer={str(tokenizer)!r}` has {rows} pieces and the base {str(checkpoint.path)!r} {present} rows, "
            "but no tokenizer that fits them and says which pieces are new. Put the base's own tokenizer there"
        )
    return VocabularyExtension(checkpoint, rows, new_rows, old, new, seed)


def tokenizer_for(base: str, tokenizer: str | None, adapter: str | None) -> str:
    """Find the tokenizer that a model is trained or evaluated with.

    Embeddings that an adapter brings belong to the pieces of the tokenizer that it was trained with.

    Args:
        base: Folder or hub id of the base.
        tokenizer: The one that was asked for; ``None`` where none was.
        adapter: PEFT adapter folder to continue from, or ``None``.

    Returns:
        ``tokenizer`` if it is given; else the adapter's own where it has one and brings embeddings; else the base's.

    Raises:
        ValueError: the one that was asked for has other pieces than the adapter's.
        FileNotFoundError: there is no such adapter.
    """
    if adapter is None:
        return tokenizer or base
    stored = AdapterFile(adapter)
    if not stored.saved or not has_tokenizer(stored.folder):
        return tokenizer or base
    if tokenizer is None:
        return adapter
    if (given := local_folder(tokenizer)) != stored.folder:
        asked, own = TokenizerPieces(given).pieces, TokenizerPieces(stored.folder).pieces
        if asked != own:
            raise UserError(
                f"`tokenizer={tokenizer!r}` has {len(asked)} pieces, but the embeddings of `adapter={adapter!r}` were "
                f"trained with another tokenizer, which is in its folder and has {len(own)}. Leave `tokenizer` out, or "
                "give that one"
            )
    return tokenizer


def _check_continues(old: TokenizerPieces, new: TokenizerPieces, checkpoint: Checkpoint) -> None:
    if len(new) < len(old):
        raise UserError(
            f"`tokenizer={str(new.folder)!r}` has {len(new)} pieces, fewer than the {len(old)} of the base "
            f"{str(checkpoint.path)!r}. Give an extension of the base's tokenizer, as `mixcn vocab merge` writes it"
        )
    for index, piece in enumerate(old.pieces):
        if piece is not None and new.pieces[index] != piece:
            raise UserError(
                f"`tokenizer={str(new.folder)!r}` does not continue the base's: id {index} is {new.pieces[index]!r}, "
                f"in {str(checkpoint.path)!r} {piece!r}. Extend the base's own tokenizer with `mixcn vocab merge`"
            )
