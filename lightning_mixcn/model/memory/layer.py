"""Count the bytes of a decoder layer's activations: those kept for backward, and the peak of each pass beside them.

Written down from what autograd holds of each module; `tests/model/memory/test_plan.py` counts living tensors and
compares. Vectors that are smaller than a thousandth of the rest are left out.

Legend: T tokens of a micro-batch, H hidden, I intermediate, E experts, K experts a token, R LoRA rank, P routed rows
(T·K, padded on the CPU), c bytes of the compute dtype.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from lightning_mixcn.model.attention.projections import can_fuse
from lightning_mixcn.model.causal_lm import base_of
from lightning_mixcn.model.experts.path import training_path
from lightning_mixcn.model.experts.routing import padded_rows, row_step
from lightning_mixcn.model.head import chunk_positions
from lightning_mixcn.model.kernels import has_triton
from lightning_mixcn.model.lora.attach import adapter_rank
from lightning_mixcn.model.nf4.linear import FrozenLinear
from lightning_mixcn.model.nf4.storage import NF4Weight

from .paths import PATH_MEMORY, BlockSizes


class MicroBatch(NamedTuple):
    """The shape of what one rank computes at a time.

    Args:
        rows: Number of rows.
        length: Tokens of a row.
        packed: Documents begin and end inside rows; else each row is one.
    """

    rows: int
    length: int
    packed: bool = False

    @property
    def tokens(self) -> int:
        """All tokens, padding included."""
        return self.rows * self.length


@dataclass(frozen=True)
class LayerActivations:
    """Bytes of one decoder layer in training.

    Args:
        boundary: Input, and the router's probabilities for the auxiliary loss, which are kept in every mode.
        router: Router's part of that.
        graph: All that is kept without checkpointing.
        attention: Attention's part of that.
        experts: Router's and experts' part of that.
        attention_input: Attention's input, which is kept where attention is computed again.
        experts_forward: Peak of the experts' forward pass beside what it keeps.
        experts_backward: Peak of their backward pass, gradients of adapters in the compute dtype included.
        attention_backward: Peak of attention's backward pass.
    """

    boundary: int
    router: int
    graph: int
    attention: int
    experts: int
    attention_input: int
    experts_forward: int
    experts_backward: int
    attention_backward: int

    def kept(self, mode: str) -> int:
        """Return the bytes from forward to backward on the device; `offload` keeps the layer's input on the host."""
        return {
            "none": self.router + self.graph,
            "selective": self.router + self.graph - self.attention + self.attention_input,
            "full": self.boundary,
            "offload": self.router,
        }[mode]

    def host(self, mode: str) -> int:
        """Return the bytes kept on the host."""
        return self.boundary - self.router if mode == "offload" else 0

    def forward(self, mode: str) -> int:
        """Return the peak of forward beside what is kept in the end."""
        return self.experts_forward + (self.experts if mode in ("full", "offload") else 0)

    def backward(self, mode: str) -> int:
        """Return the peak of backward beside what is kept."""
        attention = self.attention_backward - self.experts  # freed by then: backward begins with the experts
        if mode == "none":
            return max(self.experts_backward, attention)
        if mode == "selective":
            return max(self.experts_backward, attention + self.attention)
        return self.graph + self.host(mode) + max(self.experts_backward, attention)


@dataclass(frozen=True)
class LayerCounter:
    """Counter of one model's layers for one shape of micro-batches.

    Args:
        batch: Shape of a micro-batch.
        dtype: Compute dtype.
        device_type: ``cpu`` or ``cuda``, which differ in padding and in what dropout keeps.
        top_k: Experts a token.
        path: Path of the expert block, see `experts.path.PATHS`.
    """

    batch: MicroBatch
    dtype: torch.dtype
    device_type: str
    top_k: int
    path: str

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.batch.tokens

    @property
    def size(self) -> int:
        """Bytes of a number in the compute dtype."""
        return self.dtype.itemsize

    def layer(self, layer: Any, needs_gradient: bool) -> tuple[LayerActivations, bool]:
        """Count one decoder layer, and tell whether its output needs a gradient."""
        attention, experts = layer.self_attn, layer.mlp.experts
        hidden = self.tokens * attention.q_proj.in_features * self.size
        inputs = [attention.q_proj, attention.k_proj, attention.v_proj]
        inner = needs_gradient or any(adapter_rank(module) for module in inputs)
        after = inner or adapter_rank(attention.o_proj) > 0
        stack = [experts.gate_proj, experts.up_proj, experts.down_proj]
        adapted = [module for module in (layer.mlp.gate.linear, *stack) if adapter_rank(module)]
        needed = after or bool(adapted)
        router = self.tokens * layer.mlp.gate.num_experts * self.size * needed
        attention_graph = self._attention(attention, needs_gradient, inner)
        normed = self._shared_input(inputs) * hidden
        norms = self._norm(hidden) * (needs_gradient + after)
        moe = self._moe(layer.mlp, after) if needed else 0
        path, sizes = PATH_MEMORY[self.path], self.block_sizes(experts)
        found = LayerActivations(
            boundary=hidden * needed + router,
            router=router,
            graph=norms + attention_graph + normed + moe,
            attention=attention_graph + normed,
            experts=moe,
            attention_input=hidden * after,
            experts_forward=path.forward(sizes) + hidden,
            experts_backward=path.backward(sizes) + hidden if needed else 0,
            attention_backward=hidden + self._attention_backward(attention, inner),
        )
        return found, needed

    def _norm(self, hidden: int, rows: int = 1) -> int:
        """Count a norm: its input, which only CUDA's fused kernel does not keep in float32, and one number a row.

        Args:
            hidden: Bytes of the input.
            rows: Rows of a token.
        """
        return (hidden if self.device_type == "cuda" else hidden // self.size * 4) + 4 * self.tokens * rows

    def _adapter(self, module: Any, needs_gradient: bool, rows: int) -> int:
        """Count what LoRA keeps beside its undropped input: products with A, dropped inputs, factors as used."""
        rank = adapter_rank(module)
        if rank == 0:
            return 0
        # B is kept as it is used, cast or not; A only where it is cast to the compute dtype.
        factors = len(module.slots) * rank * (module.out_features + module.in_features * (self.size < 4))
        kept: int = rows * rank + factors
        if module.groups == 1 and _drops(module):
            kept += rows * module.in_features
        bytes_kept = kept * self.size
        if module.groups == 1 and _drops(module) and needs_gradient:
            # The CPU keeps the noise that it multiplied with, CUDA's kernel a mask of bytes.
            bytes_kept += rows * module.in_features * (self.size if self.device_type == "cpu" else 1)
        return bytes_kept

    @staticmethod
    def _shared_input(modules: list[Any]) -> bool:
        """Tell whether adapters keep the very tensor that all of them read."""
        return any(adapter_rank(module) and not _drops(module) for module in modules)

    def _attention(self, attention: Any, needs_gradient: bool, inner: bool) -> int:
        """Count what attention's graph keeps, but for the input that its adapters share."""
        if self._fuses(attention):
            return sum(self._fused_attention(attention, inner))
        tokens, heads = self.tokens, attention.config.num_attention_heads
        inputs = [attention.q_proj, attention.k_proj, attention.v_proj]
        kept = sum(self._adapter(module, needs_gradient, tokens) for module in inputs)
        kept += self._adapter(attention.o_proj, inner, tokens)
        output = tokens * attention.q_proj.out_features * self.size
        # `causal_attention` computes it all again.
        keeps_output = inner and not (self.device_type == "cpu" and self.dtype == torch.bfloat16)
        if inner:  # q, which is as wide as the output, and k and v
            kept += output + 2 * tokens * attention.k_proj.out_features * self.size
            kept += self._own_norms(attention)
        if keeps_output:  # with the float32 logarithm of each head's softmax sum
            kept += output + 4 * tokens * heads
        # A copy of the documents' results side by side; else attention's own result is what the projection reads.
        if self._shared_input([attention.o_proj]) and (self.batch.packed or not keeps_output):
            kept += output
        return kept

    def _own_norms(self, attention: Any) -> int:
        """Count what attention's own norms of queries and keys keep."""
        kept = 0
        for projection, name in ((attention.q_proj, "q_norm"), (attention.k_proj, "k_norm")):
            if (norm := getattr(attention, name, None)) is not None:
                width = projection.out_features
                kept += self._norm(self.tokens * width * self.size, width // norm.weight.numel())
        return kept

    def _fuses(self, attention: Any) -> bool:
        """Tell if attention's projections are those of `attention.projections`, where documents are packed."""
        inputs = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        return self.device_type == "cuda" and self.size < 4 and has_triton() and can_fuse(inputs)

    def _fused_attention(self, attention: Any, inner: bool) -> tuple[int, int, int]:
        """Count what attention's graph keeps where projections are fused, but for the input that A reads undropped.

        Returns:
            Bytes of the projections of q, k and v; of these states and their result; and of the output's projection.
        """
        tokens, size, output_projection = self.tokens, self.size, attention.o_proj
        inputs = [attention.q_proj, attention.k_proj, attention.v_proj]
        projections: list[int] = []
        for modules in (inputs, [output_projection]):
            rank = -(-sum(map(adapter_rank, modules)) // 8) * 8
            projections.append(tokens * (rank + any(map(_drops, modules)) * modules[0].in_features) * size)
        result = tokens * attention.q_proj.out_features * size
        if inner:  # with the float32 logarithm of each head's softmax sum
            states = 2 * result + 2 * tokens * attention.k_proj.out_features * size
            states += 4 * tokens * attention.config.num_attention_heads
            states += self._own_norms(attention)
        else:
            states = result * self._shared_input([output_projection])
        return projections[0], states, projections[1]

    def _attention_backward(self, attention: Any, inner: bool) -> int:
        """Count the peak of attention's backward pass beside what it keeps, but for the gradient of its output."""
        query, key, hidden = (module.out_features for module in (attention.q_proj, attention.k_proj, attention.o_proj))
        if not self._fuses(attention):
            # The gradient of the input; q, k, v and attention's result beside their gradients.
            return int(self.tokens * (hidden + 4 * query + 4 * key) * self.size + self.decoded(attention.q_proj))
        inputs = [attention.q_proj, attention.k_proj, attention.v_proj]
        _, states, output = self._fused_attention(attention, inner)
        width = query + 2 * key
        # Numbers of a token, operands, and what is freed by then. Where rows are dropped, the gradient of a
        # projection's input is there as what comes through W, what comes through A, and their sum.
        moments = (
            (query * (1 + 2 * _drops(attention.o_proj)), self._operand([attention.o_proj]), 0),
            (query + width, 0, output),  # gradients of attention's result, and of q, k and v
            (2 * width + hidden * (1 + 2 * any(map(_drops, inputs))), self._operand(inputs), output + states),
        )
        return int(max(numbers * self.tokens * self.size + operand - freed for numbers, operand, freed in moments))

    def _operand(self, modules: list[Any]) -> int:
        """Count decoded weights with the Bs beside them, and the As with their gradients in float32."""
        inputs, rank = modules[0].in_features, sum(map(adapter_rank, modules))
        outputs = sum(module.out_features for module in modules)
        return int(outputs * (inputs + rank) * self.size + rank * inputs * (self.size + 4))

    def _moe(self, mlp: Any, needs_gradient: bool) -> int:
        """Count what router and experts keep, with their input."""
        experts, tokens, top_k = mlp.experts, self.tokens, mlp.gate.top_k
        rows = self._rows(experts)
        gate_up = 2 * rows * experts.gate_proj.out_features * self.size
        routing = 8 * rows + 8 * tokens * top_k  # int64: the token of each row, the row of each choice
        # float32 probabilities of all experts; of each choice the int64 expert, and where weights are normalised the
        # float32 probability before the division, whose result is counted below, and the float32 sum that divides.
        scores: int = tokens * (4 * mlp.gate.num_experts + 8 * top_k + (4 * top_k + 4) * mlp.gate.normalises)
        router_trains = needs_gradient or adapter_rank(mlp.gate.linear) > 0
        pair = [experts.gate_proj, experts.up_proj]
        adapters: int = sum(self._adapter(module, needs_gradient, rows) for module in pair)
        adapters += self._adapter(experts.down_proj, needs_gradient, rows=0)  # backward makes the product with A again
        if self.path == "fused":  # products with A alone: the masters are there anyway
            adapters = sum(rows * adapter_rank(module) * self.size for module in pair)
        elif self.size == 4:  # gate's and up's As are put side by side, whatever their type
            adapters += sum(4 * len(module.slots) * adapter_rank(module) * module.in_features for module in pair)
        kept = int(
            tokens * experts.gate_proj.in_features * self.size + gate_up + routing + 4 * tokens * top_k + adapters
        )
        return kept + scores * router_trains + self._adapter(mlp.gate.linear, needs_gradient, tokens)

    def block_sizes(self, experts: Any) -> BlockSizes:
        """Return the sizes of an expert block, for `PATH_MEMORY`."""
        gate, stack = experts.gate_proj, self._stack(experts)
        factors = sum(len(m.slots) * adapter_rank(m) * (m.in_features + m.out_features) for m in stack) * self.size
        return BlockSizes(
            self.tokens,
            self._rows(experts),
            hidden=int(gate.in_features),
            inner=int(gate.out_features),
            experts=int(gate.groups),
            size=self.size,
            matrix=self.decoded(gate),
            scales=sum(map(self.scales, stack)),
            factors=factors,
            drops_input=_drops(gate) or _drops(experts.up_proj),
            drops_inner=_drops(experts.down_proj),
            adapts_inner=adapter_rank(experts.down_proj) > 0,
            is_packed=isinstance(gate.storage, NF4Weight),
        )

    def _rows(self, experts: Any) -> int:
        """Return the routed rows when experts have equal shares, which padding on the CPU rounds up by half a step."""
        rows, groups = self.tokens * self.top_k, int(experts.gate_proj.groups)
        if self.path == "loop" and self.device_type == "cpu" and self.size < 4:
            each = -(-rows // groups)
            return groups * padded_rows(each) if each < 32 else rows + groups * row_step(each) // 2
        return rows

    def decoded(self, module: Any) -> int:
        """Count one matrix of a stack in the compute dtype, where it is not stored in it."""
        storage = module.storage
        dense = not isinstance(storage, NF4Weight) and storage.values.dtype == self.dtype
        return 0 if dense else int(storage.shape[1] * storage.shape[2] * self.size)

    @staticmethod
    def scales(module: Any) -> int:
        """Count the decoded scales of the blocks of all matrices of a stack."""
        storage = module.storage
        return 4 * storage.scales.numel() if isinstance(storage, NF4Weight) else 0

    def logits_chunk(self, head: Any) -> int:
        """Count the logits of a chunk in the compute dtype, and in float32 where no kernel makes their gradient."""
        vocabulary: int = head.out_features
        positions = min(self.tokens, chunk_positions(self.device_type, vocabulary))
        in_float32 = self.size < 4 and not (self.device_type == "cuda" and has_triton())
        return positions * vocabulary * (self.size + 4 * in_float32)

    @staticmethod
    def _stack(experts: Any) -> list[Any]:
        return [experts.gate_proj, experts.up_proj, experts.down_proj]


def _drops(module: Any) -> bool:
    """Tell whether the adapter of a projection drops inputs."""
    return adapter_rank(module) > 0 and any(module.lora_dropout[name].p > 0 for name in module.active_adapters)


@dataclass(frozen=True)
class ModelActivations:
    """Bytes of a model's training pass on a micro-batch.

    Args:
        layers: Activations of each decoder layer.
        shared: Tables of rotary positions.
        tail: Part that the last norm and the head keep.
        head: Peak of the head beside that: a chunk of logits, and its weight in the compute dtype where it trains.
        head_backward: Peak of the head's backward pass.
        logits_chunk: Logits in both.
        decoded: Largest weight that is decoded at a time.
    """

    layers: list[LayerActivations]
    shared: int
    tail: int
    head: int
    head_backward: int
    logits_chunk: int
    decoded: int


def model_activations(model: nn.Module, batch: MicroBatch, device_type: str) -> ModelActivations:
    """Count a model's activations; on the meta device, too.

    Args:
        model: A `MoeForCausalLM` or the PeftModel around it.
        batch: Shape of a micro-batch.
        device_type: ``cpu`` or ``cuda``, which differ in padding and in what dropout and attention keep.

    Raises:
        ValueError: ``MIXCN_EXPERT_PATH`` is no path, or one that cannot compute these sizes here.
    """
    base: Any = base_of(model)
    dtype, top_k = base.model.embed_tokens.output_dtype, base.config.num_experts_per_tok
    experts = base.model.layers[0].mlp.experts
    projections = experts.gate_proj, experts.up_proj, experts.down_proj
    path = training_path(projections, batch.tokens, top_k, dtype, device_type)
    count = LayerCounter(batch, dtype, device_type, top_k, path)
    needs_gradient, layers = base.model.embed_tokens.weight.requires_grad, []
    for layer in base.model.layers:
        activations, needs_gradient = count.layer(layer, needs_gradient)
        layers.append(activations)
    hidden, head = count.tokens * base.config.hidden_size, base.lm_head
    bytes_of_chunk, trained = count.logits_chunk(base.lm_head), head.weight.requires_grad
    weight = head.weight.numel() * count.size if trained and count.size < 4 else 0
    last = base.model.layers[-1]
    return ModelActivations(
        layers,
        shared=2 * count.tokens * last.self_attn.head_dim * count.size,
        tail=hidden * (4 + count.size) * needs_gradient,
        head=bytes_of_chunk + weight + hidden * count.size,
        head_backward=(bytes_of_chunk + weight * 2 + head.weight.numel() * 4 if trained else 0) + hidden * count.size,
        logits_chunk=bytes_of_chunk,
        decoded=max(count.decoded(module) for module in base.modules() if isinstance(module, FrozenLinear)),
    )
