"""Stage 3: the expert block on every path, forward and training, with few rows and with many."""

from typing import Any

import record
from contenders.experts import Block, Rows
from expert_block import attempt, in_turn
from gpu_stages.running import Figures
from gpu_stages.settings import RANK, Settings, with_path
from limits import expert_products, timed

from lightning_mixcn.model.experts.loop import Dropout, ExpertFactors
from lightning_mixcn.model.experts.path import PATHS, choose_expert_path

# Eight experts, two a token: 1, 16, 256 and 2,048 rows an expert.
TOKENS = (4, 64, 1024, 8192)
# LoRA's dropout in training; forward alone is evaluation, which has none.
DROPOUTS = {True: (0.0, 0.05), False: (0.0,)}
_WARMUP, _ROUNDS = 2, 5
_FEW = 64  # tokens up to which calls are timed ten at a time, as the layers of a model follow one another


def run(settings: Settings, figures: Figures) -> None:
    """Measure every path; most rows last, since they may not fit."""
    block = Block(settings.config, RANK, settings.device)
    figures["cases"] = []
    for tokens in dict.fromkeys(settings.tokens(count) for count in TOKENS):
        rows = Rows(settings.config, tokens, settings.device)
        for training, dropouts in DROPOUTS.items():
            for dropout in dropouts:
                case = measured(block, rows, training, dropout, settings)
                figures["cases"].append(case)
                figures.save()
                _print(case)


def measured(block: Block, rows: Rows, training: bool, dropout: float, settings: Settings) -> dict[str, Any]:
    """Return figures of one size; a path that raises loses only its own."""
    tokens, absent, disagreement = len(rows.x), dict[str, str](), dict[str, float]()
    expected = block.run("loop", rows, training)
    for path in PATHS:
        attempt(path, lambda path=path: check_path(path, block, rows), absent)
        if dropout == 0.0 and path not in absent:  # else paths may draw other masks
            error = attempt(path, lambda path=path: difference(block.run(path, rows, training), expected), absent)
            disagreement |= {path: error} if error is not None else {}
    masks, rounds = Dropout(dropout, seed=0), settings.rounds(_ROUNDS)
    calls = settings.rounds(10) if tokens <= _FEW else 1

    def calling(path: str) -> Any:
        return lambda: [block.run(path, rows, training, masks) for _ in range(calls)]

    runs = {path: calling(path) for path in PATHS}
    products = expert_products(settings.config, tokens, RANK, training)
    seconds = in_turn(runs, settings.rounds(_WARMUP), rounds, settings.device, absent)
    limit = timed(products, settings.device)
    milliseconds = {path: record.spread([1e3 * value / calls for value in values]) for path, values in seconds.items()}
    return {
        "tokens": tokens,
        "rows_per_expert": rows.index.numel() / settings.config.num_local_experts,
        "training": training,
        "dropout": dropout,
        "milliseconds": milliseconds,
        "limit_milliseconds": record.spread([1e3 * limit() for _ in range(1 + rounds)][1:]),
        "disagreement": disagreement,
        "absent": absent,
    }


def check_path(path: str, block: Block, rows: Rows) -> None:
    """Refuse a path that would not be taken here.

    Raises:
        ValueError: it cannot compute these sizes on this device; the message says why.
    """
    with_path(path)
    choose_expert_path(rows.x, rows.index, block.weights, ExpertFactors(*block.factors))


def difference(found: list[Any], expected: list[Any]) -> float:
    """Return the largest relative error of a result and its gradients: norm of the difference over the norm.

    Raises:
        FloatingPointError: it is NaN or infinite.
    """
    errors = [
        float((one.double() - other.double()).norm() / other.double().norm().clamp_min(1e-12))
        for one, other in zip(found, expected, strict=True)
    ]
    if not all(error < float("inf") for error in errors):
        raise FloatingPointError("NaN or infinite values where loop's are finite")
    return max(errors)


def _print(case: dict[str, Any]) -> None:
    kind = f"training, dropout {case['dropout']:g}" if case["training"] else "forward"
    parts = [f"{path} {value['median']:.3g} ms" for path, value in case["milliseconds"].items()]
    parts.append(f"products alone {case['limit_milliseconds']['median']:.3g} ms")
    print(f"  {case['tokens']} tokens, {kind}: {', '.join(parts)}", flush=True)
    for path, error in case["absent"].items():
        print(f"    {path} did not take part: {error}", flush=True)
