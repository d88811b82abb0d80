"""Who takes part in expert_block.py: our block on each of its paths, and the peers that can be imported.

Each is made with the same sizes and routing, and called with ``training``: forward and backward, or forward alone.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from random_base import drawn_values, expert_width
from torch import Tensor

from lightning_mixcn.model.experts.grouped import swiglu_backward_in_torch
from lightning_mixcn.model.experts.loop import Dropout
from lightning_mixcn.model.experts.path import PATHS
from lightning_mixcn.model.nf4.storage import NF4Weight

Contender = Callable[[bool], Any]
_NO_DROPOUT = Dropout()


class Rows:
    """The tokens of a micro-batch, their routing, and the gradient that comes back.

    Args:
        config: Sizes.
        tokens: How many.
        device: Where.
    """

    def __init__(self, config: Any, tokens: int, device: str) -> None:
        experts, top_k = config.num_local_experts, config.num_experts_per_tok
        self.x = torch.randn(tokens, config.hidden_size).bfloat16().to(device).requires_grad_()
        self.index = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)]).to(device)
        self.weight = torch.rand(self.index.shape, device=device, requires_grad=True)
        self.gradient = torch.randn(tokens, config.hidden_size).bfloat16().to(device)

    def run(self, block: Callable[[], Tensor], trained: list[Tensor], training: bool) -> list[Tensor]:
        """Call ``block``, with backward if ``training``; return its result and the gradients, which are taken away."""
        inputs = [self.x, self.weight, *trained]
        try:
            with torch.set_grad_enabled(training):
                y = block()
                if training:
                    y.backward(self.gradient)
            return [y.detach(), *(tensor.grad for tensor in inputs if tensor.grad is not None)]
        finally:
            for tensor in inputs:
                tensor.grad = None


class Block:
    """Our block in NF4 with LoRA on every expert, all weights random.

    Args:
        config: Sizes.
        rank: Rank of LoRA.
        device: Device.
    """

    def __init__(self, config: Any, rank: int, device: str) -> None:
        hidden, inner, self.experts = config.hidden_size, expert_width(config), config.num_local_experts
        self.device, self._generator = device, torch.Generator(device).manual_seed(0)
        self.weights = self._frozen(inner, hidden), self._frozen(inner, hidden), self._frozen(hidden, inner)
        sizes = ((2 * rank, hidden), (inner, rank), (inner, rank), (rank, inner), (hidden, rank))
        self.factors = [self._factor(*size) for size in sizes]

    def run(self, path: str, rows: Rows, training: bool, dropout: Dropout = _NO_DROPOUT) -> list[Tensor]:
        """Compute the block on a path; return its result and, if ``training``, its gradients."""
        operands = rows.x, rows.index, rows.weight, self.weights, dropout, *self.factors
        return rows.run(lambda: PATHS[path](*operands), self.factors, training)

    def _frozen(self, rows: int, columns: int) -> NF4Weight:
        weight = NF4Weight((self.experts, rows, columns), self.device)
        for start, values in drawn_values(weight.shape, 0.02, self._generator):
            weight.write(start, values)
        return weight

    def _factor(self, *shape: int) -> Tensor:
        return (torch.randn(self.experts, *shape, device=self.device) * 0.02).bfloat16().requires_grad_()


def ours(config: Any, rows: Rows, rank: int, dropout: float, device: str) -> dict[str, Contender]:
    """Make our block: on the CPU ``ours``, expert by expert; on a GPU each path, by its name."""
    block, masks = Block(config, rank, device), Dropout(dropout, seed=0)

    def on(path: str) -> Contender:
        return lambda training: block.run(path, rows, training, masks)

    return {"ours": on("loop")} if device == "cpu" else {path: on(path) for path in PATHS}


def peers(config: Any, rows: Rows, rank: int, device: str) -> dict[str, Callable[[], Contender]]:
    """Return makers of those that can be imported; none on the CPU, where ``train_step.py`` measures stock."""
    if device == "cpu":
        return {}
    found = {"transformers bf16, no LoRA": lambda: _transformers(config, rows, device)}
    if importlib.util.find_spec("experts4bit_qlora"):
        found["experts4bit-qlora"] = lambda: _experts4bit(config, rows, rank, device)
    return found


def kernels(config: Any, tokens: int) -> dict[str, dict[str, Callable[[], Any]]]:
    """List our kernels that replace several operations, each beside those; on a GPU."""
    from lightning_mixcn.model.kernels import nf4_decode, swiglu
    from lightning_mixcn.model.nf4 import codec as nf4

    hidden, inner, experts = config.hidden_size, expert_width(config), config.num_local_experts
    packed = nf4.quantize_nf4(torch.randn(experts * inner * hidden, device="cuda") * 0.02)
    size = tokens * config.num_experts_per_tok, inner
    gate, up, dh = (torch.randn(size, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    weight = torch.rand(size[0], device="cuda", dtype=torch.bfloat16)
    return {
        "decoding a projection": {
            "kernel": lambda: nf4_decode.nf4_decode(packed, torch.bfloat16),
            "bitsandbytes": lambda: nf4.dequantize_nf4(packed, torch.bfloat16),
        },
        "SwiGLU": {"kernel": lambda: swiglu.swiglu_kernel(gate, up), "torch": lambda: F.silu(gate).mul_(up)},
        "SwiGLU backward": {
            "kernel": lambda: swiglu.swiglu_backward_kernel(gate, up, dh, weight),
            "torch": lambda: swiglu_backward_in_torch(gate, up, dh, weight),
        },
    }


def _transformers(config: Any, rows: Rows, device: str) -> Contender:
    """Make stock experts in bf16 on torch's grouped product, frozen: no LoRA, no decoding, less work than ours."""
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config._experts_implementation = "grouped_mm"
    with torch.device(device):
        experts = MixtralExperts(config).bfloat16().requires_grad_(False)
    for parameter in experts.parameters():
        parameter.normal_(std=0.02)
    return lambda training: rows.run(lambda: experts(rows.x, rows.index, rows.weight), [], training)


def _experts4bit(config: Any, rows: Rows, rank: int, device: str) -> Contender:
    """Make PyPI's experts4bit-qlora without its optional kernels; gate and up share an A (ours have one each)."""
    from experts4bit_qlora import Experts4bit, ExpertsLoRA

    hidden, inner, experts = config.hidden_size, expert_width(config), config.num_local_experts
    gate_up = torch.randn(experts, 2 * inner, hidden, device=device, dtype=torch.bfloat16) * 0.02
    down = torch.randn(experts, hidden, inner, device=device, dtype=torch.bfloat16) * 0.02
    block = ExpertsLoRA(Experts4bit.from_float(gate_up, down), r=rank).to(device)
    trained = [parameter for parameter in block.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter.normal_(std=0.02)  # with B = 0 it would skip LoRA
    return lambda training: rows.run(lambda: block(rows.x, rows.index, rows.weight), trained, training)
