"""Tokens per second of decoding: ours with 4-bit experts beside stock transformers in bf16, and the limit of memory.

    python benchmarks/generate.py --preset cpu-small
    python benchmarks/generate.py --preset full-8x7b      # ours alone: stock in bf16 takes 94 GB

Both run transformers' `generate` with a KV cache, greedily, on the same random prompts. The seconds of one new token
are subtracted from those of all, so that reading the prompt does not count. The limit is a GPU's or a CPU's memory: the
bytes of the weights that a token needs (those of the experts that a batch is expected to choose, in 4 bits), over the
rate of a copy measured in turn with the rest: nothing that reads these weights from memory for each token is faster.
Each runs in a process of its own; they take turns. The base is random: a folder where stock takes part, else drawn in
memory, since a GPU's machine may have no disk for 94 GB.
"""

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import record
from limits import attention_matrices
from random_base import PRESETS, config_of, expert_width, random_model, write_random_base

_COPIED = 2**28  # bytes of the buffer that is copied to and fro
_STORED_BYTES = 0.516  # of a weight in NF4, double quantised


def bytes_per_step(config: Any, batch: int) -> float:
    """Return bytes of weights that decoding one token of each row of a batch reads, with ours' storage.

    An expert is chosen by none of ``batch`` rows with probability (1 - K / E) ** batch, if routing is even.
    """
    hidden, layers, experts = config.hidden_size, config.num_hidden_layers, config.num_local_experts
    attention = sum(rows * columns for rows, columns in attention_matrices(config))
    chosen = experts * (1 - (1 - config.num_experts_per_tok / experts) ** batch)
    quantised = attention + chosen * 3 * hidden * expert_width(config)
    return layers * (quantised * _STORED_BYTES + 2 * hidden * experts) + 2 * hidden * config.vocab_size


def model_of(name: str, config: Any, base: str | None, device: str) -> Any:
    """Return a contestant's model: of a folder, or of random weights in memory without one."""
    import torch
    import transformers

    if name == "ours":
        from lightning_mixcn.cli.allocator import keep_freed_memory
        from lightning_mixcn.model import load_moe
        from lightning_mixcn.model.inference.generation import prepare_for_generation

        keep_freed_memory()
        model = load_moe(base, device=device) if base else random_model(config, None, torch.device(device))
        prepare_for_generation(model.eval())
        return model
    return transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).to(device).eval()


def decoder(model: Any, device: str, prompt_tokens: int, new_tokens: int) -> Callable[[int], float]:
    """Return a function of the batch: seconds that the tokens after the first take."""
    import torch

    def seconds(ids: Any, count: int) -> float:
        start = time.perf_counter()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def run(batch: int) -> float:
        generator = torch.Generator().manual_seed(batch)
        ids = torch.randint(model.config.vocab_size, (batch, prompt_tokens), generator=generator).to(device)
        prompt = seconds(ids, 1)
        return seconds(ids, 1 + new_tokens) - prompt

    return run


def memory(config: Any, device: str, new_tokens: int) -> Callable[[int], float]:
    """Return the same of a memory that reads every weight once a token."""
    import torch

    source, target = (torch.empty(_COPIED, dtype=torch.uint8, device=device) for _ in range(2))

    def run(batch: int) -> float:
        start = time.perf_counter()
        for _ in range(8):
            target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()
        rate = 8 * 2 * _COPIED / (time.perf_counter() - start)
        return new_tokens * bytes_per_step(config, batch) / rate

    return run


def serve(connection: Connection, name: str, base: str | None, options: argparse.Namespace) -> None:
    """Run a contestant's process: it answers a batch size with seconds, and ``None`` with its peak memory."""
    from train_step import peak_bytes

    config, device = config_of(options.preset), options.device
    if name == "limit":
        run = memory(config, device, options.new_tokens)
    else:
        run = decoder(model_of(name, config, base, device), device, options.prompt_tokens, options.new_tokens)
    while (batch := connection.recv()) is not None:
        connection.send(run(batch))
    connection.send(peak_bytes(device))


def measure(base: str | None, options: argparse.Namespace) -> dict[str, Any]:
    """Let them take turns, batch size by batch size; print, and give what is recorded."""
    context, connections = multiprocessing.get_context("spawn"), {}
    for name in (*options.contestants, "limit"):
        connections[name], theirs = context.Pipe()
        context.Process(target=serve, args=(theirs, name, base, options), daemon=True).start()
    figures: dict[str, Any] = {"by_batch": {}}
    for batch in options.batches:
        seconds: dict[str, list[float]] = {name: [] for name in connections}
        for _ in range(1 + options.rounds):
            for name, connection in connections.items():
                connection.send(batch)
                seconds[name].append(connection.recv())
        figures["by_batch"][str(batch)] = report(batch, {name: s[1:] for name, s in seconds.items()}, options)
    peak = {}
    for name, connection in connections.items():
        connection.send(None)
        peak[name] = connection.recv()
    figures["peak_bytes"] = {name: peak[name] for name in options.contestants}
    print(", ".join(f"{name}: peak {peak[name] / 1e9:.2f} GB" for name in figures["peak_bytes"]))
    return figures


def report(batch: int, seconds: dict[str, list[float]], options: argparse.Namespace) -> dict[str, Any]:
    """Print a batch size, and return what is recorded."""
    tokens = batch * options.new_tokens
    rates = {name: record.spread([tokens / value for value in values]) for name, values in seconds.items()}
    print(f"batch {batch}, prompt {options.prompt_tokens}, {options.new_tokens} new tokens a row:")
    for name, rate in rates.items():
        print(f"  {name:6} {rate['median']:8.1f} tokens/s ({rate['min']:.1f} to {rate['max']:.1f})")
    share = record.spread([a / b for a, b in zip(seconds["limit"], seconds["ours"], strict=True)])
    figures = {"tokens_per_second": rates, "share_of_limit": share}
    print(f"  ours / limit {share['median']:.2f}, pair by pair")
    if "stock" in seconds:
        ratio = record.spread([a / b for a, b in zip(seconds["stock"], seconds["ours"], strict=True)])
        figures["ratio"] = ratio
        print(f"  ours / stock {ratio['median']:.2f}, pair by pair")
    return figures


def main() -> None:
    """Measure and write results/generate.json."""
    import torch

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--preset", choices=list(PRESETS), default="cpu-small", help="sizes of the random base")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="rows")
    parser.add_argument("--prompt_tokens", type=int, default=128)
    parser.add_argument("--new_tokens", type=int, default=64, help="timed tokens of each row, after the first")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each, after one that is not")
    parser.add_argument("--result", default="generate", help="name of the JSON under benchmarks/results")
    parser.add_argument(
        "--contestants",
        nargs="+",
        choices=["ours", "stock"],
        help="beside the limit; both, with full-8x7b ours alone",
    )
    options = parser.parse_args()
    options.device = "cuda" if torch.cuda.is_available() else "cpu"
    options.contestants = options.contestants or (["ours"] if options.preset == "full-8x7b" else ["ours", "stock"])
    if "ours" not in options.contestants:
        parser.error("--contestants needs ours: ratios are to it")
    with tempfile.TemporaryDirectory() as folder:
        written = "stock" in options.contestants
        if written:
            write_random_base(config_of(options.preset), Path(folder))
        figures = measure(folder if written else None, options)
    print("written to", record.write(options.result, {"settings": vars(options)} | figures))


if __name__ == "__main__":
    main()
