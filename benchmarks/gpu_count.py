"""A training step on a GPU by count: no GPU is needed, and nothing is measured.

    python benchmarks/gpu_count.py --tokens 4096 --memory selective --dropout 0.05
    python benchmarks/gpu_count.py --tokens 32768 --memory full --path grouped --terabytes 2.4
    python benchmarks/gpu_count.py --all          # every case of docs/benchmarks.md, into results/gpu_count.json

A model of one layer and one of two run forward and backward on the meta device, with CUDA's branches
(`card.py` stands in for the card); what the second does more is a layer. Every kernel is counted: operations
of products, bytes, launches, waits of the host (`trace.py`). Then rates that are given make milliseconds of it
(`cost.py`): products at cuBLAS' rate in whole waves of tiles, attention at its kernel's rate, all else at the
memory's, one kernel after the other. What runs on a second stream is summed apart, and of the two sums the longer one
counts, forward and backward each, as if neither slowed the other down. The host launches ahead, so its time counts only
where it is longer than all of that. Each expert has tokens · top-k / experts rows; a row of tokens is one document.
"""

import argparse
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import record
import torch
from gpu_counting.card import pretended_card
from gpu_counting.cost import Rates
from gpu_counting.trace import KINDS, Trace, Work
from random_base import PRESETS, config_of

from lightning_mixcn.model import build_moe, set_activation_checkpointing
from lightning_mixcn.model.experts.path import PATHS
from lightning_mixcn.model.memory.checkpointing import MODES

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate", "w1", "w2", "w3"]
PHASES = ("forward", "backward")
BY_COUNT = "by count: arithmetic on traced shapes and given rates, no measurement"


@dataclass(frozen=True)
class Case:
    """What is counted.

    Args:
        tokens: Of a micro-batch.
        memory: Mode of activation checkpointing.
        dropout: LoRA's.
        path: Of the experts.
        rank: LoRA's, on attention, router and experts.
        preset: Sizes.
        sequence_length: Tokens of a row.
        micro_batches: Of an optimizer step.
    """

    tokens: int = 4096
    memory: str = "selective"
    dropout: float = 0.05
    path: str = "loop"
    rank: int = 64
    preset: str = "full-8x7b"
    sequence_length: int = 4096
    micro_batches: int = 1

    @property
    def rows(self) -> tuple[int, int]:
        """Return the number of rows, and their length."""
        length = min(self.sequence_length, self.tokens)
        assert self.tokens % length == 0, "rows are full"
        return self.tokens // length, length


@dataclass(frozen=True)
class Counted:
    """Work of a micro-batch, and of the optimizer's step after it.

    Args:
        layer: Of each layer after the first.
        rest: Of everything else: the first layer, embedding, head, loss.
        optimizer: For all layers.
        layers: How many there are.
        waits: Waits of the host for a layer, and for the rest.
    """

    layer: Counter[Work]
    rest: Counter[Work]
    optimizer: Counter[Work]
    layers: int
    waits: tuple[int, int]


_COMPARED = [(4096, "selective", 0.05), (4096, "selective", 0.0), (32768, "full", 0.0)]
_TRAINING = [*_COMPARED, (32768, "full", 0.05), (8192, "full", 0.0)]
CASES = [Case(*setting, path) for path in PATHS for setting in (_TRAINING if path in ("loop", "fused") else _COMPARED)]
# Many small experts: whether one product of all of them is worth decoding a whole stack first.
CASES += [
    Case(tokens, "selective", 0.0, path, rank, preset)
    for preset, rank in (("full-olmoe", 16), ("full-qwen3", 8))
    for tokens in (4096, 32768)
    for path in ("fused", "grouped")
]


def count(case: Case, **sizes: int | None) -> Counted:
    """Count a step; ``sizes`` replace those of the preset."""
    config = config_of(case.preset, **sizes)
    one, two = (_trace(case, config_of(case.preset, **(sizes | {"num_hidden_layers": n}))) for n in (1, 2))
    (rest, first), (both, second) = map(_split, (one, two))
    rest += _auxiliary_loss(case, config)
    layers = config.num_hidden_layers
    # Each operation takes the tensors of all layers at once.
    optimizer = [
        replace(a, bytes=a.bytes + (layers - 1) * (b.bytes - a.bytes)) for a, b in zip(first, second, strict=True)
    ]
    waits = len(two.waits) - len(one.waits), len(one.waits)
    return Counted(both - rest, rest, Counter(optimizer), layers, waits)


def _split(trace: Trace) -> tuple[Counter[Work], list[Work]]:
    """Return the micro-batch's work, and the optimizer's."""
    micro_batch = Counter(work for work in trace.works if work.phase in PHASES)
    return micro_batch, [work for work in trace.works if work.phase == "optimizer"]


def _trace(case: Case, config: Any) -> Trace:
    """Run a model's micro-batch and optimizer step on the meta device, without the auxiliary loss."""
    from peft import LoraConfig

    rows, length = case.rows
    # A row is one document.
    trace = Trace(case.rank, rows * length * (length + 1) // 2)
    lora = LoraConfig(r=case.rank, lora_alpha=2 * case.rank, lora_dropout=case.dropout, target_modules=TARGETS)
    model: Any = build_moe(config, lora=lora, device="meta").train()
    set_activation_checkpointing(model, case.memory)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if case.micro_batches > 1:  # the gradients of those before, which are added to
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
    ids = torch.empty(rows, length, dtype=torch.int64, device="meta")
    routed = case.tokens * config.num_experts_per_tok
    with pretended_card(trace, case.path, routed, config.num_local_experts, length), trace:
        loss = model(input_ids=ids, labels=ids, position_ids=ids).loss
        trace.phase = "backward"
        torch.autograd.backward(loss)
        trace.phase = "optimizer"
        _step(trained)
    return trace


def _auxiliary_loss(case: Case, config: Any) -> Counter[Work]:
    """Count the auxiliary load-balancing loss, which takes the logits of all layers at once."""
    rows, length = case.rows
    model: Any = build_moe(config_of(case.preset, num_hidden_layers=1), device="meta")
    documents = torch.empty(rows, length, dtype=torch.int32, device="meta")
    size = case.tokens, config.num_local_experts
    logits = [
        torch.empty(size, dtype=torch.bfloat16, device="meta", requires_grad=True)
        for _ in range(config.num_hidden_layers)
    ]
    with Trace(case.rank, 0) as trace:
        loss = model._auxiliary_loss(tuple(logits), documents)
        trace.phase = "backward"
        torch.autograd.backward(loss)
    return Counter(trace.works)


def _step(trained: list[Any]) -> None:
    """Rescale and measure the gradients as `CausalLMModule` does, and make a step of fused AdamW."""
    gradients = [parameter.grad for parameter in trained]
    torch._foreach_mul_(gradients, 1.0)
    torch._foreach_norm(gradients)
    moments = [[torch.empty_like(gradient) for gradient in gradients] for _ in range(2)]
    steps = [torch.empty((), device="meta") for _ in gradients]
    settings = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.01, "eps": 1e-8}
    torch._fused_adamw_(
        [parameter.detach() for parameter in trained], gradients, *moments, [], steps,
        amsgrad=False, maximize=False, **settings,
    )  # fmt: skip


def summed(works: Counter[Work], rates: Rates) -> dict[str, Any]:
    """Return launches, operations, bytes and milliseconds by kind, and the milliseconds of both streams."""
    kinds = {kind: {w: times for w, times in works.items() if w.kind == kind} for kind in KINDS}
    return {
        "kinds": {
            kind: {
                "launches": sum(chosen.values()),
                "teraflop": sum(work.flops * times for work, times in chosen.items()) / 1e12,
                "gigabytes": sum(work.bytes * times for work, times in chosen.items()) / 1e9,
                "milliseconds": _milliseconds(chosen, rates),
                "second_stream": all(work.side for work in chosen),
            }
            for kind, chosen in kinds.items()
            if chosen
        },
        "milliseconds": _milliseconds({w: times for w, times in works.items() if not w.side}, rates),
        "second_stream_milliseconds": _milliseconds({w: times for w, times in works.items() if w.side}, rates),
    }


def _milliseconds(works: Mapping[Work, int], rates: Rates) -> float:
    return 1e3 * sum(rates.seconds(work) * times for work, times in works.items())


def predict(counted: Counted, case: Case, rates: Rates) -> dict[str, Any]:
    """Return what the work takes by ``rates``: a layer, the rest, the optimizer, and a whole micro-batch."""
    parts: dict[str, Any] = {}
    for name, works, waits in zip(("layer", "rest"), (counted.layer, counted.rest), counted.waits, strict=True):
        passes = {p: summed(Counter({w: n for w, n in works.items() if w.phase == p}), rates) for p in PHASES}
        longer = sum(max(p["milliseconds"], p["second_stream_milliseconds"]) for p in passes.values())
        parts[name] = passes | {"milliseconds": longer, "launches": works.total(), "waits": waits}
    layer, rest, repeated = parts["layer"], parts["rest"], counted.layers - 1
    parts["optimizer"] = summed(counted.optimizer, rates)
    whole = {key: layer[key] * repeated + rest[key] for key in ("milliseconds", "launches", "waits")}
    whole["host_milliseconds"] = whole["launches"] * rates.launch_microseconds / 1e3
    optimizer = parts["optimizer"]["milliseconds"] / case.micro_batches
    whole["milliseconds"] = max(whole["milliseconds"], whole["host_milliseconds"]) + optimizer
    whole["tokens_per_second"] = 1e3 * case.tokens / whole["milliseconds"]
    return parts | {"micro_batch": whole}


def report(case: Case, found: dict[str, Any], layers: int) -> None:
    """Print a case."""
    setting = f"{case.memory}, dropout {case.dropout:g}, rank {case.rank}, path {case.path}"
    print(f"\n{case.preset}, {case.tokens:,} tokens, {setting}\n{BY_COUNT}\n")
    print(f"{'a layer':16}{'forward':>36}{'backward':>36}")
    print(f"{'':16}" + 2 * f"{'launches':>12}{'TFLOP':>8}{'GB':>8}{'ms':>8}")
    layer, whole, optimizer = found["layer"], found["micro_batch"], found["optimizer"]["milliseconds"]
    for kind in KINDS:
        parts = [layer[phase]["kinds"].get(kind) for phase in PHASES]
        if any(parts):
            print(f"{kind:16}" + "".join(_cells(part) for part in parts))
    for name, key in (("one by one", "milliseconds"), ("second stream", "second_stream_milliseconds")):
        print(f"{name:16}" + "".join(f"{layer[phase][key]:36.2f}" for phase in PHASES))
    print(
        f"a layer: {layer['milliseconds']:.1f} ms, {layer['launches']} launches, {layer['waits']} waits of the host\n"
        f"one layer, embedding, head and loss: {found['rest']['milliseconds']:.1f} ms; optimizer: {optimizer:.1f} ms\n"
        f"{layers} layers: {whole['milliseconds']:.0f} ms, {whole['tokens_per_second']:,.0f} tokens/s; "
        f"{whole['launches']:,} launches, {whole['host_milliseconds']:.0f} ms of the host's; {whole['waits']} waits"
    )


def _cells(part: dict[str, float] | None) -> str:
    if part is None:
        return " " * 36
    return f"{part['launches']:12}{part['teraflop']:8.3f}{part['gigabytes']:8.2f}{part['milliseconds']:8.2f}"


def rounded(tree: Any) -> Any:
    """Keep four digits of every fraction."""
    if isinstance(tree, dict):
        return {key: rounded(value) for key, value in tree.items()}
    return float(f"{tree:.4g}") if isinstance(tree, float) else tree


def options_of() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--all", action="store_true", help="count the cases of the docs instead, and write the result")
    choices = {"memory": MODES, "path": list(PATHS), "preset": list(PRESETS)}
    for field in (*fields(Case), *fields(Rates)):
        parser.add_argument(
            f"--{field.name}", type=type(field.default), default=field.default, choices=choices.get(field.name)
        )
    for name in ("num_hidden_layers", "hidden_size", "width"):
        parser.add_argument(f"--{name}", type=int, help="instead of the preset's")
    return parser.parse_args()


def main() -> None:
    """Count one case, or all of the docs'."""
    options = vars(options_of())
    rates = Rates(**{field.name: options[field.name] for field in fields(Rates)})
    cases = CASES if options["all"] else [Case(**{field.name: options[field.name] for field in fields(Case)})]
    sizes = {name: options[name] for name in ("num_hidden_layers", "hidden_size", "width")}
    results = []
    for case in cases:
        counted = count(case, **sizes)
        found = predict(counted, case, rates)
        report(case, found, counted.layers)
        rest = {key: found["rest"][key] for key in ("milliseconds", "launches", "waits")}
        results.append({"case": asdict(case)} | rounded(found | {"rest": rest}))
    if options["all"]:
        figures = {"device": "none", "what": BY_COUNT, "settings": {"rates": asdict(rates)}, "cases": results}
        print("written to", record.write("gpu_count", figures))


if __name__ == "__main__":
    main()
