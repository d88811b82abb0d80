"""Limits of a training step: its large products as plain GEMMs, and the traffic of decoding, both measured.

The products are bf16 GEMMs of the same shapes. A step with frozen weights multiplies every weight with its rows twice
(forward, and the gradient of its input), and every LoRA factor three times (the factor's own gradient, too); what
activation checkpointing computes again is counted. Rows of an expert: tokens · top-k / experts. Decoding reads a 4-bit
weight (0.52 bytes) and writes it in 16 bits, once a pass: a copy of as many bytes is timed on the same device in the
same run. Not counted: attention's own products, SwiGLU, norms, routing, the optimizer.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from random_base import expert_width

from lightning_mixcn.model.checkpoints.layout import module_shapes

Shape = tuple[int, int, int]  # rows, inner, columns
_STORED_BYTES = 0.516  # of a weight in NF4, double quantised
_COPIED = 2**28  # bytes of the buffer that is copied to and fro


def expert_products(config: Any, tokens: int, rank: int, training: bool = True) -> list[tuple[Shape, int]]:
    """Return shapes of the products of one layer's experts in a step (or forward alone), and how often each is made."""
    hidden, inner, experts = config.hidden_size, expert_width(config), config.num_local_experts
    rows = tokens * config.num_experts_per_tok // experts
    if not training:
        forward = [((rows, hidden, inner), 2 * experts), ((rows, inner, hidden), experts)]
        for projections, width_in, width_out in ((2, hidden, inner), (1, inner, hidden)):
            forward += _lora(rows, width_in, width_out, rank, projections * experts)[:2]
        return forward
    # Forward of gate and up is backward's shape of down, and the other way round.
    shapes = [((rows, hidden, inner), 3 * experts), ((rows, inner, hidden), 3 * experts)]
    for projections, width_in, width_out in ((2, hidden, inner), (1, inner, hidden)):
        shapes += _lora(rows, width_in, width_out, rank, projections * experts)
    return shapes


def attention_matrices(config: Any) -> list[tuple[int, int]]:
    """Return the sizes ``(out, in)`` of the projections of one layer's attention."""
    prefix = "model.layers.0.self_attn."
    found = [shape for name, shape in module_shapes(config).items() if name.startswith(prefix)]
    return [(shape[1], shape[2]) for shape in found if len(shape) == 3]  # others are norms


def step_products(config: Any, tokens: int, rank: int) -> list[tuple[Shape, int]]:
    """Return the same of a whole step: experts, attention's projections and the head; not attention itself."""
    hidden, layers = config.hidden_size, config.num_hidden_layers
    shapes = [(shape, times * layers) for shape, times in expert_products(config, tokens, rank)]
    for columns, inner in attention_matrices(config):
        shapes += [((tokens, inner, columns), layers), ((tokens, columns, inner), layers)]
        shapes += _lora(tokens, inner, columns, rank, layers)
    vocabulary = config.vocab_size
    return [*shapes, ((tokens, hidden, vocabulary), 1), ((tokens, vocabulary, hidden), 1)]


def flops(shapes: list[tuple[Shape, int]]) -> int:
    """Count the floating point operations of the products."""
    return sum(2 * rows * inner * columns * times for (rows, inner, columns), times in shapes)


def timed(shapes: list[tuple[Shape, int]], device: str = "cpu") -> Callable[[], float]:
    """Return a function that makes all products once and returns its seconds.

    Operands are views of three buffers that are drawn here, each as large as its largest operand: all at once would
    take 50 GB for a row of 131,072 tokens of Mixtral-8x7B.
    """
    sizes = [(rows * inner, columns * inner, rows * columns) for (rows, inner, columns), _ in shapes]
    largest = [max(numbers) for numbers in zip(*sizes, strict=True)]
    buffers = [torch.empty(number, dtype=torch.bfloat16, device=device).normal_() for number in largest]

    def run() -> float:
        start = time.perf_counter()
        for ((rows, inner, columns), times), numbers in zip(shapes, sizes, strict=True):
            left, right, out = (buffer[:number] for buffer, number in zip(buffers, numbers, strict=True))
            for _ in range(times):
                torch.mm(left.view(rows, inner), right.view(columns, inner).t(), out=out.view(rows, columns))
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return run


def _lora(rows: int, width_in: int, width_out: int, rank: int, times: int) -> list[tuple[Shape, int]]:
    """Forward x Aᵀ and (x Aᵀ) Bᵀ; backward dy B, (dy B) A, and the gradients of A and B."""
    return [
        ((rows, width_in, rank), times),
        ((rows, rank, width_out), times),
        ((rows, width_out, rank), times),
        ((rows, rank, width_in), times),
        ((rank, rows, width_in), times),
        ((width_out, rows, rank), times),
    ]


def recomputed_products(config: Any, tokens: int, mode: str) -> list[tuple[Shape, int]]:
    """Forward products that are made twice under activation checkpointing, without LoRA's."""
    hidden, layers, experts = config.hidden_size, config.num_hidden_layers, config.num_local_experts
    attention = [((tokens, width_in, width_out), layers) for width_out, width_in in attention_matrices(config)]
    rows, inner = tokens * config.num_experts_per_tok // experts, expert_width(config)
    # The experts' block keeps gate and up; its last product is not needed in backward, but a checkpoint makes it again.
    block = [((rows, hidden, inner), 2 * experts * layers), ((rows, inner, hidden), experts * layers)]
    return {"none": [], "selective": attention, "full": attention + block, "offload": attention + block}[mode]


def decoding_bytes(config: Any, mode: str) -> float:
    """Return bytes read and written by decoding the frozen weights in a step."""
    attention = sum(rows * columns for rows, columns in attention_matrices(config))
    experts = 3 * config.num_local_experts * config.hidden_size * expert_width(config)
    passes = {"none": (2, 2), "selective": (3, 2), "full": (3, 3), "offload": (3, 3)}[mode]
    weights = passes[0] * attention + passes[1] * experts
    return config.num_hidden_layers * weights * (_STORED_BYTES + 2)


def limit(config: Any, tokens: int, rank: int, mode: str, device: str) -> Callable[[], float]:
    """Return a function that measures the seconds of a step's products and traffic."""
    products = timed([*step_products(config, tokens, rank), *recomputed_products(config, tokens, mode)], device)
    traffic = decoding_bytes(config, mode)
    source, target = (torch.empty(_COPIED, dtype=torch.uint8, device=device) for _ in range(2))

    def run() -> float:
        seconds = products()
        start = time.perf_counter()
        for _ in range(8):
            target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()
        # A copied byte is read once and written once.
        return seconds + traffic * (time.perf_counter() - start) / (8 * 2 * _COPIED)

    return run
