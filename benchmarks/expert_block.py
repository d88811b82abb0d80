"""The expert block alone: ours in NF4 beside plain bf16 GEMMs of the same shapes (the limit).

    python benchmarks/expert_block.py --preset cpu-small --rank 64
    python benchmarks/expert_block.py --preset layer-8x7b --rank 64 --result expert_block_gpu

On a GPU, each path of the block takes part, and the peers that can be imported, from 1 to 4,096 rows an expert, both
forward with backward and forward alone. Which path is fastest where is printed last; `gpu_all.py` writes the file that
`FASTEST` in lightning_mixcn/model/experts/path.py reads. The limit has the products only: no decoding, no gathering of
rows, no SwiGLU, no routing. All take turns in one process.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import record
import torch
from contenders.experts import Rows, kernels, ours, peers
from limits import expert_products, flops, timed
from random_base import PRESETS, config_of

from lightning_mixcn.model.experts.path import PATHS

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
    """Return figures of one size; a contender that raises loses its own only, and its error is among them."""
    device = options.device
    shapes = expert_products(config, tokens, options.rank, training)
    rows, limit = Rows(config, tokens, device), timed(shapes, device)
    figures: dict[str, Any] = {"rows_per_expert": rows.index.numel() / config.num_local_experts, "absent": {}}
    contenders = ours(config, rows, options.rank, options.dropout, device)
    for name, make in peers(config, rows, options.rank, device).items():
        attempt(name, lambda make=make, name=name: contenders.update({name: make()}), figures["absent"])
    runs = {name: (lambda run=run: run(training)) for name, run in contenders.items()}
    if device == "cuda":
        figures["extra_gigabytes"] = {}
        for name, run in runs.items():
            peak = attempt(name, lambda run=run: extra_gigabytes(run), figures["absent"])
            figures["extra_gigabytes"] |= {name: peak} if peak is not None else {}
    seconds = in_turn(runs | {"limit": limit}, options.warmup, options.rounds, device, figures["absent"])
    shares = {
        name: record.spread([limit / value for limit, value in zip(seconds["limit"], values, strict=True)])
        for name, values in seconds.items()
    }
    figures["milliseconds"] = {name: record.spread([1e3 * part for part in part_s]) for name, part_s in seconds.items()}
    figures["share_of_limit"] = shares.get("ours", shares)
    figures["limit_gflops_per_second"] = record.spread([flops(shapes) / value / 1e9 for value in seconds["limit"]])
    return figures


def attempt(name: str, work: Callable[[], Any], absent: dict[str, str]) -> Any:
    """Return what ``work`` does; if it raises, note the error under ``name`` and return nothing."""
    try:
        return work()
    except Exception as error:  # whatever breaks in a contender is its result
        absent[name] = f"{type(error).__name__}: {error}".split("\n")[0]
        return None


def in_turn(
    runs: dict[str, Callable[[], Any]], warmup: int, rounds: int, device: str, absent: dict[str, str]
) -> dict[str, list[float]]:
    """Let all take turns; return the seconds of their timed rounds, of those that came through all of them.

    Args:
        runs: What is measured.
        warmup: Untimed rounds of each.
        rounds: Timed rounds of each.
        device: Device.
        absent: Errors so far, by name: these are left out, and those that raise are added.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(warmup + rounds):
        for name, run in runs.items():
            if name not in absent:
                seconds[name].append(attempt(name, lambda run=run: seconds_of(run, device), absent))
    return {name: values[warmup:] for name, values in seconds.items() if name not in absent}


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
    for name, error in figures["absent"].items():
        print(f"  {name} did not take part: {error}")
    shares = figures["share_of_limit"]
    for name, share in {"ours": shares}.items() if "median" in shares else shares.items():
        memory = f", {figures['extra_gigabytes'][name]:.2f} GB" if name in figures.get("extra_gigabytes", {}) else ""
        print(f"  {name} reaches {share['median']:.0%} of the limit ({share['min']:.0%} to {share['max']:.0%}){memory}")


def milliseconds_by_rows(sizes: Iterable[dict[str, Any]]) -> dict[float, dict[str, float]]:
    """Return what `fastest` takes, of figures as `measure` returns them."""
    return {
        size["rows_per_expert"]: {name: ms["median"] for name, ms in size["milliseconds"].items() if name in PATHS}
        for size in sizes
    }


def fastest(by_rows: dict[float, dict[str, float]]) -> list[tuple[float, str]]:
    """Return (rows of an expert below which, the fastest path), ascending; between two sizes, their geometric mean.

    Args:
        by_rows: Rows of an expert that were measured, to the milliseconds of each path.
    """
    table: list[tuple[float, str]] = []
    last_rows = 0.0
    for rows, milliseconds in sorted(by_rows.items()):
        winner = min(milliseconds, key=lambda name: milliseconds[name])
        if table and table[-1][1] != winner:
            table[-1] = (math.sqrt(last_rows * rows), table[-1][1])
        if not table or table[-1][1] != winner:
            table.append((math.inf, winner))
        last_rows = rows
    return table


def options_of() -> argparse.Namespace:
    """Parse the command line's options, those of the device filled in."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--preset", choices=list(PRESETS), default="cpu-small", help="sizes")
    parser.add_argument("--tokens", type=int, nargs="+", help="of a micro-batch; 1024 4096, on a GPU 4 to 16384")
    parser.add_argument("--rank", type=int, default=64, help="of LoRA on every expert")
    parser.add_argument("--dropout", type=float, default=0.0, help="probability of ours' LoRA dropout; peers have none")
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
            print("fastest path:", fastest(milliseconds_by_rows(figures[name].values())))
    if options.device == "cuda":
        figures["kernels"] = measure_kernels(config, options.tokens[-1], options)
    print("written to", record.write(options.result, figures))


if __name__ == "__main__":
    main()
