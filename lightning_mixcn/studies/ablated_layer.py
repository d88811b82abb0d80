"""One layer with each of its experts disabled in turn, everything that they share computed once.

Legend: B rows, S positions of a row, T = B·S tokens, H hidden, E experts, K experts a token, P (token, expert) pairs,
n some of the tokens.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_mixcn.model.attention import locate_documents, no_mask

from .disabled_expert import DisabledExpert, disabled_routing


class Reroute(NamedTuple):
    """The tokens that chose a disabled expert, and what becomes of them.

    Args:
        tokens: int64 ``[n]``, their places in the batch.
        weights: float32 ``[n, K]``, their routing weights without it.
        chosen: int64 ``[n, K]``, their experts without it; in mode zero still with it, at weight 0.
    """

    tokens: Tensor
    weights: Tensor
    chosen: Tensor


class AblatedLayer:
    """A decoder layer that has run on a batch, and what it would have given without some expert.

    Each expert's result for a token is kept until all variants are made, so ``zero`` costs no product, and ``mask`` one
    expert for each token: whichever of its K experts is masked, the same next one takes the place.

    Args:
        layer: A decoder layer of a `MixtralForCausalLM`.
        hidden_BSH: The residual stream at its input.
        arguments: Of the layer, from `layer_arguments`.
        disabled: What is to be disabled, one at a time.

    Attributes:
        input_TH: The input of router and experts.
        reroutes: For each of ``disabled``, the tokens that it changes.
        computed_rows: How many rows the experts have computed together.
    """

    def __init__(
        self, layer: Any, hidden_BSH: Tensor, arguments: dict[str, Any], disabled: Sequence[DisabledExpert]
    ) -> None:
        """Run the layer."""
        attended_BSH, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_BSH), **arguments)
        self._residual_BSH = hidden_BSH + attended_BSH
        self.input_TH = layer.post_attention_layernorm(self._residual_BSH).flatten(0, 1)
        logits_TE, weights_TK, index_TK = layer.mlp.gate(self.input_TH)
        needed_TE = torch.zeros_like(logits_TE, dtype=torch.bool).scatter_(1, index_TK, True)
        self.reroutes = []
        for variant in disabled:
            tokens_n = (index_TK == variant.expert).any(dim=1).nonzero().flatten()
            routing = disabled_routing(logits_TE[tokens_n], weights_TK[tokens_n], index_TK[tokens_n], variant)
            self.reroutes.append(Reroute(tokens_n, *routing))
            needed_TE[tokens_n[:, None], routing[1]] = True
        token_P, expert_P = needed_TE.nonzero(as_tuple=True)
        self._pair_TE = torch.full(needed_TE.shape, -1, device=needed_TE.device)
        self._pair_TE[token_P, expert_P] = torch.arange(len(token_P), device=needed_TE.device)
        self._results_PH = _run_pairs(layer.mlp.experts, self.input_TH[token_P], expert_P)
        self.computed_rows = len(token_P)
        everything_T = torch.arange(len(index_TK), device=index_TK.device)
        self._output_TH = self._sum(Reroute(everything_T, weights_TK, index_TK))

    def output(self) -> Tensor:
        """The residual stream behind the layer as it is, ``[B, S, H]``."""
        hidden_BSH: Tensor = self._residual_BSH + self._output_TH.view_as(self._residual_BSH)
        return hidden_BSH

    def changed_rows(self, number: int, real_BS: Tensor) -> Tensor:
        """Rows of the batch, int64 ascending, that have a token which chose the expert.

        Args:
            number: Which of ``disabled``.
            real_BS: bool, false in padding, which changes nothing that is scored.
        """
        changed_BS = torch.zeros_like(real_BS)
        changed_BS.view(-1)[self.reroutes[number].tokens] = True
        return (changed_BS & real_BS).any(dim=1).nonzero().flatten()

    def output_without(self, number: int, rows: Tensor) -> Tensor:
        """The residual stream of some rows ``[rows, S, H]`` behind the layer without an expert."""
        reroute, output_TH = self.reroutes[number], self._output_TH.clone()
        output_TH[reroute.tokens] = self._sum(reroute)
        hidden_nSH: Tensor = self._residual_BSH[rows] + output_TH.view_as(self._residual_BSH)[rows]
        return hidden_nSH

    def _sum(self, reroute: Reroute) -> Tensor:
        """Σₖ weight · result in float32, choice by choice, as the expert block adds them up."""
        pair_nK = self._pair_TE[reroute.tokens[:, None], reroute.chosen]
        total_nH = torch.zeros((), device=pair_nK.device)
        for choice in range(pair_nK.shape[1]):
            total_nH = total_nH + self._results_PH[pair_nK[:, choice]].float() * reroute.weights[:, choice, None]
        return total_nH.to(self._results_PH.dtype)


def layer_arguments(base: Any, position_ids_BS: Tensor) -> dict[str, Any]:
    """What every layer is called with, as `MixtralForCausalLM` calls its own.

    Args:
        base: The `MixtralForCausalLM`, without a sliding window shorter than a row.
        position_ids_BS: int64; each document begins at 0.
    """
    dtype = base.model.embed_tokens.output_dtype
    like = torch.empty(0, dtype=dtype, device=position_ids_BS.device)
    return {
        "position_embeddings": base.model.rotary_emb(like, position_ids=position_ids_BS),
        "attention_mask": no_mask(position_ids_BS.device),
        "documents": locate_documents(position_ids_BS, base.config, dtype),
    }


def output_cosines(experts: Any, input_nH: Tensor, num_experts: int) -> Tensor:
    """Cosine between what two experts of a layer give for the same token, summed over tokens.

    Args:
        experts: The experts of a layer.
        input_nH: Their input.
        num_experts: E.

    Returns:
        float64 ``[E, E]``; an output of zeros counts as orthogonal to all.
    """
    expert_P = torch.arange(num_experts, device=input_nH.device).repeat_interleave(len(input_nH))
    results_PH = _run_pairs(experts, input_nH.repeat(num_experts, 1), expert_P)
    direction_EnH = F.normalize(results_PH.double(), dim=-1).view(num_experts, len(input_nH), -1)
    return torch.einsum("enh,fnh->ef", direction_EnH, direction_EnH)


def _run_pairs(experts: Any, input_PH: Tensor, expert_P: Tensor) -> Tensor:
    """Each row through one expert, ``[P, H]``."""
    results_PH: Tensor = experts(input_PH, expert_P[:, None], input_PH.new_ones(len(expert_P), 1))
    return results_PH
