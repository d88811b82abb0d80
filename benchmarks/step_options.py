"""Options of train_step.py, and what a preset measures unless they say otherwise."""

import argparse
from typing import Any

from step_models import CONTESTANTS

# 32,768 tokens a micro-batch, and a row of 131,072 tokens, are the
# two largest things that a GPU of 80 GB is meant to train.
WORKLOADS: dict[str, dict[str, Any]] = {
    "cpu-small": {"preset": "cpu-small", "sequence_length": 1024, "rank": 64, "contestants": list(CONTESTANTS)},
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
    "warmup": 4,
    "rounds": 12,
    "activation_checkpointing": "none",
    "optimizer": "adamw",
    "result": "train_step",
    "contestants": ["ours"],
}


def parse(description: str | None) -> argparse.Namespace:
    """Options, with those of the preset and then the defaults where they are not given."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(WORKLOADS), help="a random base instead of --base and --text")
    parser.add_argument("--base", help="a Mixtral folder in bf16")
    parser.add_argument("--text", help="JSON lines with a field text; enough for all steps")
    parser.add_argument("--sequence_length", type=int, help="tokens a row")
    parser.add_argument("--micro_batch_size", type=int, help="rows")
    parser.add_argument("--rank", type=int, help="of LoRA on attention, router and experts")
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
