"""`mixcn experts` beside evaluating the model once for each disabled expert: time, operations, and the same figures.

    python benchmarks/experts.py
    python benchmarks/experts.py --base Mixtral-8x7B-v0.1/ --sequence_length 2048

Both run on the same batches in one process and take turns, layer by layer; who begins alternates. The fast one's time
has all that it does: the model as it is, the way up to each layer, the comparison of outputs. The tokens are random,
which costs what text costs. Without --base, the weights are random, in the demo's sizes (SmolLM2-135M, 4 experts).
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import record
import torch
from long_context import DEMO
from torch import nn
from transformers import MixtralConfig

from lightning_mixcn.cli.allocator import keep_freed_memory
from lightning_mixcn.metrics import score_documents
from lightning_mixcn.model import build_mixtral, load_mixtral
from lightning_mixcn.model.causal_lm import base_of
from lightning_mixcn.studies.experts.disabling import Batch, disabled_expert
from lightning_mixcn.studies.experts.flops import pairs_of_rows
from lightning_mixcn.studies.experts.importance import Arrays, ExpertImportance

Result = TypeVar("Result")


def random_rows(vocabulary: int, rows: int, length: int, seed: int) -> Batch:
    """Make rows of two documents, every token but the first of a document labelled and of one byte."""
    half = length // 2
    ids = torch.randint(3, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))
    positions = torch.cat([torch.arange(half), torch.arange(length - half)]).expand(rows, length).contiguous()
    documents = (torch.arange(length) >= half).int().expand(rows, length)
    text = positions > 0
    return {
        "input_ids": ids,
        "labels": torch.where(text, ids, -100),
        "position_ids": positions,
        "document_ids": documents.contiguous(),
        "source_ids": torch.zeros(rows, length, dtype=torch.int16),
        "document_index": documents + 2 * torch.arange(rows)[:, None],
        "label_bytes": text.int(),
        "text_mask": text,
    }


def timed(work: Callable[[], Result]) -> tuple[Result, float]:
    """Return its result and its seconds; a GPU is waited for."""
    start = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def plain_layer(model: nn.Module, importance: ExpertImportance, batch: Batch, layer: int) -> list[torch.Tensor]:
    """Evaluate once for each variant: the nats of each document."""
    device = next(model.parameters()).device
    on_device = {name: part.to(device) for name, part in batch.items()}
    names = ("input_ids", "position_ids", "labels", "document_ids")
    nats = []
    for variant in importance.variants:
        with torch.no_grad(), disabled_expert(model, layer, variant):
            output: Any = model(**{name: on_device[name] for name in names}, use_cache=False)
        nats.append(score_documents(output.nll, on_device).nats)
    return nats


def compare(model: nn.Module, importance: ExpertImportance, batch: Batch, turn: int) -> dict[str, Any]:
    """Measure one batch, both ways."""
    evaluated, base_seconds = timed(lambda: importance.evaluate(batch))
    seconds, layers, apart = {"plain": 0.0, "fast": base_seconds}, range(importance.num_layers), 0.0
    fast = importance.disable(batch, evaluated, layers)
    flops, tokens = int(evaluated["flops"]), int(evaluated["tokens"].sum())
    for layer in layers:
        found: dict[str, Any] = {}
        ways: dict[str, Callable[[], Any]] = {
            "plain": lambda layer=layer: plain_layer(model, importance, batch, layer),
            "fast": lambda: next(fast)[1],
        }
        for name in ("plain", "fast") if (layer + turn) % 2 else ("fast", "plain"):
            found[name], spent = timed(ways[name])
            seconds[name] += spent
        part: Arrays = found["fast"]
        flops += int(part["flops"])
        for changed, nats in zip(part["nats"], found["plain"], strict=True):
            apart = max(apart, abs(float(nats.sum()) - float((evaluated["nats"] + changed).sum())) / tokens)
    size = batch["input_ids"].numel(), sum(pairs_of_rows(batch["position_ids"]))
    return seconds | {"flops": flops, "plain_flops": importance.flops.plain(*size), "nats_apart": apart}


def main() -> None:
    """Measure and write results/experts.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--base", help="Hugging Face or 4-bit folder; random weights of the demo's size without it")
    parser.add_argument("--layers", type=int, default=DEMO["num_hidden_layers"], help="of the random model")
    parser.add_argument("--experts", type=int, default=4, help="of a layer of the random model")
    parser.add_argument("--sequence_length", type=int, default=128, help="tokens a row")
    parser.add_argument("--rows", type=int, default=1, help="rows a batch")
    parser.add_argument("--rounds", type=int, default=3, help="batches measured, after one that is not")
    parser.add_argument("--mode", choices=("mask", "zero"), default="mask")
    parser.add_argument("--quantization", choices=("nf4", "none"), default="nf4")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--result", default="experts", help="name of the JSON under benchmarks/results")
    options = parser.parse_args()
    keep_freed_memory()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    how = {"quantization": options.quantization, "dtype": options.dtype, "device": device}
    sizes = DEMO | {"num_hidden_layers": options.layers, "num_local_experts": options.experts}
    model = load_mixtral(options.base, **how) if options.base else build_mixtral(MixtralConfig(**sizes), **how)
    importance = ExpertImportance(model.eval(), [options.mode], 1, options.rows)
    vocabulary = base_of(model).config.vocab_size
    rounds = []
    for turn in range(-1, options.rounds):
        batch = random_rows(vocabulary, options.rows, options.sequence_length, seed=turn + 1)
        measured = compare(model, importance, batch, turn)
        print(f"{'warm-up' if turn < 0 else turn}: {measured}", flush=True)
        rounds += [measured] * (turn >= 0)
    figures = {
        "settings": vars(options) | {"base": Path(options.base).name if options.base else "demo's size, random"},
        "seconds": {name: record.spread([part[name] for part in rounds]) for name in ("plain", "fast")},
        "speed_up": record.spread([part["plain"] / part["fast"] for part in rounds]),
        "flops_fast_over_plain": record.spread([part["flops"] / part["plain_flops"] for part in rounds]),
        "most_nats_per_token_apart": max(part["nats_apart"] for part in rounds),
    }
    print(json.dumps(figures, indent=2))
    print("written to", record.write(options.result, figures))


if __name__ == "__main__":
    main()
