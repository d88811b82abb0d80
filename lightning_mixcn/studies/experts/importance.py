"""How much worse a model predicts each document when an expert is disabled, for every expert of every layer.

`DisabledPasses` runs the model without each expert; what is measured here of a row is `_change`, its likelihood. The
pass of the model as it is measures what needs nothing else: how experts are used, and their saliency.

Legend: B rows, S positions of a row, T = B·S tokens, H hidden, G sources, L layers, E experts, V variants (mode and
expert) of a layer, D documents in the batch.
"""

from collections.abc import Iterator, Sequence
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_mixcn.errors import NonFiniteError
from lightning_mixcn.metrics import score_documents, scored_positions
from lightning_mixcn.metrics.expert_load import ExpertLoad
from lightning_mixcn.metrics.likelihood import per_position
from lightning_mixcn.model.experts.observe import observe_routing

from .disabling import AblatedLayer, Batch, DisabledPasses, Mode, output_cosines
from .flops import StudyFlops, pairs_of_rows

Arrays = dict[str, NDArray[Any]]
SAMPLE_TOKENS = 64


class ExpertImportance:
    """Disables every expert of a model, batch by batch and layer by layer.

    Args:
        model: A model of `load_moe` or the PeftModel around it, in evaluation mode.
        modes: Ways of disabling experts; none where only the model as it is is measured.
        num_sources: G.
        micro_batch_size: Rows of a batch, see `DisabledPasses`.

    Attributes:
        variants: Experts that are disabled in each layer, one at a time.
        num_layers: L.
        flops: Cost of a batch.
    """

    def __init__(self, model: nn.Module, modes: Sequence[Mode], num_sources: int, micro_batch_size: int) -> None:
        """Keep the arguments; nothing is computed yet."""
        self._model, self._num_sources = model, num_sources
        self._passes = DisabledPasses(model, modes, micro_batch_size)
        self.num_layers, self.num_experts = self._passes.num_layers, self._passes.num_experts
        self.variants = self._passes.variants
        self.flops = StudyFlops(self._passes.forward, self.num_experts, len(modes), "mask" in modes, SAMPLE_TOKENS)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Arrays:
        """Run the model as it is.

        Args:
            batch: An evaluation batch.

        Returns:
            ``nll`` float32 ``[B, S]``; of each document in the batch (its number in the evaluation set) ``document``,
            ``source``, ``tokens``, ``bytes`` int64 and ``nats``, ``text_nats`` float64 ``[D]``; of each source and
            layer ``load_counts`` int64 ``[G, L, E]``, ``load_tokens``, ``load_entropy_nats``, ``load_confidence``
            ``[G, L]``, ``pairs`` int64 ``[G, L, E, E]``, how many tokens chose both experts, and ``saliency`` float64
            ``[G, L, E]``, the sum of `AblatedLayer.saliency` over tokens; ``flops`` and ``seconds``.

        Raises:
            FloatingPointError: the likelihood is not finite.
        """
        start, batch = perf_counter(), self._passes.on_device(batch)
        source_BS = per_position(batch["source_ids"], batch["labels"]).long()
        group_T = torch.where(batch["document_ids"] >= 0, source_BS, -1).flatten()
        load = ExpertLoad(self._num_sources, self.num_layers, self.num_experts).to(group_T.device)
        shape = (self._num_sources, self.num_layers, self.num_experts, self.num_experts)
        pairs_GLEE = torch.zeros(shape, dtype=torch.int64)

        def observe(layer: int, logits_TE: Tensor, _weights_TK: Tensor, index_TK: Tensor) -> None:
            load.update(layer, logits_TE, index_TK, group_T)
            chosen_TE = torch.zeros_like(logits_TE, dtype=torch.float64).scatter_(1, index_TK, 1.0)
            for source in range(self._num_sources):
                chosen_nE = chosen_TE[group_T == source]
                pairs_GLEE[source, layer] += (chosen_nE.t() @ chosen_nE).long().cpu()

        saliency_GLE = torch.zeros(shape[:-1], dtype=torch.float64)
        is_in_GT = group_T == torch.arange(self._num_sources, device=group_T.device)[:, None]
        with observe_routing(self._model, observe):
            for number, layer in self._passes.layers(batch, range(self.num_layers), variants=()):
                # A product with zero would keep a NaN of padding.
                saliency_TE = layer.saliency().where(group_T[:, None] >= 0, 0.0)
                saliency_GLE[:, number] = (is_in_GT.double() @ saliency_TE).cpu()
                hidden_BSH = layer.output()
        base = self._passes.base
        nll_BS = base.lm_head(base.model.norm(hidden_BSH), batch["labels"])
        scores = score_documents(nll_BS, batch)
        if not bool(torch.isfinite(scores.nats).all()):
            raise NonFiniteError(
                "The likelihood of the unchanged model is not finite. Check the checkpoint or the adapter"
            )
        counted = zip(("counts", "tokens", "entropy_nats", "confidence"), load.compute(), strict=True)
        arrays = scores._asdict() | {f"load_{name}": part for name, part in counted}
        arrays |= {"nll": nll_BS, "pairs": pairs_GLEE, "saliency": saliency_GLE}
        flops = self.flops.base(batch["input_ids"].numel(), sum(pairs_of_rows(batch["position_ids"])))
        return _to_numpy(arrays) | _spent(flops, start)

    @torch.no_grad()
    def disable(self, batch: Batch, evaluated: Arrays, layers: Sequence[int]) -> Iterator[tuple[int, Arrays]]:
        """Disable every expert of some layers.

        Args:
            batch: The batch that ``evaluated`` is of.
            evaluated: Result of `evaluate`.
            layers: Numbers of the layers, ascending.

        Yields:
            Number of a layer, and of each variant and document the change ``nats`` and ``text_nats`` float64
            ``[V, D]``; the sum ``cosines`` float64 ``[E, E]`` of `output_cosines` over ``cosine_tokens`` tokens of the
            batch; ``flops``, ``seconds``.

        Raises:
            FloatingPointError: a likelihood is not finite.
        """
        batch, start = self._passes.on_device(batch), perf_counter()
        for number, layer in self._passes.layers(batch, layers, self.variants):
            yield number, self._measure(number, layer, batch, evaluated, start)
            start = perf_counter()

    def _measure(self, number: int, layer: AblatedLayer, batch: Batch, evaluated: Arrays, start: float) -> Arrays:
        """Return all variants of a layer."""
        base, forward, real_BS = self._passes.base, self._passes.forward, batch["document_ids"] >= 0
        row_pairs = pairs_of_rows(batch["position_ids"])
        change_2VD = np.zeros((2, len(self.variants), len(evaluated["document"])))
        length, flops = batch["labels"].shape[1], 0
        for units, hidden_nSH in self._passes.above(number, layer, batch):
            rows = [row for _, row in units]
            changes = _change(base.lm_head(hidden_nSH, batch["labels"][rows]), batch, evaluated, rows)
            for (variant, _), change_2D in zip(units, changes, strict=True):
                change_2VD[:, variant] += change_2D
            flops += forward.above(number, length * len(rows), sum(row_pairs[row] for row in rows))
        broken = np.argwhere(~np.isfinite(change_2VD).all(axis=(0, 2)))
        if len(broken):
            raise NonFiniteError(
                f"The likelihood without expert {self.variants[int(broken[0, 0])].expert} of layer {number} is not "
                "finite. Use `dtype` bfloat16 or float32"
            )
        sample_n = real_BS.flatten().nonzero().flatten()
        sample_n = sample_n[torch.linspace(0, len(sample_n) - 1, min(SAMPLE_TOKENS, len(sample_n))).long()]
        cosines_EE = output_cosines(base.model.layers[number].mlp.experts, layer.input_TH[sample_n], self.num_experts)
        rows_computed = layer.computed_rows + len(sample_n) * self.num_experts
        flops += forward.layer(number, real_BS.numel(), sum(row_pairs), rows_computed)
        arrays = {"nats": change_2VD[0], "text_nats": change_2VD[1], "cosine_tokens": np.array(len(sample_n))}
        return arrays | _to_numpy({"cosines": cosines_EE}) | _spent(flops, start)


def _change(nll_nS: Tensor, batch: Batch, evaluated: Arrays, rows: list[int]) -> list[NDArray[np.float64]]:
    """Return for each row float64 ``[2, D]``: its part of each document's nats, and of those of text alone."""
    scored_BS = scored_positions(batch["labels"]).cpu().numpy()
    text_BS = batch["text_mask"].cpu().numpy()
    documents_BS = batch["document_index"].cpu().numpy()
    changes = []
    for row, nll_S in zip(rows, nll_nS.double().cpu().numpy(), strict=True):
        scored_S = scored_BS[row]
        change_T = nll_S[scored_S] - evaluated["nll"][row][scored_S].astype(np.float64)
        place_T = np.searchsorted(evaluated["document"], documents_BS[row][scored_S])
        totals = [
            np.bincount(place_T, weights=values_T, minlength=len(evaluated["document"]))
            for values_T in (change_T, change_T * text_BS[row][scored_S])
        ]
        changes.append(np.stack(totals).astype(np.float64))
    return changes


def _to_numpy(tensors: dict[str, Tensor]) -> Arrays:
    return {name: tensor.cpu().numpy() for name, tensor in tensors.items()}


def _spent(flops: int, start: float) -> Arrays:
    return {"flops": np.array(flops), "seconds": np.array(perf_counter() - start)}
