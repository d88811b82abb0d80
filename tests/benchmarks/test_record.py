"""The table of benchmarks in the docs and its rows in the README: figures by hand, and the repository's own."""

import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("record",):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return __import__("record")


def spread(median: float) -> dict[str, float]:
    return {"median": median, "min": 0.9 * median, "max": 1.1 * median}


def test_numbers_have_three_digits(table: Any) -> None:
    assert [table.number(value) for value in (1173.97, 169.3, 16.93, 1.693, 0.0451)] == [
        "1,174", "169", "16.9", "1.69", "0.05",
    ]  # fmt: skip


def test_rows_of_every_kind(table: Any) -> None:
    step: dict[str, Any] = {
        "settings": {"preset": "cpu-small", "sequence_length": 1024, "micro_batch_size": 4},
        "tokens_per_second": {"ours": spread(1000), "stock": spread(500), "limit": spread(2000)},
        "ratio_to": {"stock": spread(2)},
        "share_of_limit": spread(0.5),
        "peak_bytes": {"ours": 3_290_000_000, "stock": 4_930_000_000},
    }
    peers = step | {
        "ratio_to": {"stock": spread(2), "partly": spread(2)},
        "tokens_per_second": step["tokens_per_second"] | {"partly": spread(500)},
        "peak_bytes": step["peak_bytes"] | {"partly": 10**9},
        "trained_parameters": {"ours": 15_140_000, "stock": 22_480_000, "partly": 851_000},
    }
    load = {"gigabytes_per_second": {"ours": spread(0.1), "limit": spread(0.02)}, "share_of_limit": spread(5)}
    generated = {
        "tokens_per_second": {"ours": spread(20), "stock": spread(40)},
        "ratio": spread(0.5),
        "share_of_limit": spread(0.1),
    }
    results = {
        "train_step_4096": step,
        "train_step_4096_peers": peers,
        "expert_block": {"by_tokens": {"1024": {"milliseconds": {"ours": spread(300)}, "share_of_limit": spread(0.7)}}},
        "load": {"cases": {"stored": load}},
        "generate": {"by_batch": {"1": generated}, "peak_bytes": {"ours": 10**9, "stock": 2 * 10**9}},
        "scale": {"of no row": 1},
    }
    assert list(table.rows(results)) == [
        "| step of 4,096 tokens, `cpu-small` | 1,000 (900 to 1,100) tokens/s | stock: 500 (450 to 550) tokens/s | "
        "2.00 (1.80 to 2.20) | 0.50 | 3.29 and 4.93 GB |\n",
        "| step of 4,096 tokens, `cpu-small`, 3 models in memory | 1,000 (900 to 1,100) tokens/s | "
        "stock, trains 22.5 M: 500 (450 to 550) tokens/s | 2.00 (1.80 to 2.20) | 0.50 | 3.29 and 4.93 GB |\n",
        "| step of 4,096 tokens, `cpu-small`, 3 models in memory | 1,000 (900 to 1,100) tokens/s | "
        "partly, trains 0.85 M: 500 (450 to 550) tokens/s | 2.00 (1.80 to 2.20) | 0.50 | 3.29 and 1.00 GB |\n",
        "| expert block, 1,024 tokens | 300 (270 to 330) ms |  |  | 0.70 |  |\n",
        "| loading a 4-bit folder | 0.10 (0.09 to 0.11) GB/s |  |  | 5.00 |  |\n",
        "| decoding, 1 row | 20.0 (18.0 to 22.0) tokens/s | stock, bf16: 40.0 (36.0 to 44.0) tokens/s | "
        "0.50 (0.45 to 0.55) | 0.10 | 1.00 and 2.00 GB |\n",
    ]


def test_a_row_by_count(table: Any) -> None:
    kinds = {"frozen product": 5.0, "attention": 0.5, "element-wise": 2.5, "decoding": 1.5}
    one = {"kinds": {kind: {"milliseconds": value, "second_stream": False} for kind, value in kinds.items()}}
    figures: dict[str, Any] = {
        "case": {"preset": "full-8x7b", "rank": 64, "path": "loop", "tokens": 4096, "memory": "selective"}
        | {"dropout": 0.05},
        "layer": {"forward": one, "backward": one, "milliseconds": 19.0},
        "micro_batch": {"launches": 26551, "waits": 33, "tokens_per_second": 5054.6},
    }
    begin = "| `loop`, 4,096 tokens, `selective`, dropout 0.05 | 10.0 | 0.00 | 1.00 | 5.00 | "
    assert table.counted_row(figures) == f"{begin}3.00 | 19.0 | 26,551, 33 | 5,055 |\n"
    one["kinds"]["decoding"]["second_stream"] = True
    assert table.counted_row(figures) == f"{begin}(3.00) | 19.0 | 26,551, 33 | 5,055 |\n"
    figures["case"] |= {"preset": "full-qwen3", "rank": 8}
    assert table.counted_row(figures).startswith("| `full-qwen3`, rank 8, `loop`, 4,096 tokens, ")


def test_only_what_is_between_the_marks_changes(table: Any) -> None:
    text = f"a\n{table.BEGIN}\nold\n{table.END}\nb\n"
    assert table.replaced(text, "new\n") == f"a\n{table.BEGIN}\nnew\n{table.END}\nb\n"
    for broken in ("a", f"{table.END}{table.BEGIN}", text + text):
        with pytest.raises(ValueError, match="once each"):
            table.replaced(broken, "new\n")


def test_the_readme_has_the_first_row_of_each_kind(table: Any) -> None:
    begins = ("decoding, 1 row", "step of 4,096 tokens, x", "step of 4,096 tokens, y", "loading")
    lines = [f"| {begin} | a |\n" for begin in begins]
    assert table.shown(lines) == [lines[1], lines[0]]


def test_docs_and_readme_show_the_results_of_the_repository(table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    monkeypatch.setattr(Path, "write_text", lambda path, text, encoding: written.append((path, text)))
    monkeypatch.setattr(sys, "argv", ["record.py"])
    table.main()
    assert written == [(path, path.read_text(encoding="utf-8")) for path in (table.PAGE, table.README)]
    page, readme = (text for _, text in written)
    rows = readme.split(table.BEGIN)[1].split(table.END)[0].strip().splitlines()
    assert len(rows) == 2 + 3
    assert all(row in page for row in rows)
