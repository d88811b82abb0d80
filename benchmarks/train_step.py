"""Tokens per second of a training step: ours beside stock transformers + PEFT on bf16 experts, interleaved in one run.

    python benchmarks/train_step.py --base .cache/demo/base --text .cache/demo/text/train/zh.jsonl
    python benchmarks/train_step.py --preset cpu-small --sequence_length 1024 --rank 64 --result train_step_1024

Both train the same LoRA (on attention, router and every expert) of the same base on the same rows, loss with the
auxiliary term, fused AdamW; rows are packed documents, positions restart at each. The limit beside them is the step's
large products alone, as plain GEMMs (`products.py`). With a preset the base and the token ids are random. Each runs in
a process of its own, as a user would run it: ours with the allocator settings of `mixcn fit`, stock with none. They
take turns, step by step, and the one that waits sleeps. A step is timed from the forward pass to the optimizer's end.
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import record

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate", "w1", "w2", "w3"]


def lora(rank: int) -> Any:
    """The same adapter for both."""
    import peft

    return peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(TARGETS), task_type="CAUSAL_LM")


def ours(base: str, rank: int) -> Any:
    """4-bit experts, split LoRA."""
    from lightning_mixcn.allocator import keep_freed_memory
    from lightning_mixcn.model import load_mixtral, set_activation_checkpointing

    keep_freed_memory()
    model = load_mixtral(base, lora=lora(rank))
    set_activation_checkpointing(model, "none")
    return model.train()


def stock(base: str, rank: int) -> Any:
    """Experts of transformers in bf16; PEFT adapts them as parameters and materialises W + BA."""
    import peft
    import torch
    import transformers

    model = transformers.MixtralForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    return peft.get_peft_model(model, lora(rank)).train()


CONTESTANTS = {"ours": ours, "stock": stock}
ALL = (*CONTESTANTS, "limit")


def packed_rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Micro-batches of whole documents one after the other, cut where a row ends."""
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
    """Micro-batches of random token ids, a document a row."""
    import torch
    from random_base import config_of

    generator, vocabulary = torch.Generator().manual_seed(0), config_of(options.preset).vocab_size
    while True:
        ids = torch.randint(vocabulary, (options.micro_batch_size, options.sequence_length), generator=generator)
        yield {"input_ids": ids, "labels": ids, "position_ids": torch.arange(ids.shape[1]).expand_as(ids)}


def contestant(name: str, options: argparse.Namespace) -> Callable[[], float]:
    """What makes one step of a contestant and gives its seconds."""
    if name == "limit":
        import transformers
        from products import step_products, timed

        config = transformers.AutoConfig.from_pretrained(options.base)
        return timed(step_products(config, options.micro_batch_size * options.sequence_length, options.rank))
    batches = random_rows(options) if options.preset else packed_rows(options)
    return stepper(CONTESTANTS[name](options.base, options.rank), batches)


def stepper(model: Any, batches: Iterator[dict[str, Any]]) -> Callable[[], float]:
    """One optimizer step on the next batch; returns its seconds."""
    import torch

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def step() -> float:
        batch = next(batches)
        start = time.perf_counter()
        model(**batch, output_router_logits=True, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start

    return step


def serve(connection: Connection, name: str, options: argparse.Namespace) -> None:
    """A contestant's process: a step for every message, answered with its seconds; ``None`` asks for peak memory."""
    from lightning_mixcn.peak_memory import peak_resident_bytes

    step = contestant(name, options)
    while connection.recv() is not None:
        connection.send(step())
    connection.send(peak_resident_bytes())


def main() -> None:
    """Measure and write results/train_step.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=["cpu-small", "layer-8x7b"], help="a random base instead of --base, --text")
    parser.add_argument("--base", help="a Mixtral folder in bf16")
    parser.add_argument("--text", help="JSON lines with a field text; enough for all steps")
    parser.add_argument("--sequence_length", type=int, default=512, help="tokens a row")
    parser.add_argument("--micro_batch_size", type=int, default=1, help="rows")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--warmup", type=int, default=4, help="untimed steps of each")
    parser.add_argument("--rounds", type=int, default=12, help="timed steps of each")
    parser.add_argument("--result", default="train_step", help="name of the JSON under benchmarks/results")
    options = parser.parse_args()
    if (options.preset is None) == (options.base is None or options.text is None):
        parser.error("give --preset, or --base and --text")
    with tempfile.TemporaryDirectory() as folder:
        if options.preset:
            from random_base import write_random_base

            write_random_base(options.preset, Path(folder))
            options.base, options.text = folder, ""
        measure(options)


def measure(options: argparse.Namespace) -> None:
    """Let the contestants take turns, and report."""
    context, connections = multiprocessing.get_context("spawn"), {}
    for name in ALL:
        connections[name], theirs = context.Pipe()
        context.Process(target=serve, args=(theirs, name, options), daemon=True).start()

    def answer(name: str, message: bool | None) -> Any:
        connections[name].send(message)
        return connections[name].recv()

    seconds: dict[str, list[float]] = {name: [] for name in ALL}
    for _ in range(options.warmup + options.rounds):
        for name in ALL:
            seconds[name].append(answer(name, True))
    memory = {name: answer(name, None) for name in ALL}
    report(options, {name: values[options.warmup :] for name, values in seconds.items()}, memory)


def report(options: argparse.Namespace, seconds: dict[str, list[float]], memory: dict[str, int]) -> None:
    """Print and record."""
    tokens = options.sequence_length * options.micro_batch_size
    rates = {name: record.spread([tokens / value for value in values]) for name, values in seconds.items()}
    ratio = record.spread([a / b for a, b in zip(seconds["stock"], seconds["ours"], strict=True)])
    share = record.spread([a / b for a, b in zip(seconds["limit"], seconds["ours"], strict=True)])
    for name, rate in rates.items():
        peak = f"  peak {memory[name] / 1e9:.2f} GB" if name in CONTESTANTS else "  (its large products alone)"
        print(f"{name:6} {rate['median']:8.1f} tokens/s ({rate['min']:.1f} to {rate['max']:.1f}){peak}")
    print(f"ours / stock, pair by pair: {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})")
    print(f"ours / limit, pair by pair: {share['median']:.2f} ({share['min']:.2f} to {share['max']:.2f})")
    # No path of a machine in a result.
    named = {"base": options.preset or Path(options.base).name, "text": options.preset or Path(options.text).name}
    settings = vars(options) | named
    figures = {"settings": settings, "tokens_per_second": rates, "ratio": ratio, "share_of_limit": share}
    figures["peak_resident_bytes"] = {name: memory[name] for name in CONTESTANTS}
    print("written to", record.write(options.result, figures))


if __name__ == "__main__":
    main()
