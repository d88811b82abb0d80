"""Tokens per second of a training step: ours beside stock transformers + PEFT on bf16 experts, interleaved in one run.

    python benchmarks/train_step.py --base .cache/demo/base --sequence_length 512 --micro_batch_size 1

Both train the same LoRA (rank 16 on attention, router and every expert) of the same base on the same random tokens,
loss with the auxiliary term, AdamW. Each step is timed from the forward pass to the optimizer's end.
"""

import argparse
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import psutil
import record
import torch
import transformers

from lightning_mixcn.allocator import keep_freed_memory
from lightning_mixcn.model import load_mixtral, set_activation_checkpointing

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate", "w1", "w2", "w3"]


def lora(rank: int) -> peft.LoraConfig:
    """The same adapter for both."""
    return peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(TARGETS), task_type="CAUSAL_LM")


def ours(base: str, rank: int) -> Any:
    """4-bit experts, split LoRA."""
    model = load_mixtral(base, lora=lora(rank))
    set_activation_checkpointing(model, "none")
    return model.train()


def stock(base: str, rank: int) -> Any:
    """Experts of transformers in bf16; PEFT adapts them as parameters and materialises W + BA."""
    model = transformers.MixtralForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    return peft.get_peft_model(model, lora(rank)).train()


def stepper(model: Any, rows: int, length: int) -> Callable[[], float]:
    """One optimizer step on fresh random tokens; returns its seconds."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, generator = torch.optim.AdamW(trained, lr=1e-4), torch.Generator().manual_seed(0)
    vocabulary = model.get_base_model().config.vocab_size
    positions = torch.arange(length).remainder(length // 2)[None].expand(rows, -1)

    def step() -> float:
        ids = torch.randint(3, vocabulary, (rows, length), generator=generator)
        start = time.perf_counter()
        out = model(input_ids=ids, labels=ids, position_ids=positions, output_router_logits=True, use_cache=False)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start

    return step


def main() -> None:
    """Measure and write results/train_step.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="a Mixtral folder in bf16")
    parser.add_argument("--sequence_length", type=int, default=512, help="tokens a row")
    parser.add_argument("--micro_batch_size", type=int, default=1, help="rows")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each, after 2 untimed ones")
    parser.add_argument("--result", default="train_step", help="name of the JSON under benchmarks/results")
    options = parser.parse_args()
    keep_freed_memory()
    tokens = options.sequence_length * options.micro_batch_size
    steps, memory, process = {}, {}, psutil.Process()
    for name, make in (("ours", ours), ("stock", stock)):
        gc.collect()
        before = process.memory_info().rss
        steps[name] = stepper(make(options.base, options.rank), options.micro_batch_size, options.sequence_length)
        for _ in range(2):
            steps[name]()
        memory[name] = process.memory_info().rss - before
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.rounds):
        for name, step in steps.items():
            seconds[name].append(step())
    rates = {name: record.spread([tokens / value for value in values]) for name, values in seconds.items()}
    ratio = record.spread([a / b for a, b in zip(seconds["stock"], seconds["ours"], strict=True)])
    for name, rate in rates.items():
        measured = f"{rate['median']:8.1f} tokens/s ({rate['min']:.1f} to {rate['max']:.1f})"
        print(f"{name:6} {measured}  +{memory[name] / 1e9:.2f} GB")
    print(f"ours / stock, pair by pair: {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})")
    settings = vars(options) | {"base": Path(options.base).name}  # no path of a machine in a result
    figures = {"settings": settings, "tokens_per_second": rates, "ratio": ratio, "resident_bytes_added": memory}
    print("written to", record.write(options.result, figures))


if __name__ == "__main__":
    main()
