"""Tokens per second of a training step: ours, its peers and the limit, step by step in turn in one run.

    python benchmarks/train_step.py --base .cache/demo/base --text .cache/demo/text/train/zh.jsonl
    python benchmarks/train_step.py --preset cpu-small --sequence_length 1024 --result train_step_1024
    python benchmarks/train_step.py --preset full-8x7b            # one GPU of 80 GB; see WORKLOADS for the others
    python benchmarks/train_step.py --preset full-8x7b --layers 1 --hidden 256 --intermediate 512  # to try it

All train LoRA of the same base on the same rows, loss with the auxiliary term; rows are packed documents, positions
restart at each. With a preset the base and the token ids are random; where only ours and the limit take part it is made
in memory, else in a temporary folder (94 GB at full size). Each runs in a process of its own, as a user would run it:
ours with the allocator settings of `mixcn fit`. They take turns, and the one that waits sleeps. A step is timed from
the forward pass to the optimizer's end. `limits.py` has the limit, which takes turns with the others on a CPU. A GPU
has no room for both: there ours measures it in the end, when its model is freed. `contenders/step.py` has the peers and
what they leave out; a peer that is not here or breaks is named with the reason.
"""

import argparse
import gc
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import record
from contenders.step import CONTESTANTS, NOTES
from random_base import config_of, write_random_base

# 32,768 tokens a micro-batch, and a row of 131,072 tokens, are the
# two largest things that a GPU of 80 GB is meant to train.
WORKLOADS: dict[str, dict[str, Any]] = {
    "cpu-small": {"preset": "cpu-small", "sequence_length": 1024, "rank": 64, "contestants": list(CONTESTANTS)},
    # Rank 64 on every expert would be 0.60 B parameters of OLMoE-1B-7B, and 3.32 B of Qwen3-30B-A3B.
    "cpu-olmoe": {
        "preset": "cpu-olmoe",
        "sequence_length": 1024,
        "rank": 16,
        "contestants": ["ours", "stock", "experts4bit"],
    },
    "cpu-qwen3": {
        "preset": "cpu-qwen3",
        "sequence_length": 1024,
        "rank": 8,
        "contestants": ["ours", "stock", "experts4bit"],
    },
    "layer-8x7b": {
        "preset": "layer-8x7b",
        "sequence_length": 4096,
        "micro_batch_size": 2,
        "rank": 64,
        "contestants": list(CONTESTANTS),
    },
    "full-8x7b": {
        "preset": "full-8x7b",
        "sequence_length": 4096,
        "micro_batch_size": 2,
        "rank": 64,
        "activation_checkpointing": "full",
    },
    "full-8x7b-selective": {
        "preset": "full-8x7b",
        "sequence_length": 4096,
        "rank": 64,
        "activation_checkpointing": "selective",
    },
    "full-8x7b-32k": {
        "preset": "full-8x7b",
        "sequence_length": 4096,
        "micro_batch_size": 8,
        "rank": 64,
        "activation_checkpointing": "full",
        "optimizer": "adamw8bit",
    },
    "full-8x7b-128k": {
        "preset": "full-8x7b",
        "sequence_length": 131072,
        "rank": 64,
        "activation_checkpointing": "offload",
        "optimizer": "adamw8bit",
        "warmup": 1,
        "rounds": 5,
    },
}
DEFAULTS: dict[str, Any] = {
    "sequence_length": 512,
    "micro_batch_size": 1,
    "rank": 16,
    "dropout": 0.0,
    "warmup": 4,
    "rounds": 12,
    "activation_checkpointing": "none",
    "optimizer": "adamw",
    "result": "train_step",
    "contestants": ["ours"],
}


def parse(description: str | None) -> argparse.Namespace:
    """Return options, with those of the preset and then the defaults where they are not given."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--preset", choices=list(WORKLOADS), help="a random base instead of --base and --text")
    parser.add_argument("--base", help="a folder of a supported family in bf16")
    parser.add_argument("--text", help="JSON lines with a field text; enough for all steps")
    parser.add_argument("--sequence_length", type=int, help="tokens a row")
    parser.add_argument("--micro_batch_size", type=int, help="rows")
    parser.add_argument("--rank", type=int, help="of LoRA on attention, router and experts")
    parser.add_argument("--dropout", type=float, help="probability of LoRA's dropout; shipped 8x7B configs have 0.05")
    parser.add_argument("--activation_checkpointing", choices=["none", "selective", "full", "offload"])
    parser.add_argument("--optimizer", choices=["adamw", "adamw8bit"])
    parser.add_argument("--contestants", nargs="+", choices=list(CONTESTANTS), help="beside the limit")
    parser.add_argument(
        "--packages",
        nargs="+",
        default=[],
        metavar="NAME=FOLDER",
        help="where a contestant's own packages lie (pip install --target FOLDER), those it does not share with others",
    )
    parser.add_argument("--warmup", type=int, help="untimed steps of each")
    parser.add_argument("--rounds", type=int, help="timed steps of each, at least 5")
    parser.add_argument("--result", help="name of the JSON under benchmarks/results")
    for name in ("layers", "hidden", "intermediate"):
        parser.add_argument(f"--{name}", type=int, help=f"instead of the preset's; a small {name} to try the script")
    options = parser.parse_args()
    if (options.preset is None) == (options.base is None or options.text is None):
        parser.error("give --preset, or --base and --text")
    for key, value in (DEFAULTS | WORKLOADS.get(options.preset, {"contestants": ["ours", "stock"]})).items():
        if key != "preset" and getattr(options, key) is None:
            setattr(options, key, value)
    if "ours" not in options.contestants:
        parser.error("--contestants needs ours: ratios are to it")
    options.packages = dict(entry.split("=", 1) for entry in options.packages)
    return options


def packed_rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Make micro-batches of whole documents one after the other, cut where a row ends."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(options.base)
    size, ids, positions = options.micro_batch_size * options.sequence_length, [], []
    shape = (options.micro_batch_size, options.sequence_length)
    with open(options.text, encoding="utf-8") as lines:
        for line in lines:
            document = [*tokenizer.encode(json.loads(line)["text"], add_special_tokens=False), tokenizer.eos_token_id]
            ids, positions = ids + document, positions + list(range(len(document)))
            while len(ids) >= size:
                batch_ids, batch_positions = (torch.tensor(values[:size]).view(shape) for values in (ids, positions))
                yield {"input_ids": batch_ids, "labels": batch_ids, "position_ids": batch_positions}
                ids, positions = ids[size:], positions[size:]


def random_rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Make micro-batches of random token ids, a document a row."""
    import torch

    generator, shape = torch.Generator().manual_seed(0), (options.micro_batch_size, options.sequence_length)
    while True:
        ids = torch.randint(options.config.vocab_size, shape, generator=generator)
        yield {"input_ids": ids, "labels": ids, "position_ids": torch.arange(ids.shape[1]).expand_as(ids)}


def contestant(name: str, options: argparse.Namespace) -> tuple[Callable[[], float], int]:
    """Return a function that makes one step of a contestant and returns its seconds, and the trained parameters."""
    if name == "limit":
        return step_limit(options), 0
    if name in options.packages:
        sys.path.insert(0, options.packages[name])
    model = CONTESTANTS[name](options)
    batches = random_rows(options) if options.preset else packed_rows(options)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return stepper(model, batches, options), trained


def step_limit(options: argparse.Namespace) -> Callable[[], float]:
    """Return a function that measures the seconds of a step's limit."""
    from limits import limit

    tokens = options.micro_batch_size * options.sequence_length
    return limit(options.config, tokens, options.rank, options.activation_checkpointing, options.device)


def stepper(model: Any, batches: Iterator[dict[str, Any]], options: argparse.Namespace) -> Callable[[], float]:
    """Do an optimizer step on the next batch; return its seconds."""
    import torch

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if options.optimizer == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        optimizer: Any = AdamW8bit(trained, lr=1e-4)
    else:
        optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def step() -> float:
        batch = {name: values.to(options.device) for name, values in next(batches).items()}
        _synchronize(options.device)
        start = time.perf_counter()
        model(**batch, output_router_logits=True, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        _synchronize(options.device)
        return time.perf_counter() - start

    return step


def _synchronize(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def peak_bytes(device: str) -> int:
    """Return the peak memory of this process: on a GPU, what torch allocated there."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    from lightning_mixcn.commands.process import peak_resident_bytes

    return peak_resident_bytes()


def serve(connection: Connection, name: str, options: argparse.Namespace) -> None:
    """Run a contestant's process: a step for every ``True``, answered with seconds; ``None`` asks for peak memory.

    Before that it says how many parameters it trains. A number in the end asks for as many measurements of the limit,
    without the model. A text instead of an answer says why it cannot take part.
    """
    try:
        step, trained = contestant(name, options)
        connection.send(trained)
        while connection.recv() is not None:
            connection.send(step())
        connection.send(peak_bytes(options.device))
        del step
        if rounds := connection.recv():
            free_memory(options.device)
            run = step_limit(options)
            connection.send([run() for _ in range(1 + rounds)][1:])
    except Exception as error:  # whatever breaks in a peer is its result
        connection.send(f"{type(error).__name__}: {error}".split("\n")[0])
        if name in ("ours", "limit"):
            raise


def free_memory(device: str) -> None:
    """Give a GPU back what nothing refers to any more."""
    gc.collect()
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()


def measure(options: argparse.Namespace) -> None:
    """Let the contestants take turns, and report."""
    context, connections, processes = multiprocessing.get_context("spawn"), {}, {}
    absent: dict[str, str] = {}
    trained: dict[str, int] = {}
    for name in (*options.contestants, *(["limit"] if options.device == "cpu" else [])):
        connections[name], theirs = context.Pipe()
        processes[name] = context.Process(target=serve, args=(theirs, name, options), daemon=True)
        processes[name].start()
        # One after the other: models are larger while they are loaded.
        answer = connections[name].recv()
        if isinstance(answer, str):
            absent[name] = answer
        else:
            trained[name] = answer
    seconds: dict[str, list[float]] = {name: [] for name in connections if name not in absent}
    for _ in range(options.warmup + options.rounds):
        for name in [name for name in seconds if name not in absent]:
            connections[name].send(True)
            answer = connections[name].recv()
            if isinstance(answer, str):
                absent[name] = answer
            else:
                seconds[name].append(answer)
    memory = {}
    for name in [name for name in seconds if name not in absent]:
        connections[name].send(None)
        memory[name] = connections[name].recv()
    timed = {name: seconds[name][options.warmup :] for name in memory}
    for name in sorted(memory, key="ours".__eq__):  # ours is the last: nobody else has memory then
        alone = name == "ours" and "limit" not in connections
        connections[name].send(options.rounds if alone else 0)
        if alone:
            timed["limit"] = connections[name].recv()
        processes[name].join()
    if not {"ours", "limit"} <= set(timed) or isinstance(timed["limit"], str):
        raise SystemExit(f"no result: {timed.get('limit', absent)}")
    report(options, timed, memory, trained, absent)


def report(
    options: argparse.Namespace,
    seconds: dict[str, list[float]],
    memory: dict[str, int],
    trained: dict[str, int],
    absent: dict[str, str],
) -> None:
    """Print and record."""
    tokens = options.sequence_length * options.micro_batch_size
    rates = {name: record.spread([tokens / value for value in values]) for name, values in seconds.items()}
    ratios = {
        name: record.spread([theirs / ours for theirs, ours in zip(values, seconds["ours"], strict=True)])
        for name, values in seconds.items()
        if name not in ("ours", "limit")
    }
    share = record.spread([a / b for a, b in zip(seconds["limit"], seconds["ours"], strict=True)])
    for name, rate in rates.items():
        peak = "  (its products and traffic alone)"
        if name != "limit":
            peak = f"  peak {memory[name] / 1e9:.2f} GB, trains {trained[name] / 1e6:.2f} M parameters"
        print(f"{name:12} {rate['median']:9.1f} tokens/s ({rate['min']:.1f} to {rate['max']:.1f}){peak}")
    for name, ratio in ratios.items():
        print(f"ours / {name}, pair by pair: {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})")
    print(f"ours / limit, pair by pair: {share['median']:.2f} ({share['min']:.2f} to {share['max']:.2f})")
    for name, reason in absent.items():
        print(f"{name} did not take part: {reason}")
    for name in [name for name in ratios if name in NOTES]:
        print(f"{name}: {NOTES[name]}")
    # No path of a machine in a result.
    named = {"base": options.preset or Path(options.base).name, "text": options.preset or Path(options.text).name}
    settings = {key: value for key, value in vars(options).items() if key not in ("config", "packages")} | named
    figures = {"settings": settings, "tokens_per_second": rates, "share_of_limit": share}
    figures |= {"ratio_to": ratios, "absent": absent, "notes": {name: NOTES[name] for name in ratios}}
    figures["trained_parameters"] = {name: trained[name] for name in memory if name != "limit"}
    figures["peak_bytes"] = {name: memory[name] for name in memory if name != "limit"}
    print("written to", record.write(options.result, figures))


def main() -> None:
    """Measure and write results/train_step.json."""
    import torch
    import transformers

    options = parse(__doc__)
    options.device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        if options.preset:
            sizes = {"num_hidden_layers": options.layers, "hidden_size": options.hidden, "width": options.intermediate}
            options.config = config_of(WORKLOADS[options.preset]["preset"], **sizes)
            if options.contestants != ["ours"]:
                write_random_base(options.config, Path(folder))
                options.base = folder
        else:
            options.config = transformers.AutoConfig.from_pretrained(options.base)
        measure(options)


if __name__ == "__main__":
    main()
