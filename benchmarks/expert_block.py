"""The expert block alone, forward and backward: ours in NF4 beside plain bf16 GEMMs of the same shapes (the limit).

    python benchmarks/expert_block.py --preset cpu-small --rank 64

The limit has the products only: no decoding, no gathering of rows, no SwiGLU, no routing. Both take turns
in one process.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import record
import torch
from products import expert_products, flops, timed
from random_base import PRESETS, config_of

from lightning_mixcn.model.expert_function import Dropout, ExpertBlock, ExpertWeights
from lightning_mixcn.model.weights import NF4Weight


def block(config: Any, tokens: int, rank: int) -> Callable[[], float]:
    """What runs our block forward and backward once, and gives its seconds."""
    hidden, inner, experts = config.hidden_size, config.intermediate_size, config.num_local_experts

    def frozen(rows: int, columns: int) -> NF4Weight:
        weight = NF4Weight((experts, rows, columns))
        weight.write(0, torch.randn(experts * rows * columns) * 0.02)
        return weight

    def factor(*shape: int) -> torch.Tensor:
        return (torch.randn(experts, *shape) * 0.02).bfloat16().requires_grad_()

    weights = ExpertWeights(frozen(inner, hidden), frozen(inner, hidden), frozen(hidden, inner))
    factors = [factor(2 * rank, hidden), factor(inner, rank), factor(inner, rank), factor(rank, inner)]
    factors.append(factor(hidden, rank))
    x = torch.randn(tokens, hidden).bfloat16().requires_grad_()
    chosen = torch.stack([torch.randperm(experts)[: config.num_experts_per_tok] for _ in range(tokens)])
    routing = torch.rand(chosen.shape).requires_grad_()
    gradient = torch.randn(tokens, hidden).bfloat16()

    def run() -> float:
        start = time.perf_counter()
        ExpertBlock.apply(x, chosen, routing, weights, Dropout(), *factors).backward(gradient)
        seconds = time.perf_counter() - start
        for tensor in (x, routing, *factors):
            tensor.grad = None
        return seconds

    return run


def main() -> None:
    """Measure and write results/expert_block.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), default="cpu-small", help="sizes")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096], help="tokens of a micro-batch")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--warmup", type=int, default=2, help="untimed runs of each")
    parser.add_argument("--rounds", type=int, default=9, help="timed runs of each")
    parser.add_argument("--result", default="expert_block", help="name of the JSON under benchmarks/results")
    options = parser.parse_args()
    config, figures = config_of(options.preset), {}
    for tokens in options.tokens:
        shapes = expert_products(config, tokens, options.rank)
        runs = {"ours": block(config, tokens, options.rank), "limit": timed(shapes)}
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(options.warmup + options.rounds):
            for name, run in runs.items():
                seconds[name].append(run())
        seconds = {name: values[options.warmup :] for name, values in seconds.items()}
        share = record.spread([a / b for a, b in zip(seconds["limit"], seconds["ours"], strict=True)])
        rate = record.spread([flops(shapes) / value / 1e9 for value in seconds["limit"]])
        milliseconds = {name: record.spread([1e3 * value for value in values]) for name, values in seconds.items()}
        figures[str(tokens)] = {"milliseconds": milliseconds, "share_of_limit": share, "limit_gflops_per_second": rate}
        medians = ", ".join(f"{name} {value['median']:.0f} ms" for name, value in milliseconds.items())
        print(f"{tokens} tokens: {medians} ({rate['median']:.0f} GFLOP/s)")
        print(f"  ours reaches {share['median']:.0%} of the limit ({share['min']:.0%} to {share['max']:.0%})")
    print("written to", record.write(options.result, {"settings": vars(options), "by_tokens": figures}))


if __name__ == "__main__":
    main()
