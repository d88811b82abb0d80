"""The layers above a disabled expert, for many experts in one pass: what every measure of their importance shares.

For a batch the residual stream at each layer's input is computed once. A layer with an expert disabled costs next to
nothing (see `ablated_layer`), so what is left is the layers above it: on average half of the model. They run for
several experts of one layer in one pass, so 4-bit weights are decoded once for all of them. A row of which no token is
routed otherwise is as it was, and is not run.

Legend: B rows, S positions of a row, T = B·S tokens, H hidden, E experts, n rows of a pass.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mixcn.errors import UserError
from lightning_mixcn.model.attention.documents import locate_documents, no_mask
from lightning_mixcn.model.causal_lm import base_of
from lightning_mixcn.model.experts.block import Router
from lightning_mixcn.model.experts.routing import choose_experts

from .flops import ForwardFlops

Mode = Literal["mask", "zero"]
MODES: tuple[Mode, ...] = ("mask", "zero")


class DisabledExpert(NamedTuple):
    """One expert of some layer, and how it is disabled.

    Args:
        mode: ``mask`` or ``zero``, see `disabled_routing`.
        expert: Number of the expert in its layer, from 0.
    """

    mode: Mode
    expert: int


def disabled_routing(
    logits_TE: Tensor, weights_TK: Tensor, index_TK: Tensor, disabled: DisabledExpert, *, normalises: bool
) -> tuple[Tensor, Tensor]:
    """Route tokens as if an expert were disabled.

    ``mask``: its logit is −∞ before the softmax, as if router and layer did not have it, so another expert takes its
    place. Where the weights of the chosen ones sum to 1 they do again; where they do not, they are shares of all
    experts, and without one of these they grow for every token. ``zero``: its weight is 0 and nothing takes its place,
    so its output is dropped and the weights of the others stay as they were. Any other token is routed as before.

    Args:
        logits_TE: ``[T, E]`` router logits, any float dtype.
        weights_TK: ``[T, K]`` float32 routing weights.
        index_TK: ``[T, K]`` int64, the chosen experts.
        disabled: Disabled expert.
        normalises: Weights of a token's experts sum to 1.

    Returns:
        Weights ``[T, K]`` float32 and experts ``[T, K]`` int64.
    """
    is_disabled_TK = index_TK == disabled.expert
    if disabled.mode == "zero":
        return weights_TK.masked_fill(is_disabled_TK, 0.0), index_TK
    top_k = index_TK.shape[1]
    assert top_k < logits_TE.shape[1], "no expert is left to take the place of the masked one"
    masked_TE = logits_TE.float().clone()
    masked_TE[:, disabled.expert] = -torch.inf
    new_TK, new_index_TK = choose_experts(masked_TE, top_k, normalises=normalises)
    if not normalises:
        return new_TK, new_index_TK
    chose_it_T1 = is_disabled_TK.any(dim=1, keepdim=True)
    weights_TK = torch.where(chose_it_T1, new_TK, weights_TK)
    return weights_TK, torch.where(chose_it_T1, new_index_TK, index_TK)


def check_modes(modes: tuple[Mode, ...], num_experts: int, top_k: int) -> None:
    """Refuse a mode that a model has too few experts for. Raises: ValueError."""
    if "mask" in modes and top_k >= num_experts:
        raise UserError(
            f"`mode=mask` needs an expert to take the masked one's place, but each token already goes to {top_k} of "
            f"the model's {num_experts}. Use mode zero"
        )


@contextmanager
def disabled_expert(model: nn.Module, layer: int, disabled: DisabledExpert) -> Iterator[None]:
    """Run a model with an expert disabled: the whole of it, whatever it is asked for, benchmarks included.

    Args:
        model: A model of `load_moe` or the PeftModel around it.
        layer: The layer of the expert, from 0.
        disabled: The expert and the mode.

    Raises:
        ValueError: the model has no such layer or expert, or too few experts for the mode.
    """
    routers = [module for module in model.modules() if isinstance(module, Router)]
    if not 0 <= layer < len(routers):
        raise UserError(f"`layer={layer}`: the model has layers 0 to {len(routers) - 1}")
    router = routers[layer]
    if not 0 <= disabled.expert < router.num_experts:
        raise UserError(f"`expert={disabled.expert}`: the layer has experts 0 to {router.num_experts - 1}")
    check_modes((disabled.mode,), router.num_experts, router.top_k)

    def reroute(_router: nn.Module, _inputs: Any, routing: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
        return routing[0], *disabled_routing(*routing, disabled, normalises=router.normalises)

    handle = router.register_forward_hook(reroute)
    try:
        yield
    finally:
        handle.remove()


class Reroute(NamedTuple):
    """The tokens that are routed otherwise without a disabled expert, and how.

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
    expert for each token: whichever of its K experts is masked, the same next one takes the place. Without variants the
    layer computes what the expert block computes, in the same order.

    Args:
        layer: A decoder layer of a `MoeForCausalLM`.
        hidden_BSH: The residual stream at its input.
        arguments: Arguments of the layer, from `layer_arguments`.
        disabled: Experts to disable, one at a time.

    Attributes:
        input_TH: The input of router and experts.
        reroutes: For each of ``disabled``, the tokens that it changes.
        computed_rows: Number of rows that the experts have computed together.
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
        self.reroutes, normalises = [], layer.mlp.gate.normalises
        for variant in disabled:
            changed_T = (index_TK == variant.expert).any(dim=1)
            if variant.mode == "mask" and not normalises:
                changed_T.fill_(True)
            tokens_n = changed_T.nonzero().flatten()
            chosen = logits_TE[tokens_n], weights_TK[tokens_n], index_TK[tokens_n]
            routing = disabled_routing(*chosen, variant, normalises=normalises)
            self.reroutes.append(Reroute(tokens_n, *routing))
            needed_TE[tokens_n[:, None], routing[1]] = True
        token_P, expert_P = needed_TE.nonzero(as_tuple=True)
        self._pair_TE = torch.full(needed_TE.shape, -1, device=needed_TE.device)
        self._pair_TE[token_P, expert_P] = torch.arange(len(token_P), device=needed_TE.device)
        self._results_PH = _run_pairs(layer.mlp.experts, self.input_TH[token_P], expert_P)
        self.computed_rows = len(token_P)
        everything_T = torch.arange(len(index_TK), device=index_TK.device)
        self._routed = Reroute(everything_T, weights_TK, index_TK)
        self._output_TH = self._sum(self._routed)

    def output(self) -> Tensor:
        """Return the residual stream after the layer as it is, ``[B, S, H]``."""
        hidden_BSH: Tensor = self._residual_BSH + self._output_TH.view_as(self._residual_BSH)
        return hidden_BSH

    def saliency(self) -> Tensor:
        """Return what each expert adds to a token, routing weight · L2 norm of its result.

        Its mean over an expert's tokens is REAP's saliency: Lasby et al. 2025, https://arxiv.org/abs/2510.13999, eq. 9.

        Returns:
            float64 ``[T, E]``, 0 where a token did not choose the expert.
        """
        chosen_TK, weights_TK = self._routed.chosen, self._routed.weights.double()
        norm_P = torch.linalg.vector_norm(self._results_PH, dim=1, dtype=torch.float32)
        norm_TK = norm_P[self._pair_TE.gather(1, chosen_TK)].double()
        saliency_TE: Tensor = norm_TK.new_zeros(self._pair_TE.shape)
        saliency_TE.scatter_(1, chosen_TK, weights_TK * norm_TK)
        return saliency_TE

    def changed_rows(self, number: int, real_BS: Tensor) -> Tensor:
        """Return rows of the batch, int64 ascending, that have a token which is routed otherwise.

        Args:
            number: Index in ``disabled``.
            real_BS: bool, false in padding, which changes nothing that is scored.
        """
        changed_BS = torch.zeros_like(real_BS)
        changed_BS.view(-1)[self.reroutes[number].tokens] = True
        return (changed_BS & real_BS).any(dim=1).nonzero().flatten()

    def output_without(self, number: int, rows: Tensor) -> Tensor:
        """Return the residual stream of some rows ``[rows, S, H]`` after the layer without an expert."""
        reroute, output_TH = self.reroutes[number], self._output_TH.clone()
        output_TH[reroute.tokens] = self._sum(reroute)
        hidden_nSH: Tensor = self._residual_BSH[rows] + output_TH.view_as(self._residual_BSH)[rows]
        return hidden_nSH

    def _sum(self, reroute: Reroute) -> Tensor:
        """Compute Σₖ weight · result in float32, choice by choice, as the expert block adds them up."""
        pair_nK = self._pair_TE[reroute.tokens[:, None], reroute.chosen]
        total_nH = torch.zeros((), device=pair_nK.device)
        for choice in range(pair_nK.shape[1]):
            total_nH = total_nH + self._results_PH[pair_nK[:, choice]].float() * reroute.weights[:, choice, None]
        return total_nH.to(self._results_PH.dtype)


def layer_arguments(base: Any, position_ids_BS: Tensor) -> dict[str, Any]:
    """Return the arguments of every layer, as `MoeForCausalLM` calls its own.

    Args:
        base: The `MoeForCausalLM`, without a sliding window shorter than a row.
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
    """Return the cosine between what two experts of a layer give for the same token, summed over tokens.

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
    """Compute each row through one expert, ``[P, H]``."""
    results_PH: Tensor = experts(input_PH, expert_P[:, None], input_PH.new_ones(len(expert_P), 1))
    return results_PH


Batch = dict[str, Tensor]

# Enough that decoding 4-bit weights is little beside their products. A pass with all of 128 experts would need as many
# times the memory of a batch.
BATCHES_PER_PASS = 8


class DisabledPasses:
    """Runs a model with each expert of a layer disabled, batch by batch.

    Args:
        model: A model of `load_moe` or the PeftModel around it, in evaluation mode.
        modes: Ways of disabling experts.
        micro_batch_size: Rows of a batch; a pass through the layers above runs up to `BATCHES_PER_PASS` times as many.

    Attributes:
        base: The `MoeForCausalLM` inside.
        variants: Experts that are disabled in each layer, one at a time.
        num_layers: Number of the model's layers.
        num_experts: E.
        rows_per_pass: Rows of a pass at most.
        forward: Cost of the parts of a forward pass.
    """

    def __init__(self, model: nn.Module, modes: Sequence[Mode], micro_batch_size: int) -> None:
        """Keep the arguments; nothing is computed yet."""
        self.base: Any = base_of(model)
        self.num_layers: int = self.base.config.num_hidden_layers
        self.num_experts: int = self.base.config.num_local_experts
        self.variants = [DisabledExpert(mode, expert) for mode in modes for expert in range(self.num_experts)]
        self.rows_per_pass = micro_batch_size * BATCHES_PER_PASS
        self.forward = ForwardFlops.of(model)

    def on_device(self, batch: Batch) -> Batch:
        """Move a batch to the model's device."""
        device = next(self.base.parameters()).device
        return {name: part.to(device) for name, part in batch.items()}

    def whole(self, batch: Batch) -> Tensor:
        """Return the head's input of a batch as the model is, ``[B, S, H]``; arguments as those of `layers`."""
        arguments = layer_arguments(self.base, batch["position_ids"])
        hidden_BSH: Tensor = self.base.model.embed_tokens(batch["input_ids"])
        for layer in self.base.model.layers:
            hidden_BSH = layer(hidden_BSH, **arguments)
        normed_BSH: Tensor = self.base.model.norm(hidden_BSH)
        return normed_BSH

    def layers(
        self, batch: Batch, wanted: Sequence[int], variants: Sequence[DisabledExpert]
    ) -> Iterator[tuple[int, AblatedLayer]]:
        """Run the model up to the highest wanted layer, and give those that are wanted.

        Args:
            batch: ``input_ids``, ``position_ids`` int64 ``[B, S]``, on the model's device.
            wanted: Numbers of the layers, ascending.
            variants: Experts to disable in these, one at a time.

        Yields:
            Number of a layer, and the layer as it ran.
        """
        hidden_BSH = self.base.model.embed_tokens(batch["input_ids"])
        arguments = layer_arguments(self.base, batch["position_ids"])
        for number in range(max(wanted, default=-1) + 1):
            is_wanted = number in wanted
            layer = AblatedLayer(self.base.model.layers[number], hidden_BSH, arguments, variants if is_wanted else ())
            if is_wanted:
                yield number, layer
            hidden_BSH = layer.output()

    def above(self, number: int, layer: AblatedLayer, batch: Batch) -> Iterator[tuple[list[tuple[int, int]], Tensor]]:
        """Run the layers above for every variant and every row that it changes.

        Args:
            number: Number of the layer.
            layer: As it ran on the batch.
            batch: ``position_ids`` int64 ``[B, S]``, and ``document_ids``, −1 in padding.

        Yields:
            Number of the variant and of the row of each of a pass's rows, and what the head is given of them
            ``[n, S, H]``.
        """
        model = self.base.model
        for units, hidden_nSH in self._changed(layer, batch["document_ids"] >= 0):
            arguments = layer_arguments(self.base, batch["position_ids"][[row for _, row in units]])
            for above in model.layers[number + 1 :]:
                hidden_nSH = above(hidden_nSH, **arguments)
            yield units, model.norm(hidden_nSH)

    def _changed(self, layer: AblatedLayer, real_BS: Tensor) -> Iterator[tuple[list[tuple[int, int]], Tensor]]:
        """Yield changed rows, as many at a time as a pass may have: variant and row of each, and ``[n, S, H]``."""
        units: list[tuple[int, int]] = []
        waiting: list[Tensor] = []
        for variant in range(len(self.variants)):
            rows = layer.changed_rows(variant, real_BS)
            if not len(rows):
                continue
            units += [(variant, row) for row in rows.tolist()]
            waiting.append(layer.output_without(variant, rows))
            while len(units) >= self.rows_per_pass:
                hidden_nSH, size = torch.cat(waiting), self.rows_per_pass
                yield units[:size], hidden_nSH[:size]
                units, waiting = units[size:], [hidden_nSH[size:]]
        if units:
            yield units, torch.cat(waiting)
