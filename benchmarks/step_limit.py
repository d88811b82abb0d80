"""What a training step cannot be faster than: its large products and the traffic of decoding, both measured.

The products are plain bf16 GEMMs (`products.py`); what activation checkpointing computes again is counted. Decoding
reads a 4-bit weight (0.52 bytes) and writes it in 16 bits, once a pass: a copy of as many bytes is timed on the same
device in the same run. Not counted: attention's own products, SwiGLU, norms, routing, the optimizer.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from products import Shape, step_products, timed

_STORED_BYTES = 0.516  # of a weight in NF4, double quantised
_COPIED = 2**28  # bytes of the buffer that is copied to and fro


def recomputed_products(config: Any, tokens: int, mode: str) -> list[tuple[Shape, int]]:
    """Forward products that are made twice under activation checkpointing, without LoRA's."""
    hidden, layers, experts = config.hidden_size, config.num_hidden_layers, config.num_local_experts
    width = config.num_key_value_heads * (hidden // config.num_attention_heads)
    attention = [((tokens, hidden, hidden), 2 * layers), ((tokens, hidden, width), 2 * layers)]
    rows, inner = tokens * config.num_experts_per_tok // experts, config.intermediate_size
    # The experts' block keeps gate and up; its last product is not needed in backward, but a checkpoint makes it again.
    block = [((rows, hidden, inner), 2 * experts * layers), ((rows, inner, hidden), experts * layers)]
    return {"none": [], "selective": attention, "full": attention + block, "offload": attention + block}[mode]


def decoding_bytes(config: Any, mode: str) -> float:
    """Bytes read and written by decoding the frozen weights in a step."""
    hidden, inner = config.hidden_size, config.intermediate_size
    width = config.num_key_value_heads * (hidden // config.num_attention_heads)
    attention = 2 * hidden * (hidden + width)
    experts = 3 * config.num_local_experts * hidden * inner
    passes = {"none": (2, 2), "selective": (3, 2), "full": (3, 3), "offload": (3, 3)}[mode]
    weights = passes[0] * attention + passes[1] * experts
    return config.num_hidden_layers * weights * (_STORED_BYTES + 2)


def limit(config: Any, tokens: int, rank: int, mode: str, device: str) -> Callable[[], float]:
    """What gives the seconds of a step's products and traffic, measured anew at each call."""
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
