"""What ExpertLoadMonitor, ThroughputLogger and TrainabilityCheck cost at their defaults, beside a run without them.

    python benchmarks/callbacks.py --base .cache/demo/base --text .cache/demo/text/train/zh.jsonl

Both are whole `Trainer.fit`s with a TensorBoard logger, on the same rows, each in a process of its own, as `mixcn fit`
would run them. They take turns, step by step, and the one that waits sleeps; who begins alternates. A step is timed
from the start of one batch to the start of the next, so loading and logging are in it. Steps are compared in blocks of
ten, which is how often the callbacks log. The first steps, in which TrainabilityCheck does its work, are told apart: a
run has them once.
"""

import argparse
import multiprocessing
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import record
from lightning.pytorch import Callback

BLOCK = 10
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate", "w1", "w2", "w3"]
WATCHING = ("without", "with")


class Turns(Callback):
    """Waits before each batch until it is told to go on, and tells how long the step before took; the first one, 0."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.started = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        self.connection.send(time.perf_counter() - self.started if self.started else 0.0)
        self.connection.recv()
        self.started = time.perf_counter()


def serve(connection: Connection, name: str, options: argparse.Namespace) -> None:
    """Run a contestant's process."""
    from lightning.pytorch import Trainer
    from lightning.pytorch.loggers import TensorBoardLogger
    from peft import LoraConfig

    from lightning_mixcn import PretrainDataModule, PretrainModule
    from lightning_mixcn.callbacks import (
        DataMonitor,
        ExpertLoadMonitor,
        ThroughputLogger,
        TrainabilityCheck,
    )
    from lightning_mixcn.cli.allocator import keep_freed_memory
    from lightning_mixcn.text import Source

    keep_freed_memory()
    lora = LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules=list(TARGETS))
    data = PretrainDataModule(
        sources=[Source(name="zh", path=options.text)],
        tokenizer=options.base,
        sequence_length=options.sequence_length,
        micro_batch_size=options.micro_batch_size,
        num_streams=4,
        num_workers=0,
        val_fraction=0.0,
    )
    watchers = [ExpertLoadMonitor(), ThroughputLogger(), TrainabilityCheck()] if name == "with" else []
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator=options.accelerator, devices=1, max_steps=options.warmup + options.rounds + 1,
            default_root_dir=folder, logger=TensorBoardLogger(folder), log_every_n_steps=1, limit_val_batches=0,
            callbacks=[Turns(connection), DataMonitor(), *watchers], enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        )  # fmt: skip
        trainer.fit(PretrainModule(options.base, lora=lora), data)


def main() -> None:
    """Measure and write results/callbacks.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--base", required=True, help="a Mixtral folder in bf16")
    parser.add_argument("--text", required=True, help="JSON lines with a field text")
    parser.add_argument("--sequence_length", type=int, default=512, help="tokens a row")
    parser.add_argument("--micro_batch_size", type=int, default=1, help="rows")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--warmup", type=int, default=BLOCK, help="steps of each told apart, a multiple of 10")
    parser.add_argument("--rounds", type=int, default=10 * BLOCK, help="compared steps of each, a multiple of 10")
    parser.add_argument("--accelerator", default="auto", help="Lightning's: auto, cpu, gpu")
    parser.add_argument("--result", default="callbacks", help="name of the JSON under benchmarks/results")
    options = parser.parse_args()
    if options.warmup % BLOCK or options.rounds % BLOCK or options.rounds < BLOCK:
        parser.error(f"--warmup and --rounds are multiples of {BLOCK}")
    context, connections, processes = multiprocessing.get_context("spawn"), {}, []
    for name in WATCHING:
        connections[name], theirs = context.Pipe()
        processes.append(context.Process(target=serve, args=(theirs, name, options), daemon=True))
        processes[-1].start()
    for name in WATCHING:
        connections[name].recv()  # ready for the first step
    seconds: dict[str, list[float]] = {name: [] for name in WATCHING}
    for number in range(options.warmup + options.rounds):
        for name in WATCHING if number % 2 else reversed(WATCHING):
            connections[name].send(True)
            seconds[name].append(connections[name].recv())
    for connection, process in zip(connections.values(), processes, strict=True):
        connection.send(True)  # the last step, after which a run ends as it should
        process.join()
    report(options, seconds)


def report(options: argparse.Namespace, seconds: dict[str, list[float]]) -> None:
    """Print and record."""

    def blocks(name: str) -> list[float]:
        steps = seconds[name][options.warmup :]
        return [sum(steps[start : start + BLOCK]) / BLOCK for start in range(0, len(steps), BLOCK)]

    mean = {name: record.spread(blocks(name)) for name in WATCHING}
    overhead = record.spread([a / b - 1 for a, b in zip(blocks("with"), blocks("without"), strict=True)])
    total = sum(blocks("with")) / sum(blocks("without")) - 1
    start = {name: sum(values[: options.warmup]) for name, values in seconds.items()}
    for name, step in mean.items():
        print(f"{name:8} {step['median']:.4f} s a step ({step['min']:.4f} to {step['max']:.4f})")
    blockwise = f"block by block {overhead['median']:+.2%} ({overhead['min']:+.2%} to {overhead['max']:+.2%})"
    print(f"overhead {total:+.2%}; {blockwise}")
    print(f"first {options.warmup} steps: {start['with']:.2f} s with, {start['without']:.2f} s without")
    # No path of a machine in a result.
    settings = vars(options) | {"base": Path(options.base).name, "text": Path(options.text).name}
    figures = {"settings": settings, "seconds_per_step": mean, "overhead": overhead, "overhead_of_all_steps": total}
    print("written to", record.write(options.result, figures | {"seconds_of_first_steps": start}))


if __name__ == "__main__":
    main()
