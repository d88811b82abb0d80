"""FSDP2 and HSDP of the 4-bit model: bytes held and bytes on the wire, measured beside the plan, and a table on paper.

    python benchmarks/scale.py

The measured part runs 2 and 4 gloo ranks on the CPU, with a model of 21 million weights, one step of two micro-batches,
and counts the bytes of every collective that FSDP2 starts. A ring moves (N-1)/N of a gathered or scattered tensor
through each rank, and twice that of one that is all-reduced; N is the ranks of the group.

The table is arithmetic for Mixtral-8x7B, LoRA r 64 on everything, from the sizes of the model on the meta device:

* memory = base/N + 16 bytes a trained weight/N (float32 master, gradient, two moments) + three gathered layers + an
  unsharded gradient of the adapters while micro-batches accumulate + activations (boundaries of `full` checkpointing)
* gathered = (N-1)/N x base x 2 a micro-batch (forward and backward); reduced = (N-1)/N x 4 bytes x trained a step
* time of a micro-batch = FLOPs / (half the peak), beside the time of its traffic at the link's rate.
"""

import argparse
import json
import tempfile
from collections import Counter
from functools import partial
from typing import Any

import record
import torch
from peft import LoraConfig
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MixtralConfig

from lightning_mixcn import build_mixtral, load_mixtral
from lightning_mixcn.model import (
    bytes_in_memory,
    local_bytes,
    set_gradient_sync,
    shard_model,
)
from lightning_mixcn.model.memory.plan import Sharing
from lightning_mixcn.testing import random_batch, run_distributed, save_tiny_mixtral

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate", "w1", "w2", "w3"]
MICRO_BATCHES = 2
# Of the rows: tokens of a micro-batch, FLOPs a token with `full` checkpointing at a length of 4,096.
TOKENS, FLOPS_PER_TOKEN = 8192, 81.9e9
# Name, ranks of a group, groups, peak FLOP/s (dense bf16), bytes/s a rank inside the group, and across, memory in GB.
MACHINES = (
    ("8 x H100 80 GB, NVLink", 8, 1, 989.4e12, 450e9, None, 80),
    ("8 x A100 40 GB, NVLink", 8, 1, 312e12, 300e9, None, 40),
    # A GeForce has no peer-to-peer over PCIe: NCCL goes through the host's memory, at half of the link's rate or less.
    ("4 x RTX 4090 24 GB, PCIe 4", 4, 1, 165.2e12, 11e9, None, 24),
    ("2 nodes x 8 x H100, 400 Gbit/s a GPU, FSDP2", 16, 1, 989.4e12, 50e9, None, 80),
    ("2 nodes x 8 x H100, 400 Gbit/s a GPU, HSDP", 8, 2, 989.4e12, 450e9, 50e9, 80),
)


class Traffic(TorchDispatchMode):
    """Counts the bytes that one rank's collectives move, as a ring would."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name.startswith("c10d."):
            whole, ranks, kind = self._measure(name, args)
            if kind:
                self.bytes[kind] += round(whole * (ranks - 1) / ranks * (2 if kind == "all_reduce" else 1))
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _measure(name: str, args: Any) -> tuple[int, int, str]:
        """Return bytes of the whole tensor, ranks, and kind of a collective."""
        if "_allgather_base_" in name:
            return args[0].nbytes, args[0].numel() // max(1, args[1].numel()), "all_gather"
        if "_reduce_scatter_base_" in name:
            return args[1].nbytes, args[1].numel() // max(1, args[0].numel()), "reduce_scatter"
        if "allreduce_" in name:
            ranks = torch.distributed.distributed_c10d.ProcessGroup.unbox(args[1]).size()
            return sum(tensor.nbytes for tensor in args[0]), ranks, "all_reduce"
        return 0, 1, ""


def measure(base: str, shape: tuple[int, ...], reshard: bool) -> dict[str, Any]:
    """Measure on each rank the bytes held, and the bytes moved by the second of two steps."""
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    lora, shard = (
        LoraConfig(r=8, target_modules=TARGETS),
        partial(shard_model, mesh=mesh, reshard_after_forward=reshard),
    )
    model: Any = load_mixtral(base, lora=lora, shard=shard).train()
    batch = random_batch([24])
    inputs = {name: batch[name] for name in ("input_ids", "labels", "position_ids", "document_ids")}
    traffic = Traffic()
    for _ in range(2):
        traffic = Traffic()
        with traffic:
            for micro_batch in range(MICRO_BATCHES):
                set_gradient_sync(model, micro_batch == MICRO_BATCHES - 1)
                model(**inputs, output_router_logits=True).loss.backward()
    held = bytes_in_memory(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"held": local_bytes(model), "whole": sum(held.values()), "trained": trained, "moved": dict(traffic.bytes)}


def measured_part() -> list[dict[str, Any]]:
    """Measure every mesh in turn."""
    sizes = {"hidden_size": 1024, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 8}
    found = []
    with tempfile.TemporaryDirectory() as folder:
        base = str(save_tiny_mixtral(folder, head_dim=128, **sizes))
        for shape, reshard in (((2,), True), ((2,), False), ((4,), True), ((2, 2), True)):
            ranks = run_distributed(measure, torch.Size(shape).numel(), base, shape, reshard)
            first, sharing = ranks[0], Sharing("fsdp2", shape[-1], shape[0] if len(shape) == 2 else 1, reshard)
            found.append(
                {
                    "mesh": shape,
                    "reshard_after_forward": reshard,
                    "bytes_held": [rank["held"] for rank in ranks],
                    "bytes_held_planned": sharing.base(first["whole"]),
                    "bytes_moved_a_step": first["moved"],
                    "bytes_moved_a_step_planned": sharing.moved(first["whole"], 4 * first["trained"], MICRO_BATCHES),
                }
            )
            print(json.dumps(found[-1]))
    return found


def table() -> list[dict[str, Any]]:
    """Compute Mixtral-8x7B on paper, GB = 1e9 bytes."""
    lora = LoraConfig(r=64, target_modules=TARGETS)
    model: Any = build_mixtral(MixtralConfig(), lora=lora, device="meta")
    sizes = bytes_in_memory(model)
    base, trained = sizes["quantised"] + sizes["dense"], sizes["trainable"] // 4
    rows = []
    for name, ranks, groups, peak, inside, across, memory in MACHINES:
        share = (ranks - 1) / ranks
        whole_layer = (base + 4 * trained) / 32
        activations = 32 * TOKENS * 4096 * 2 + 3 * TOKENS * 2 * 14336 * 2
        held = (base + 16 * trained) / ranks + 3 * whole_layer + 4 * trained + activations
        gathered = share * (base + 4 * trained) * 2
        reduced = share * 4 * trained
        crossing = 2 * (groups - 1) / groups * 4 * trained / ranks
        rows.append(
            {
                "machine": name,
                "memory_gb": held / 1e9,
                "of_gb": memory,
                "gathered_gb_a_micro_batch": gathered / 1e9,
                "reduced_gb_a_step": (reduced + crossing) / 1e9,
                "seconds_of_arithmetic_a_micro_batch": TOKENS * FLOPS_PER_TOKEN / (0.5 * peak),
                "seconds_of_gathering_a_micro_batch": gathered / inside,
                "seconds_of_reducing_a_step": reduced / inside + (crossing / across if across else 0.0),
            }
        )
    return rows


def main() -> None:
    """Measure, compute and write results/scale.json."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    ).parse_args()
    figures = {"measured": measured_part(), "mixtral_8x7b_on_paper": table()}
    print(json.dumps(figures["mixtral_8x7b_on_paper"], indent=2))
    print("written to", record.write("scale", figures))


if __name__ == "__main__":
    main()
