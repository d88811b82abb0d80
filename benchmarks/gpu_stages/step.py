"""Stage 4: whole training steps of Mixtral-8x7B beside their plan and their limit; one profiled."""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import record
import torch
from contenders.step import lora
from gpu_stages.decide import winner
from gpu_stages.running import Figures
from gpu_stages.settings import RANK, Settings, with_path
from limits import limit
from torch import nn
from train_step import free_memory, random_rows, stepper

from lightning_mixcn.metrics.device import peak_rate
from lightning_mixcn.model import set_activation_checkpointing
from lightning_mixcn.model.memory.budget import RESERVE, usable_bytes
from lightning_mixcn.model.memory.flops import count_training_flops
from lightning_mixcn.model.memory.layer import MicroBatch
from lightning_mixcn.model.memory.optimizer import optimizer_memory
from lightning_mixcn.model.memory.plan import MemoryPlan, Run, Sharing, plan_memory

# Of a GPU's stated rate, for the plan of the time: what products reach by count (`gpu_count.py`), and flash attention.
PRODUCTS_SHARE, ATTENTION_SHARE = 0.5, 0.35


class StepCase(NamedTuple):
    """A training step that is measured.

    Args:
        mode: Activation checkpointing.
        rows: Rows of the micro-batch.
        length: Tokens of a row.
        dropout: Probability of LoRA's dropout.
        optimizer: ``adamw`` (fused) or ``adamw8bit``.
        warmup: Steps that are not timed.
        rounds: Timed steps.
    """

    mode: str
    rows: int
    length: int
    dropout: float = 0.0
    optimizer: str = "adamw"
    warmup: int = 2
    rounds: int = 5

    @property
    def name(self) -> str:
        """Name in the figures."""
        dropout = f", dropout {self.dropout:g}" if self.dropout else ""
        return f"{self.mode}, {self.rows} x {self.length}, {self.optimizer}{dropout}"


# The first is the shipped configuration's.
CASES = (
    StepCase("selective", 1, 4096, dropout=0.05),
    StepCase("selective", 1, 4096),
    StepCase("full", 2, 4096, rounds=3),
    StepCase("full", 8, 4096, optimizer="adamw8bit", warmup=1, rounds=2),
)


def run(settings: Settings, figures: Figures) -> None:
    """Measure every case on `loop` and on the path that won the block, then the limits without the model.

    Where the block was not measured, the path that the package chooses takes the winner's place.
    """
    model = settings.model(lora(RANK, dropout=0.05))
    chosen = [fitted(case, settings) for case in CASES]
    rows = chosen[0].rows * chosen[0].length * settings.config.num_experts_per_tok / settings.config.num_local_experts
    paths = dict.fromkeys(["loop", winner(settings.figures_of("block"), rows)])
    figures["cases"] = []
    for number, case in enumerate(chosen):
        for path in paths:
            figures["cases"].append(measured(model, case, path, settings, profiled=number == 0))
            figures.save()
    del model
    free_memory(settings.device)
    for case in chosen:
        if settings.left() < 10:
            break
        add_limit([found for found in figures["cases"] if found["case"] == case.name], case, settings)
        figures.save()


def fitted(case: StepCase, settings: Settings) -> StepCase:
    """Return the case as it is on a GPU; on a CPU with shorter rows, fewer of them, and without what needs CUDA."""
    optimizer = case.optimizer if settings.on_gpu else "adamw"
    length, warmup, rounds = settings.tokens(case.length), settings.rounds(case.warmup), settings.rounds(case.rounds)
    return case._replace(length=length, optimizer=optimizer, warmup=warmup, rounds=rounds)


def measured(
    model: Any, case: StepCase, path: str | None, settings: Settings, profiled: bool = False
) -> dict[str, Any]:
    """Return figures of a case on a path (``None``: the one that `mixcn fit` takes), or why there are none."""
    found: dict[str, Any] = {"case": case.name, "path": path or "as shipped", "tokens": case.rows * case.length}
    try:
        with_path(path)  # of which the plan depends, too
        set_dropout(model, case.dropout)
        plan = planned_memory(model, case, settings.device)
        rate = peak_rate(torch.device(settings.device), torch.bfloat16).flops_per_second
        seconds = planned_seconds(model, case, rate)
        found["planned"] = {"peak_bytes": plan.peak, "host_bytes": plan.host, "seconds": seconds}
        _check_room(plan, seconds * (case.warmup + 1), settings)
        found |= _timed(model, case, settings, profiled)
    except Exception as error:  # the next case may do
        found["error"] = f"{type(error).__name__}: {error}".split("\n")[0][:300]
    finally:
        model.zero_grad(set_to_none=True)
        free_memory(settings.device)
    rate = f"{found['tokens_per_second']['median']:,.0f} tokens/s" if "tokens_per_second" in found else found["error"]
    print(f"  {found['case']}, {found['path']}: {rate}", flush=True)
    return found


def planned_memory(model: Any, case: StepCase, device: str) -> MemoryPlan:
    """Plan the bytes of a case."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    modes = [case.mode] * model.config.num_hidden_layers
    optimizer = optimizer_memory(_maker(case), trained, device)
    return plan_memory(model, Run(MicroBatch(case.rows, case.length), modes, device, False, optimizer, Sharing()))


def planned_seconds(model: Any, case: StepCase, flops_per_second: float) -> float:
    """Return the seconds of a step by arithmetic, at the shares of a device's rate that are expected."""
    pairs = case.rows * case.length * (case.length + 1) // 2  # each row is one document
    flops = count_training_flops(model, case.mode)
    attention = flops.per_pair.total * pairs
    products = flops.of(case.rows * case.length, pairs).total - attention
    return (products / PRODUCTS_SHARE + attention / ATTENTION_SHARE) / flops_per_second


def set_dropout(model: Any, probability: float) -> None:
    """Set the probability of every adapter's dropout."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability


def add_limit(found: list[dict[str, Any]], case: StepCase, settings: Settings) -> None:
    """Measure the limit of a case, and each path's share of it."""
    run = limit(settings.config, case.rows * case.length, RANK, case.mode, settings.device)
    seconds = record.spread([run() for _ in range(1 + settings.rounds(2))][1:])
    for figures in found:
        figures["limit_seconds"] = seconds
        if "seconds" in figures:
            figures["share_of_limit"] = seconds["median"] / figures["seconds"]["median"]
            print(f"  {case.name}, {figures['path']}: {figures['share_of_limit']:.2f} of the limit", flush=True)


def _check_room(plan: MemoryPlan, seconds: float, settings: Settings) -> None:
    usable = (1 - RESERVE) * usable_bytes(torch.device(settings.device))
    if plan.peak > usable:
        raise MemoryError(f"{plan.peak / 1e9:.1f} GB are planned, {usable / 1e9:.1f} are usable")
    if seconds > settings.left():
        raise TimeoutError(f"{seconds:.0f} s are planned, {settings.left():.0f} are left")


def _timed(model: Any, case: StepCase, settings: Settings, profiled: bool) -> dict[str, Any]:
    set_activation_checkpointing(model, case.mode)
    options = argparse.Namespace(
        device=settings.device,
        optimizer=case.optimizer,
        micro_batch_size=case.rows,
        sequence_length=case.length,
        config=settings.config,
    )
    step = stepper(model.train(), random_rows(options), options)
    if settings.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(case.warmup):
        step()
    seconds = [step()]
    while len(seconds) < case.rounds and seconds[0] < settings.left():
        seconds.append(step())
    rates = [case.rows * case.length / value for value in seconds]
    found: dict[str, Any] = {"seconds": record.spread(seconds), "tokens_per_second": record.spread(rates)}
    if settings.on_gpu:
        reserved = torch.cuda.max_memory_reserved()
        found |= {"peak_allocated_bytes": torch.cuda.max_memory_allocated(), "peak_reserved_bytes": reserved}
    return found | ({"profile": profile(step, settings)} if profiled else {})


def profile(step: Callable[[], float], settings: Settings) -> dict[str, Any]:
    """Count a step's kernels and waits, and name the 15 kernels that take most time; operations on a CPU."""
    on_gpu = settings.on_gpu
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profiler:
        step()
    events = list(profiler.key_averages())
    time_of = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    microseconds = {event.key: getattr(event, time_of) for event in events}
    counts = {event.key: event.count for event in events}
    largest = sorted(microseconds, key=lambda name: -microseconds[name])[:15]
    return {
        "kernels": sum(counts[name] for name, spent in microseconds.items() if spent > 0),
        "waits": sum(count for name, count in counts.items() if name.endswith("Synchronize")),
        "milliseconds": sum(microseconds.values()) / 1e3,
        "largest": [
            {"name": name[:120], "milliseconds": microseconds[name] / 1e3, "calls": counts[name]} for name in largest
        ],
    }


def _maker(case: StepCase) -> Callable[[Any], torch.optim.Optimizer]:
    if case.optimizer == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return lambda parameters: AdamW8bit(parameters, lr=1e-4)
    return lambda parameters: torch.optim.AdamW(parameters, lr=1e-4, fused=True)
