"""transformers' causal LM with frozen, possibly 4-bit experts and projections, and a loss that never holds all logits.

Attention back ends, masks, the KV cache and ``generate`` stay transformers' own, and off CUDA RoPE and norms do.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
import torch.nn.functional as F
from peft import PeftModelForCausalLM
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm

from lightning_mixcn.errors import UserError

from .architectures import Architecture, architecture_of
from .attention import documents as attention
from .attention.fused import fused_attention
from .checkpoints.layout import module_shapes, rounds
from .experts.block import Experts, router_class
from .head import IGNORED, Embedding, Head
from .nf4.codec import superblocks
from .nf4.linear import FrozenLinear
from .nf4.storage import NF4Weight


class FusedRMSNorm(LlamaRMSNorm):
    """transformers' norm (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467) with torch's fused kernel on CUDA.

    Step by step, as transformers has it, a norm moves 36 bytes an element forward and some 60 backward, and keeps its
    input in float32 for backward; fused it moves 4 and 6, and keeps the input as it is. The 65 norms of Mixtral-8x7B
    move 26 MB a token in steps, 9 µs of an H100's memory at 80 % of 3.35 TB/s, where 7,250 tokens/s leave 138 for all;
    and keep 1.1 MB a token, twice what they need to. On other devices this is transformers' norm, bit for bit.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalise ``[..., H]``; the mean square is taken in float32 either way."""
        if hidden_states.is_cuda and torch.version.cuda is not None:
            # Fused only if the weight has the same dtype, which a frozen one has.
            return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)
        normalised: Tensor = super().forward(hidden_states)
        return normalised


ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")

# transformers 5.24 renamed the argument that holds the KV cache; it takes the old name, with a warning, until 5.40.
_CACHE_NAMES = ("cache", "past_key_values")
CACHE_ARGUMENT = next(name for name in _CACHE_NAMES if name in inspect.signature(LlamaAttention.forward).parameters)


def has_cache(arguments: Mapping[str, Any]) -> bool:
    """Tell if the named arguments of a model, a layer or its attention hold a KV cache."""
    return any(arguments.get(name) is not None for name in _CACHE_NAMES)


@dataclass
class CausalLMOutput(MoeCausalLMOutputWithPast):
    """transformers' output with the loss of every token.

    Args:
        nll: float32 ``[B, S]``, nats of ``labels[:, t]`` given the row up to t − 1; 0 where nothing is predicted.
        last_hidden_state: ``[B, S, H]`` in the compute dtype, what the head is given.
    """

    nll: Tensor | None = None
    last_hidden_state: Tensor | None = None


if TYPE_CHECKING:  # what it is mixed into
    _CausalLM = PreTrainedModel
else:
    _CausalLM = object


class MoeForCausalLM(_CausalLM):  # type: ignore[no-untyped-call]  # its __init_subclass__
    """What is added to transformers' causal LM of a family; made by `load_moe` or `build_moe`.

    A model is an instance of that class of transformers, too.
    """

    model: Any
    lm_head: Head
    vocab_size: int

    @property
    def architecture(self) -> Architecture:
        """Return the family's record."""
        return architecture_of(self.config)

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        document_ids: Tensor | None = None,
        output_router_logits: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return logits, or with ``labels`` the loss of every token, without all logits in memory at once.

        Args:
            input_ids: ``[B, S]`` int64.
            labels: ``[B, S]`` int64 aligned with ``input_ids`` (the shift happens here), −100 ignored.
            document_ids: ``[B, S]`` int32, −1 in padding, which the auxiliary loss leaves out.
            output_router_logits: Also give router logits and the auxiliary load-balancing loss; with labels, the loss
                includes it times ``config.router_aux_loss_coef``.
            kwargs: transformers' arguments: ``position_ids [B, S]`` (from 0 in each document to isolate it), cache …

        Returns:
            transformers' output; with labels a `CausalLMOutput` whose ``logits`` is ``None``.
        """
        if kwargs.get("position_ids") is not None and not has_cache(kwargs):
            # transformers isolates the documents of a row only where it makes no KV cache, and by default it makes one.
            kwargs.setdefault("use_cache", False)
        if labels is None:
            return super().forward(input_ids, output_router_logits=output_router_logits, **kwargs)
        assert input_ids is not None, "labels go with input_ids"
        kwargs.pop("return_dict", None)
        with_router = self.config.output_router_logits if output_router_logits is None else output_router_logits
        hidden = self.decode(input_ids, output_router_logits=with_router, **kwargs)
        nll = self.lm_head(hidden.last_hidden_state, labels)
        loss = nll.sum() / (labels[:, 1:] != IGNORED).sum().clamp_min(1)
        auxiliary: Any = None
        if with_router:
            auxiliary = self._auxiliary_loss(hidden.router_logits, document_ids)
            loss = loss + self.config.router_aux_loss_coef * auxiliary
        return CausalLMOutput(
            loss=loss,
            nll=nll,
            aux_loss=auxiliary,
            router_logits=hidden.router_logits,
            last_hidden_state=hidden.last_hidden_state,
        )

    def decode(self, input_ids: Tensor, **kwargs: Any) -> Any:
        """Run the layers without the head, each document of a row on its own; arguments as of `forward`."""
        if self.config._attn_implementation == attention.NAME and kwargs.get("attention_mask") is None:
            kwargs |= self._document_attention(input_ids, kwargs.get("position_ids"))
        return self.model(input_ids, **(kwargs | {"use_cache": False}))

    def _auxiliary_loss(self, router_logits: Any, document_ids: Tensor | None) -> Any:
        loss_of = self.architecture.auxiliary_loss
        experts, top_k = self.config.num_local_experts, self.config.num_experts_per_tok
        if document_ids is None:
            return loss_of(router_logits, experts, top_k)
        mask = document_ids >= 0
        some = mask.any()
        # A batch of padding alone, as the end of a finite source can give, has no balance: 0 instead of 0/0.
        return some * loss_of(router_logits, experts, top_k, mask | ~some)

    def _document_attention(self, input_ids: Tensor, position_ids: Tensor | None) -> dict[str, Any]:
        """Return the places of documents instead of a mask, if there is attention for that."""
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)
        dtype = self.model.embed_tokens.output_dtype
        documents = attention.locate_documents(position_ids.expand_as(input_ids), self.config, dtype)
        if documents is None:
            return {}
        return {"documents": documents, "attention_mask": attention.no_mask(input_ids.device)}

    def save_pretrained(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse to save: these weights are not in transformers' layout."""
        raise UserError(
            "`save_pretrained` of the frozen base would write a folder that transformers cannot read. "
            "The adapter is saved by the PeftModel around it; write a 4-bit folder with `mixcn quantize`"
        )


@cache
def _causal_lm_class(architecture: Architecture) -> type[MoeForCausalLM]:
    """Return the family's class under its own name, by which transformers chooses what belongs to causal LMs."""
    stock = architecture.causal_lm
    return type(stock.__name__, (MoeForCausalLM, stock), {"__module__": __name__})


def meta_model(config: PreTrainedConfig, quantization: str, dtype: torch.dtype) -> MoeForCausalLM:
    """Make the module tree on the meta device: no memory, every parameter frozen.

    Args:
        config: Sizes.
        quantization: ``nf4`` (attention and experts; embedding, head, norms and router stay dense) or ``none``.
        dtype: Type of the weights that are not quantised, and of the computation.
    """
    if quantization not in ("nf4", "none"):
        raise UserError(f"`quantization={quantization!r}` is not known. Expected 'nf4' or 'none'")
    if config.hidden_act != "silu":
        raise UserError(f"config.hidden_act={config.hidden_act!r} is not supported. Experts use 'silu'")
    architecture = architecture_of(config)
    with torch.device("meta"):
        model: Any = _causal_lm_class(architecture)(config)
        model.set_attn_implementation(attention.NAME)
        model.to(dtype)
        for layer in model.model.layers:
            _replace_layer(layer, architecture, config, quantization, dtype)
        model.model.norm = FusedRMSNorm(config.hidden_size, config.rms_norm_eps).to(dtype)
        model.model.embed_tokens = Embedding(config.vocab_size, config.hidden_size, config.pad_token_id, dtype=dtype)
        model.model.embed_tokens.output_dtype = dtype
        model.lm_head = Head(config.hidden_size, config.vocab_size, bias=False, dtype=dtype)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.requires_grad_(False).eval()
    return cast(MoeForCausalLM, model)


def _replace_layer(layer: Any, architecture: Architecture, config: Any, quantization: str, dtype: torch.dtype) -> None:
    attention: Any = fused_attention(architecture)(config, layer.self_attn.layer_idx).to(dtype)
    layer.self_attn = attention
    for name in ATTENTION_PROJECTIONS:
        linear: nn.Linear = getattr(attention, name)
        replacement = FrozenLinear(linear.in_features, linear.out_features, quantization=quantization, dtype=dtype)
        setattr(attention, name, replacement)
    for name, width in architecture.attention_norms(config).items():
        setattr(attention, name, FusedRMSNorm(width, config.rms_norm_eps).to(dtype))
    for name in ("input_layernorm", "post_attention_layernorm"):
        setattr(layer, name, FusedRMSNorm(config.hidden_size, config.rms_norm_eps).to(dtype))
    layer.mlp.gate = router_class(architecture)(config, dtype)
    layer.mlp.experts = Experts(config, quantization, dtype)


def move_to_device(model: MoeForCausalLM, device: torch.device) -> None:
    """Give a meta model (uninitialised) memory; ties and RoPE's tables are restored."""
    model.to_empty(device=device)
    rotary = type(model.model.rotary_emb)(model.config)
    model.model.rotary_emb = rotary.to(device)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight


def base_of(model: nn.Module) -> MoeForCausalLM:
    """Return the mixture inside a PeftModel, or the model itself."""
    return cast(MoeForCausalLM, model.get_base_model() if isinstance(model, PeftModelForCausalLM) else model)


_SUPERBLOCK_BYTES = 8192 + 256 + 4 + 4


def bytes_in_memory(model: nn.Module) -> dict[str, int]:
    """Return the bytes of parameters: ``quantised`` (codes and scales), ``trainable``, ``dense`` (the frozen rest)."""
    packed = {id(parameter) for parameter in _packed(model)}
    sizes = {"quantised": 0, "trainable": 0, "dense": 0}
    for parameter in model.parameters():
        kind = "quantised" if id(parameter) in packed else "trainable" if parameter.requires_grad else "dense"
        sizes[kind] += parameter.nbytes
    return sizes


def planned_quantised_bytes(config: PreTrainedConfig) -> int:
    """Return the bytes of codes and scales when attention projections and experts are in NF4, from the sizes."""
    packed = [shape for name, shape in module_shapes(config).items() if rounds(name, shape)]
    return _SUPERBLOCK_BYTES * sum(superblocks(prod(shape)) for shape in packed)


def verify_quantised(model: nn.Module, config: PreTrainedConfig) -> None:
    """Check that every expert and attention projection is in 4 bits and that bytes are within 2 % of the plan.

    Raises:
        RuntimeError: names what is not in 4 bits, or states both byte counts.
    """
    dense = [
        name
        for name, module in model.named_modules()
        if isinstance(module, FrozenLinear) and "gate.linear" not in name and not isinstance(module.storage, NF4Weight)
    ]
    if dense:
        raise RuntimeError(f"{len(dense)} projections are not in 4 bits, the first is {dense[0]}")
    held, planned = bytes_in_memory(model)["quantised"], planned_quantised_bytes(config)
    if abs(held - planned) > 0.02 * planned:
        raise RuntimeError(f"the 4-bit weights take {held:,} bytes, more than 2 % off the planned {planned:,}")


def _packed(model: nn.Module) -> list[Tensor]:
    return [p for module in model.modules() if isinstance(module, NF4Weight) for p in module.parameters()]
