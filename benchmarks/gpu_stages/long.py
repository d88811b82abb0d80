"""Stage 6: long rows: chunked prefill, and one training step each of 32,768 and of 131,072 tokens."""

import math
from typing import Any

import torch
from contenders.step import lora
from gpu_stages.running import Figures
from gpu_stages.settings import RANK, Settings
from gpu_stages.step import StepCase, fitted, measured
from long_context import prefilled
from train_step import free_memory

PREFILLED = (32_768, 131_072)
CHUNK = 4096
# Nothing is repeated: a step of the second takes about a minute.
CASES = (
    StepCase("full", 1, 32_768, optimizer="adamw8bit", warmup=0, rounds=1),
    StepCase("offload", 1, 131_072, optimizer="adamw8bit", warmup=0, rounds=1),
)


def run(settings: Settings, figures: Figures) -> None:
    """Measure the prefill, then the steps, on the path that is shipped."""
    model = settings.model(lora(RANK))
    figures |= {"prefill": [], "steps": []}
    for tokens in PREFILLED:
        found: dict[str, Any] = {"tokens": settings.tokens(tokens)}
        try:
            found |= _prefill(model, found["tokens"], settings)
        except Exception as error:  # the next row, and the steps, may do
            found["error"] = f"{type(error).__name__}: {error}".split("\n")[0][:300]
        figures["prefill"].append(found)
        print(f"  prefill: {found}", flush=True)
        figures.save()
        free_memory(settings.device)
    for case in CASES:
        figures["steps"].append(measured(model, fitted(case, settings), None, settings))
        figures.save()


def _prefill(model: torch.nn.Module, tokens: int, settings: Settings) -> dict[str, float]:
    chunk = settings.tokens(CHUNK)
    *_, (done, seconds, nats) = prefilled(model, tokens, chunk)
    if not math.isfinite(nats):
        raise FloatingPointError(f"the likelihood of {done:,} tokens is {nats}")
    found = {"chunk": chunk, "seconds": seconds, "nll_nats_per_token": nats / (done - 1)}
    return found | ({"peak_bytes": torch.cuda.max_memory_allocated()} if settings.on_gpu else {})
