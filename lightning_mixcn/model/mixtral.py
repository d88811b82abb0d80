"""transformers' Mixtral with frozen, possibly 4-bit experts and projections, and a loss that never holds all logits.

RoPE, attention back ends, masks, the KV cache and ``generate`` stay transformers' own.
"""

from dataclasses import dataclass
from typing import Any, NoReturn, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from . import attention
from .experts import Experts, Router
from .frozen_linear import FrozenLinear
from .head import IGNORED, Embedding, Head
from .norm import FusedRMSNorm

ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass
class CausalLMOutput(MoeCausalLMOutputWithPast):
    """transformers' output with the loss of every token.

    Args:
        nll: float32 ``[B, S]``, nats of ``labels[:, t]`` given the row up to t − 1; 0 where nothing is predicted.
    """

    nll: Tensor | None = None


class MixtralForCausalLM(transformers.MixtralForCausalLM):  # type: ignore[no-untyped-call]  # its __init_subclass__
    """A `transformers.MixtralForCausalLM`; made by `load_mixtral` or `build_mixtral`, not by ``from_pretrained``."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        document_ids: Tensor | None = None,
        output_router_logits: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits, or with ``labels`` the loss of every token without ever holding the logits of all of them.

        Args:
            input_ids: ``[B, S]`` int64.
            labels: ``[B, S]`` int64 aligned with ``input_ids`` (the shift happens here), −100 ignored.
            document_ids: ``[B, S]`` int32, −1 in padding, which the auxiliary loss leaves out.
            output_router_logits: Also give router logits and the auxiliary load-balancing loss; with labels, the loss
                includes it times ``config.router_aux_loss_coef``.
            kwargs: As transformers: ``position_ids [B, S]`` (restarted at each document to isolate it), the cache …

        Returns:
            transformers' output; with labels a `CausalLMOutput` whose ``logits`` is ``None``.
        """
        if kwargs.get("position_ids") is not None and kwargs.get("past_key_values") is None:
            # transformers isolates the documents of a row only where it makes no KV cache, and by default it makes one.
            kwargs.setdefault("use_cache", False)
        if labels is None:
            return super().forward(input_ids, output_router_logits=output_router_logits, **kwargs)
        assert input_ids is not None, "labels go with input_ids"
        kwargs.pop("return_dict", None)
        if self.config._attn_implementation == attention.NAME and kwargs.get("attention_mask") is None:
            kwargs |= self._document_attention(input_ids, kwargs.get("position_ids"))
        with_router = self.config.output_router_logits if output_router_logits is None else output_router_logits
        hidden = self.model(input_ids, output_router_logits=with_router, **(kwargs | {"use_cache": False}))
        nll = self.lm_head(hidden.last_hidden_state, labels)
        loss = nll.sum() / (labels[:, 1:] != IGNORED).sum().clamp_min(1)
        auxiliary: Any = None
        if with_router:
            auxiliary = self._auxiliary_loss(hidden.router_logits, document_ids)
            loss = loss + self.config.router_aux_loss_coef * auxiliary
        return CausalLMOutput(loss=loss, nll=nll, aux_loss=auxiliary, router_logits=hidden.router_logits)

    def _auxiliary_loss(self, router_logits: Any, document_ids: Tensor | None) -> Any:
        experts, top_k = self.config.num_local_experts, self.config.num_experts_per_tok
        if document_ids is None:
            return load_balancing_loss_func(router_logits, experts, top_k)
        mask = document_ids >= 0
        some = mask.any()
        # A batch of padding alone, as the end of a finite source can give, has no balance: 0 instead of 0/0.
        return some * load_balancing_loss_func(router_logits, experts, top_k, mask | ~some)

    def _document_attention(self, input_ids: Tensor, position_ids: Tensor | None) -> dict[str, Any]:
        """Where documents lie instead of a mask, if there is attention for that."""
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)
        dtype = self.model.embed_tokens.output_dtype
        documents = attention.locate_documents(position_ids.expand_as(input_ids), self.config, dtype)
        if documents is None:
            return {}
        return {"documents": documents, "attention_mask": attention.no_mask(input_ids.device)}

    def save_pretrained(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: these weights are not in transformers' layout."""
        raise ValueError(
            "`save_pretrained` of the frozen base would write a folder that transformers cannot read. "
            "The adapter is saved by the PeftModel around it; write a 4-bit folder with `mixcn quantize`"
        )


def meta_model(config: MixtralConfig, quantization: str, dtype: torch.dtype) -> MixtralForCausalLM:
    """The module tree on the meta device: no memory, every parameter frozen.

    Args:
        config: Sizes.
        quantization: ``nf4`` (attention and experts; embedding, head, norms and router stay dense) or ``none``.
        dtype: Type of what is not quantised, and of the computation.
    """
    if quantization not in ("nf4", "none"):
        raise ValueError(f"`quantization={quantization!r}` is not known. Expected 'nf4' or 'none'")
    if config.hidden_act != "silu":
        raise ValueError(f"config.hidden_act={config.hidden_act!r} is not supported. Mixtral's experts use 'silu'")
    with torch.device("meta"):
        model = MixtralForCausalLM(config)
        model.set_attn_implementation(attention.NAME)
        cast(nn.Module, model).to(dtype)
        for layer in model.model.layers:
            _replace_layer(layer, config, quantization, dtype)
        model.model.norm = FusedRMSNorm(config.hidden_size, config.rms_norm_eps).to(dtype)
        model.model.embed_tokens = Embedding(config.vocab_size, config.hidden_size, config.pad_token_id, dtype=dtype)
        model.model.embed_tokens.output_dtype = dtype
        model.lm_head = Head(config.hidden_size, config.vocab_size, bias=False, dtype=dtype)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    cast(nn.Module, model).requires_grad_(False).eval()
    return model


def _replace_layer(layer: Any, config: MixtralConfig, quantization: str, dtype: torch.dtype) -> None:
    attention = layer.self_attn
    for name in ATTENTION_PROJECTIONS:
        linear: nn.Linear = getattr(attention, name)
        replacement = FrozenLinear(linear.in_features, linear.out_features, quantization=quantization, dtype=dtype)
        setattr(attention, name, replacement)
    for name in ("input_layernorm", "post_attention_layernorm"):
        setattr(layer, name, FusedRMSNorm(config.hidden_size, config.rms_norm_eps).to(dtype))
    layer.mlp.gate = Router(config, dtype)
    layer.mlp.experts = Experts(config, quantization, dtype)


def move_to_device(model: MixtralForCausalLM, device: torch.device) -> None:
    """Give a meta model (uninitialised) memory; ties and RoPE's tables are restored."""
    model.to_empty(device=device)
    rotary = type(model.model.rotary_emb)(model.config)
    model.model.rotary_emb = rotary.to(device)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
