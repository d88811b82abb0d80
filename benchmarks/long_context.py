"""Long context: time and memory of one row by chunked prefill, at the demo's size in 4 bits or of a real base.

    python benchmarks/long_context.py
    python benchmarks/long_context.py --base Mixtral-8x7B-v0.1/ --chunk 2048
    python benchmarks/long_context.py --preset full-8x7b      # random weights, drawn on the GPU

The row is of random tokens, which cost what text costs. Peak memory is the process's resident set, and on a GPU what
torch reserved. Without --base, the weights are random, in a preset's sizes or the demo's (SmolLM2-135M, 4 experts).
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import record
import torch
from random_base import PRESETS, config_of, random_model
from torch import nn
from transformers import MixtralConfig

from lightning_mixcn.commands.process import peak_resident_bytes
from lightning_mixcn.model import build_mixtral, load_mixtral
from lightning_mixcn.model.causal_lm import base_of
from lightning_mixcn.model.inference.prefill import ChunkedPrefill

DEMO: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": True,
}


def peak_bytes() -> dict[str, int]:
    """Return the most memory that this process has had."""
    peaks = {"resident": peak_resident_bytes()}
    return peaks | ({"cuda_reserved": torch.cuda.max_memory_reserved()} if torch.cuda.is_available() else {})


def prefilled(model: nn.Module, tokens: int, chunk: int) -> Iterator[tuple[int, float, float]]:
    """Run a row of random tokens chunk by chunk.

    Yields:
        Tokens so far, seconds since the beginning, and the sum of their nats.
    """
    vocabulary = base_of(model).config.vocab_size
    row = torch.randint(3, vocabulary, (tokens,), generator=torch.Generator().manual_seed(0))
    start, nats = time.perf_counter(), 0.0
    with torch.no_grad():
        prefill = ChunkedPrefill(model.eval(), tokens)
        for place in range(0, tokens, chunk):
            scores = prefill.advance(row[place : place + chunk], row[place + 1 : place + 1 + chunk])
            nats += float(scores.nats.sum())
            yield prefill.tokens, time.perf_counter() - start, nats


def main() -> None:
    """Measure and write results/long_context.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--base", help="Hugging Face or 4-bit folder")
    source.add_argument("--preset", choices=list(PRESETS), help="sizes of random weights; the demo's without it")
    parser.add_argument("--tokens", type=int, default=131_072, help="length of the row")
    parser.add_argument("--chunk", type=int, help="tokens of a forward pass; 512, on a GPU 4096")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options.chunk = options.chunk or (4096 if device == "cuda" else 512)
    if options.base:
        model: nn.Module = load_mixtral(options.base, device=device)
    elif options.preset:
        model = random_model(config_of(options.preset), None, torch.device(device))
    else:
        model = build_mixtral(MixtralConfig(**DEMO), device=device)
    before, passed = peak_bytes(), {}
    for tokens, seconds, nats in prefilled(model, options.tokens, options.chunk):
        if tokens & (tokens - 1) == 0 or tokens == options.tokens:
            passed[tokens] = seconds
            print(f"{tokens} tokens: {seconds:.1f} s, {nats / tokens:.2f} nats a token, {peak_bytes()}", flush=True)
    named = Path(options.base).name if options.base else f"{options.preset or 'the demo'}, random weights"
    figures = {
        "settings": vars(options) | {"base": named},
        "seconds_to_context": passed,
        "tokens_per_second": options.tokens / passed[options.tokens],
        "nll_nats_per_token": nats / (options.tokens - 1),
        "bytes_before": before,
        "peak_bytes": peak_bytes(),
    }
    print(json.dumps(figures, indent=2))
    print("written to", record.write("long_context", figures))


if __name__ == "__main__":
    main()
