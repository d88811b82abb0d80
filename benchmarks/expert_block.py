"""The expert block alone: ours in NF4 beside plain bf16 GEMMs of the same shapes (the limit).

    python benchmarks/expert_block.py --preset cpu-small --rank 64
    python benchmarks/expert_block.py --preset layer-8x7b --rank 64 --result expert_block_gpu

On a GPU, each path of the block takes part, and the peers that can be imported, from 1 to 4,096 rows an expert, both
forward with backward and forward alone. Which path is fastest where is printed last: that is what `FASTEST` in
lightning_mixcn/model/experts/block.py is for. The limit has the products only: no decoding, no gathering of rows, no
SwiGLU, no routing. All take turns in one process.
"""

import argparse
import math
import time
from collections.abc import Callable
from typing import Any

import record
import torch
from contenders.experts import Rows, kernels, ours, peers
from limits import expert_products, flops, timed
from random_base import PRESETS, config_of

from lightning_mixcn.model.experts.block import PATHS

GIGABYTE = 1e9


def seconds_of(work: Callable[[], Any], device: str) -> float:
    """Return the seconds until all is computed."""
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def extra_gigabytes(work: Callable[[], None]) -> float:
    """Return the gigabytes that ``work`` has allocated at its peak on a GPU, beyond what was there."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    return (torch.cuda.max_memory_allocated() - before) / GIGABYTE


def measure(config: Any, tokens: int, training: bool, options: argparse.Namespace) -> dict[str, Any]:
    """Return figures of one size."""
    device = options.device
    shapes = expert_products(config, tokens, options.rank, training)
    rows, limit = Rows(config, tokens, device), timed(shapes, device)
    contenders = ours(config, rows, options.rank, device) | peers(config, rows, options.rank, device)
    runs = {name: (lambda run=run: run(training)) for name, run in contenders.items()}
    figures: dict[str, Any] = {"rows_per_expert": rows.index.numel() / config.num_local_experts}
    if device == "cuda":
        figures["extra_gigabytes"] = {name: extra_gigabytes(run) for name, run in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in (*runs, "limit")}
    for _ in range(options.warmup + options.rounds):
        for name, run in runs.items():
            seconds[name].append(seconds_of(run, device))
        seconds["limit"].append(limit())
    seconds = {name: values[options.warmup :] for name, values in seconds.items()}
    shares = {
        name: record.spread([limit / value for limit, value in zip(seconds["limit"], values, strict=True)])
        for name, values in seconds.items()
    }
    figures["milliseconds"] = {name: record.spread([1e3 * part for part in part_s]) for name, part_s in seconds.items()}
    figures["share_of_limit"] = shares.get("ours", shares)
    figures["limit_gflops_per_second"] = record.spread([flops(shapes) / value / 1e9 for value in seconds["limit"]])
    return figures


def measure_kernels(config: Any, tokens: int, options: argparse.Namespace) -> dict[str, Any]:
    """Measure the milliseconds of our kernels and of what they replace, in turns."""
    pairs, found = kernels(config, tokens), {}
    for name, ways in pairs.items():
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(options.warmup + options.rounds):
            for way, run in ways.items():
                seconds[way].append(seconds_of(run, options.device))
        found[name] = {
            way: record.spread([1e3 * part for part in parts[options.warmup :]]) for way, parts in seconds.items()
        }
        print(f"{name}: " + ", ".join(f"{way} {value['median']:.3g} ms" for way, value in found[name].items()))
    return found


def report(tokens: int, figures: dict[str, Any]) -> None:
    """Print a size's figures."""
    rate, rows = figures["limit_gflops_per_second"]["median"], figures["rows_per_expert"]
    medians = ", ".join(f"{name} {value['median']:.3g} ms" for name, value in figures["milliseconds"].items())
    print(f"{tokens} tokens, {rows:g} rows an expert: {medians} ({rate:.0f} GFLOP/s)")
    shares = figures["share_of_limit"]
    for name, share in {"ours": shares}.items() if "median" in shares else shares.items():
        memory = f", {figures['extra_gigabytes'][name]:.2f} GB" if name in figures.get("extra_gigabytes", {}) else ""
        print(f"  {name} reaches {share['median']:.0%} of the limit ({share['min']:.0%} to {share['max']:.0%}){memory}")


def fastest(by_tokens: dict[str, dict[str, Any]]) -> list[tuple[float, str]]:
    """Return (rows of an expert below which, the fastest path), ascending; between two sizes, their geometric mean."""
    table: list[tuple[float, str]] = []
    last_rows = 0.0
    for figures in sorted(by_tokens.values(), key=lambda figures: figures["rows_per_expert"]):
        medians = {name: value["median"] for name, value in figures["milliseconds"].items() if name in PATHS}
        winner, rows = min(medians, key=lambda name: medians[name]), figures["rows_per_expert"]
        if table and table[-1][1] == winner:
            table[-1] = (math.inf, winner)
        else:
            if table:
                table[-1] = (math.sqrt(last_rows * rows), table[-1][1])
            table.append((math.inf, winner))
        last_rows = rows
    return table


def options_of() -> argparse.Namespace:
    """Parse the command line's options, those of the device filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), default="cpu-small", help="sizes")
    parser.add_argument("--tokens", type=int, nargs="+", help="of a micro-batch; 1024 4096, on a GPU 4 to 16384")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--warmup", type=int, default=2, help="untimed runs of each")
    parser.add_argument("--rounds", type=int, default=9, help="timed runs of each")
    parser.add_argument("--result", default="expert_block", help="name of the JSON under benchmarks/results")
    options = parser.parse_args()
    options.device = "cuda" if torch.cuda.is_available() else "cpu"
    # Eight experts, two a token: four tokens are one row an expert.
    usual = [4**power for power in range(1, 8)] if options.device == "cuda" else [1024, 4096]
    options.tokens = options.tokens or usual
    return options


def main() -> None:
    """Measure and write results/expert_block.json."""
    options = options_of()
    config, figures = config_of(options.preset), {"settings": vars(options)}
    for name, training in {"by_tokens": True, "forward_by_tokens": False}.items():
        if not training and options.device == "cpu":
            continue
        print("forward and backward" if training else "forward alone")
        figures[name] = {}
        for tokens in options.tokens:
            figures[name][str(tokens)] = measure(config, tokens, training, options)
            report(tokens, figures[name][str(tokens)])
        if options.device == "cuda":
            print("fastest path:", fastest(figures[name]))
    if options.device == "cuda":
        figures["kernels"] = measure_kernels(config, options.tokens[-1], options)
    print("written to", record.write(options.result, figures))


if __name__ == "__main__":
    main()
