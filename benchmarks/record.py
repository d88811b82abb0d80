"""Results of benchmarks: each with where and with what it was measured; the tables and the picture made of them.

    python benchmarks/record.py                       # the tables of docs/benchmarks.md, and three rows of it: README
    python benchmarks/record.py --curves runs/demo    # the README's picture of a run

Each table is between two marks. A benchmark without a result has no row. Figures that are measured are medians, with
the least and the most of the rounds in brackets; those by count have a table of their own.
"""

import argparse
import json
import platform
import statistics
import subprocess
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "lightning")
README = Path(__file__).parents[1] / "README.md"
PAGE = Path(__file__).parents[1] / "docs/benchmarks.md"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
COUNTED_BEGIN, COUNTED_END = "<!-- counted:begin -->", "<!-- counted:end -->"
_HEAD = (
    "| | lightning_mixcn | beside it | ratio | share of the limit | peak memory, ours and beside |\n"
    "|---|---|---|---|---|---|\n"
)
_COUNTED_HEAD = (
    "| by count, ms a layer | frozen products | LoRA and router | attention | element-wise | decoding | layer "
    "| launches and waits | tokens/s by count |\n|---|---|---|---|---|---|---|---|---|\n"
)
_COUNTED_KINDS = ("frozen product", "LoRA and router", "attention", "element-wise", "decoding")
# The README's rows: the first of each kind.
_SHOWN = ("step of 512 tokens", "step of 4,096 tokens", "decoding, 1 row")
_STEPS = (
    "train_step",
    "train_step_1024",
    "train_step_4096",
    "train_step_1024_peers",
    "train_step_4096_peers",
    "train_step_olmoe_1024",
    "train_step_olmoe_4096",
    "train_step_qwen3_1024",
    "train_step_qwen3_4096",
)

Results = dict[str, dict[str, Any]]


def processor() -> str:
    """Return the model name of the GPU, or of the CPU with its core count and threads in use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"


def commit() -> str:
    """Return the commit measured, ``+`` when the tree had changes."""
    done = subprocess.run(["git", "describe", "--always", "--dirty=+"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def spread(values: list[float]) -> dict[str, float]:
    """Return the median, minimum and maximum."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def write(name: str, figures: dict[str, Any]) -> Path:
    """Write ``results/NAME.json`` with device, versions and commit."""
    RESULTS.mkdir(exist_ok=True)
    origin = {"device": processor(), "commit": commit(), "versions": {name: version(name) for name in PACKAGES}}
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(origin | figures, indent=2) + "\n")
    return path


def number(value: float) -> str:
    """Format three significant digits: 1,174, 169, 16.9, 1.69."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def with_range(spread: dict[str, float]) -> str:
    """Format as ``169 (148 to 188)``."""
    return f"{number(spread['median'])} ({number(spread['min'])} to {number(spread['max'])})"


def row(
    what: str,
    unit: str,
    ours: dict[str, float],
    *,
    peer: tuple[str, dict[str, float]] | None = None,
    ratio: dict[str, float] | None = None,
    share: dict[str, float] | None = None,
    peaks: tuple[int, ...] = (),
) -> str:
    """Return a line of the table; a column without a figure is empty."""
    cells = (
        what,
        f"{with_range(ours)} {unit}",
        "" if peer is None else f"{peer[0]}: {with_range(peer[1])} {unit}",
        "" if ratio is None else with_range(ratio),
        "" if share is None else f"{share['median']:.2f}",
        " and ".join(f"{peak / 1e9:.2f}" for peak in peaks) + (" GB" if peaks else ""),
    )
    return "| " + " | ".join(cells) + " |\n"


def rows(results: Results) -> Iterator[str]:
    """Yield all lines, in the order of the page."""
    for name in _STEPS:
        if name in results:
            yield from _step(results[name])
    for tokens, figures in results.get("expert_block", {}).get("by_tokens", {}).items():
        milliseconds = figures["milliseconds"]["ours"]
        yield row(f"expert block, {int(tokens):,} tokens", "ms", milliseconds, share=figures["share_of_limit"])
    names = {"quantising": "loading, bf16 to NF4", "stored": "loading a 4-bit folder"}
    for case, figures in results.get("load", {}).get("cases", {}).items():
        yield from _load(names[case], figures)
    generated = results.get("generate", {})
    for batch, figures in generated.get("by_batch", {}).items():
        rates = figures["tokens_per_second"]
        peer, peaks = ("stock, bf16", rates["stock"]), tuple(generated["peak_bytes"][who] for who in ("ours", "stock"))
        what = f"decoding, {batch} rows" if int(batch) > 1 else "decoding, 1 row"
        share = figures["share_of_limit"]
        yield row(what, "tokens/s", rates["ours"], peer=peer, ratio=figures["ratio"], share=share, peaks=peaks)


def _step(figures: dict[str, Any]) -> Iterator[str]:
    settings, rates, peaks = figures["settings"], figures["tokens_per_second"], figures["peak_bytes"]
    tokens = settings["sequence_length"] * settings["micro_batch_size"]
    of = f"`{settings['preset']}`" if settings.get("preset") else "the demo's base"
    trained = figures.get("trained_parameters", {})
    # Each has its model in memory while others take their turn: with more of them everyone is slower.
    beside = len(figures["ratio_to"])
    company = f", {1 + beside} models in memory" if beside > 1 else ""
    for peer, ratio in figures["ratio_to"].items():
        yield row(
            f"step of {tokens:,} tokens, {of}{company}",
            "tokens/s",
            rates["ours"],
            # Who trains less has less to do.
            peer=(f"{peer}, trains {number(trained[peer] / 1e6)} M" if peer in trained else peer, rates[peer]),
            ratio=ratio,
            share=figures.get("share_of_limit"),
            peaks=(peaks["ours"], peaks[peer]),
        )


def _load(what: str, figures: dict[str, Any]) -> Iterator[str]:
    rates = figures["gigabytes_per_second"]
    peers = [name for name in rates if name not in ("ours", "limit")]
    peer = (peers[0], rates[peers[0]]) if peers else None
    yield row(what, "GB/s", rates["ours"], peer=peer, share=figures["share_of_limit"])


def counted_row(figures: dict[str, Any]) -> str:
    """Return a line of the table of what gpu_count.py counted; brackets: all of it is on a second stream."""
    case, layer, whole = figures["case"], figures["layer"], figures["micro_batch"]
    # The first tables were of one preset, which is not named.
    of = "" if case["preset"] == "full-8x7b" else f"`{case['preset']}`, rank {case['rank']}, "
    cells = [f"{of}`{case['path']}`, {case['tokens']:,} tokens, `{case['memory']}`, dropout {case['dropout']:g}"]
    for name in _COUNTED_KINDS:
        kinds = [layer[phase]["kinds"][name] for phase in ("forward", "backward") if name in layer[phase]["kinds"]]
        cell = number(sum(kind["milliseconds"] for kind in kinds))
        cells.append(f"({cell})" if kinds and all(kind["second_stream"] for kind in kinds) else cell)
    cells += [number(layer["milliseconds"]), f"{whole['launches']:,}, {whole['waits']}"]
    return "| " + " | ".join([*cells, f"{whole['tokens_per_second']:,.0f}"]) + " |\n"


def shown(lines: list[str]) -> list[str]:
    """Choose the README's lines: the first that begins with each of `_SHOWN`."""
    found = (next((line for line in lines if line.startswith(f"| {begin}")), None) for begin in _SHOWN)
    return [line for line in found if line is not None]


def replaced(text: str, lines: str, marks: tuple[str, str] = (BEGIN, END)) -> str:
    """Return a page with another table between the marks.

    Raises:
        ValueError: the marks are not there, once each and in this order.
    """
    first, last = marks
    head, begin, rest = text.partition(first)
    _, end, tail = rest.partition(last)
    if not begin or not end or first in rest or last in tail:
        raise ValueError(f"The page needs {first} and after it {last}, once each. Put them around the table")
    return f"{head}{first}\n{lines}{last}{tail}"


def draw_curves(run: Path) -> None:
    """Write results/demo_curves.png: loss, gradient norm and learning rate of a run, from its TensorBoard files."""
    import matplotlib.pyplot as plt
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    files = sorted(run.glob("tensorboard/**/events.*"))
    if not files:
        raise FileNotFoundError(f"`run={str(run)!r}` holds no TensorBoard file. Run `make demo` first")
    events = EventAccumulator(str(files[-1].parent))
    events.Reload()
    tags = ["train/nll_nats_per_token", "train/gradient_norm", next(t for t in events.Tags()["scalars"] if "lr-" in t)]
    figure, axes = plt.subplots(1, len(tags), figsize=(12, 3), layout="constrained")
    for axis, tag in zip(axes, tags, strict=True):
        scalars = events.Scalars(tag)
        axis.plot([scalar.step + 1 for scalar in scalars], [scalar.value for scalar in scalars], marker=".")
        axis.set(title=tag, xlabel="optimizer step", ylim=(0, None))
        axis.grid(alpha=0.3)
    figure.savefig(RESULTS / "demo_curves.png", dpi=80)


def main() -> None:
    """Rewrite the page and the README, or draw the README's picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--curves", type=Path, metavar="RUN", help="folder of a run whose curves are drawn instead")
    if run := parser.parse_args().curves:
        draw_curves(run)
        return
    results = {path.stem: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}
    lines = list(rows(results))
    counted = [counted_row(figures) for figures in results.get("gpu_count", {}).get("cases", [])]
    page = replaced(PAGE.read_text(encoding="utf-8"), _HEAD + "".join(lines))
    page = replaced(page, _COUNTED_HEAD + "".join(counted), (COUNTED_BEGIN, COUNTED_END))
    readme = replaced(README.read_text(encoding="utf-8"), _HEAD + "".join(shown(lines)))
    for path, text in ((PAGE, page), (README, readme)):
        path.write_text(text, encoding="utf-8")
        print("written to", path.name)


if __name__ == "__main__":
    main()
