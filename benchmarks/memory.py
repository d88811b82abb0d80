"""Bytes by purpose, planned beside measured, for every mode of activation checkpointing.

    python benchmarks/memory.py
    python benchmarks/memory.py --preset full-8x7b --sequence_length 4096 --modes full offload

Random weights of the preset's sizes, LoRA on everything, AdamW; the second of two steps is measured, since the first
has no moments. On the CPU living tensors are counted, operation by operation; on CUDA it is what torch's allocator gave
out. `activations` are what forward leaves for backward; `peak` is the most at once.
"""

import argparse
from typing import Any

import record
import torch
from peft import LoraConfig
from random_base import PRESETS, config_of, random_model
from torch import Tensor

from lightning_mixcn.cli.allocator import keep_freed_memory
from lightning_mixcn.model import set_activation_checkpointing
from lightning_mixcn.model.memory.layer import MicroBatch
from lightning_mixcn.model.memory.optimizer import MemoryTracker, optimizer_memory
from lightning_mixcn.model.memory.plan import MemoryPlan, Run, Sharing, plan_memory

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate", "w1", "w2", "w3"]
PURPOSES = ("parameters", "gradients", "optimizer states", "activations", "peak")


class Meter:
    """Bytes in use and the most of them since `reset`, beside ``parameters``, on a CPU or a GPU."""

    def __init__(self, device: torch.device, parameters: int) -> None:
        self.parameters, self.live = parameters, MemoryTracker() if device.type == "cpu" else None
        if self.live is not None:
            self.live.__enter__()

    def now(self) -> int:
        """Return the bytes in use."""
        return self.parameters + self.live.now if self.live is not None else torch.cuda.memory_allocated()

    def peak(self) -> int:
        """Return the most since the last reset."""
        return self.parameters + self.live.peak if self.live is not None else torch.cuda.max_memory_allocated()

    def reset(self) -> None:
        """Begin anew."""
        if self.live is not None:
            self.live.peak = self.live.now
        else:
            torch.cuda.reset_peak_memory_stats()

    def close(self) -> None:
        """Stop counting."""
        if self.live is not None:
            self.live.__exit__(None, None, None)


def measure(model: Any, batch: MicroBatch, device: torch.device) -> dict[str, int]:
    """Return bytes by purpose of the second step."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ids = torch.randint(3, model.config.vocab_size, (batch.rows, batch.length), device=device)
    inputs = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(batch.length, device=device).expand_as(ids)}
    optimizer, found = torch.optim.AdamW(trained, lr=1e-4), {}
    meter = Meter(device, sum(parameter.nbytes for parameter in model.parameters()))
    for _ in range(2):
        meter.reset()
        before = meter.now()
        loss: Tensor = model(**inputs, output_router_logits=True, use_cache=False).loss
        found["activations"] = meter.now() - before
        optimizer.zero_grad()
        loss.backward()
        del loss
        optimizer.step()
        found["peak"] = meter.peak()
    meter.close()
    states = [value for state in optimizer.state.values() for value in state.values()]
    found["parameters"] = meter.parameters
    found["gradients"] = sum(parameter.grad.nbytes for parameter in trained)
    found["optimizer states"] = sum(value.nbytes for value in states)
    return found


def planned(model: Any, mode: str, batch: MicroBatch, device: torch.device) -> MemoryPlan:
    """Return the same on paper."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    states = optimizer_memory(torch.optim.AdamW, trained, device.type)
    modes = [mode] * model.config.num_hidden_layers
    return plan_memory(model, Run(batch, modes, device.type, False, states, Sharing()))


def by_purpose(plan: MemoryPlan) -> dict[str, int]:
    """Return a plan under the names of what is measured."""
    return {
        "parameters": plan.quantised + plan.dense + plan.trained,
        "gradients": plan.gradients,
        "optimizer states": plan.optimizer_states,
        "activations": plan.activations,
        "peak": plan.peak,
    }


def main() -> None:
    """Measure and write results/memory.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cpu-small")
    parser.add_argument("--sequence_length", type=int, default=512, help="tokens a row")
    parser.add_argument("--micro_batch_size", type=int, default=1, help="rows")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--modes", nargs="+", default=["none", "selective", "full"])
    parser.add_argument("--result", default="memory", help="name of the JSON under benchmarks/results")
    options = parser.parse_args()
    keep_freed_memory()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch, rows = MicroBatch(options.micro_batch_size, options.sequence_length), []
    lora = LoraConfig(r=options.rank, target_modules=TARGETS)
    model: Any = random_model(config_of(options.preset), lora, device).train()
    for mode in options.modes:
        set_activation_checkpointing(model, mode)
        plan, found = by_purpose(planned(model, mode, batch, device)), measure(model, batch, device)
        model.zero_grad()
        for purpose in PURPOSES:
            error = plan[purpose] / max(1, found[purpose]) - 1
            rows.append({"mode": mode, "purpose": purpose, "planned": plan[purpose], "measured": found[purpose]})
            sizes = f"{plan[purpose] / 1e6:12.2f} MB planned {found[purpose] / 1e6:12.2f} MB measured"
            print(f"{mode:10} {purpose:18} {sizes} {error:+8.1%}")
    print("written to", record.write(options.result, {"settings": vars(options), "bytes": rows}))


if __name__ == "__main__":
    main()
