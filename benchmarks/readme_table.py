"""Write the table of docs/benchmarks.md, and three of its rows into the README, from ``results/*.json``.

    python benchmarks/readme_table.py

Both stand between two marks. A benchmark without a result has no row. Figures are medians, with the least and the most
of the rounds in brackets.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import record

README = Path(__file__).parents[1] / "README.md"
PAGE = Path(__file__).parents[1] / "docs/benchmarks.md"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
_HEAD = (
    "| | lightning_mixcn | beside it | ratio | share of the limit | peak memory, ours and beside |\n"
    "|---|---|---|---|---|---|\n"
)
# The README's rows: the first of each kind.
_SHOWN = ("step of 512 tokens", "step of 4,096 tokens", "decoding, 1 row")
_STEPS = ("train_step", "train_step_1024", "train_step_4096", "train_step_1024_peers", "train_step_4096_peers")

Results = dict[str, dict[str, Any]]


def number(value: float) -> str:
    """Three digits that count: 1,174, 169, 16.9, 1.69."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def with_range(spread: dict[str, float]) -> str:
    """``169 (148 to 188)``."""
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
    """One line of the table; a column without a figure is empty."""
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


def shown(lines: list[str]) -> list[str]:
    """Choose the README's lines: the first that begins with each of `_SHOWN`."""
    found = (next((line for line in lines if line.startswith(f"| {begin}")), None) for begin in _SHOWN)
    return [line for line in found if line is not None]


def replaced(text: str, lines: str) -> str:
    """Return a page with another table between the marks.

    Raises:
        ValueError: the marks are not there, once each and in this order.
    """
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in tail:
        raise ValueError(f"The page needs {BEGIN} and after it {END}, once each. Put them around the table")
    return f"{head}{BEGIN}\n{lines}{END}{tail}"


def main() -> None:
    """Rewrite the page and the README."""
    results = {path.stem: json.loads(path.read_text()) for path in record.RESULTS.glob("*.json")}
    lines = list(rows(results))
    for path, chosen in ((PAGE, lines), (README, shown(lines))):
        path.write_text(replaced(path.read_text(encoding="utf-8"), _HEAD + "".join(chosen)), encoding="utf-8")
        print("written to", path.name)


if __name__ == "__main__":
    main()
