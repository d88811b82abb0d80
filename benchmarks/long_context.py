"""Long context: time and memory of one row by chunked prefill, at the demo's size in 4 bits or of a real base.

    python benchmarks/long_context.py
    python benchmarks/long_context.py --base Mixtral-8x7B-v0.1/ --chunk 2048

The row is of random tokens, which cost what text costs. Peak memory is the process's resident set, and on a GPU what
torch reserved. Without --base, the weights are random, in the demo's sizes (SmolLM2-135M with 4 experts).
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import record
import torch
from transformers import MixtralConfig

from lightning_mixcn.commands.process import peak_resident_bytes
from lightning_mixcn.model import build_mixtral, load_mixtral
from lightning_mixcn.model.inference.prefill import ChunkedPrefill
from lightning_mixcn.model.mixtral import base_of

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


def main() -> None:
    """Measure and write results/long_context.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="Hugging Face or 4-bit folder; random weights of the demo's size without it")
    parser.add_argument("--tokens", type=int, default=131_072, help="length of the row")
    parser.add_argument("--chunk", type=int, default=512, help="tokens of a forward pass")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = (
        load_mixtral(options.base, device=device)
        if options.base
        else build_mixtral(MixtralConfig(**DEMO), device=device)
    )
    vocabulary = base_of(model).config.vocab_size
    row = torch.randint(3, vocabulary, (options.tokens,), generator=torch.Generator().manual_seed(0))
    before, start, nats, passed = peak_bytes(), time.perf_counter(), 0.0, {}
    with torch.no_grad():
        prefill = ChunkedPrefill(model.eval(), options.tokens)
        for place in range(0, options.tokens, options.chunk):
            scores = prefill.advance(row[place : place + options.chunk], row[place + 1 : place + 1 + options.chunk])
            nats += float(scores.nats.sum())
            if prefill.tokens & (prefill.tokens - 1) == 0 or prefill.tokens == options.tokens:
                passed[prefill.tokens] = time.perf_counter() - start
                print(f"{prefill.tokens} tokens: {passed[prefill.tokens]:.1f} s, {peak_bytes()}", flush=True)
    figures = {
        "settings": vars(options) | {"base": Path(options.base).name if options.base else "demo's size, random"},
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
