"""Text to training rows: ours beside the tokenizer alone and the common map-then-group recipe, interleaved in one run.

    python benchmarks/data.py --tokenizer base/ --text zh.jsonl.gz en.jsonl.gz

Every measurement runs in a new process, on every core, on the same sample of the texts. Imports are not timed.

* `tokenizer`: one call of `encode_batch` on all texts, which are in memory already.
* `rows`: `PretrainDataModule.train_dataloader()` from its first batch until as many tokens have come, the texts
  unpacked before; `first_pass` with the unpacking and the start of the workers.
* `recipe`: `datasets` reads the file, maps the tokenizer over it, then maps the grouping, and is iterated once.
* Resuming: seconds to the first batch at a row of a large generated corpus, and at row 0 of it.
* Memory: what a loader worker has of its own (USS), above a worker that has read nothing.
"""

import argparse
import gzip
import itertools
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import record

CORES = len(os.sched_getaffinity(0))
MICRO_BATCH_SIZE = 8
Settings = Mapping[str, Any]  # what the measurements need, plain values


def texts_of(path: str) -> Iterator[str]:
    """Read the documents of a JSON lines file."""
    with gzip.open(path, "rt", encoding="utf-8") if path.endswith(".gz") else open(path, encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def write_texts(path: Path, texts: Iterator[str], megabytes: float) -> None:
    """Write documents until there are so many bytes of text."""
    left = megabytes * 1e6
    with path.open("w", encoding="utf-8") as file:
        while left > 0 and (text := next(texts, None)) is not None:
            left -= len(text.encode())
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


def in_turn(paths: list[str]) -> Iterator[str]:
    """Yield a document of each file in turn."""
    for texts in itertools.zip_longest(*map(texts_of, paths)):
        yield from (text for text in texts if text is not None)


def numbered(path: str) -> Iterator[str]:
    """Yield the documents of a file for ever, none like another."""
    for number in itertools.count():
        for text in texts_of(path):
            yield f"{number}. {text}"


def data_module(settings: Settings, path: str, workers: int) -> Any:
    from lightning_mixcn.data import PretrainDataModule

    return PretrainDataModule(
        [{"name": "text", "path": path}],
        tokenizer=settings["tokenizer"],
        sequence_length=settings["sequence_length"],
        micro_batch_size=MICRO_BATCH_SIZE,
        num_workers=workers,
        val_fraction=0.0,
    )


def time_tokenizer(settings: Settings) -> dict[str, float]:
    """Return tokens and seconds of `encode_batch`."""
    from lightning_mixcn.text import load_tokenizer

    tokenizer, texts = load_tokenizer(settings["tokenizer"]), list(texts_of(settings["sample"]))
    tokenizer.encode_batch(texts[: 4 * CORES])
    start = time.perf_counter()
    ids = tokenizer.encode_batch(texts)
    return {"seconds": time.perf_counter() - start, "tokens": sum(map(len, ids))}


def time_rows(settings: Settings) -> dict[str, float]:
    """Return tokens, seconds from the first batch to the last, and of all before; the cache is empty."""
    module = data_module(settings, settings["sample"], CORES)
    start = time.perf_counter()
    module.setup("fit")
    batches = iter(module.train_dataloader())
    next(batches)
    ready = time.perf_counter()
    tokens, ends = 0, (module.tokenizer.bos_id, module.tokenizer.eos_id)
    for batch in batches:
        inside = batch["document_ids"] >= 0
        for end in ends:
            inside &= batch["input_ids"] != end
        tokens += int(inside.sum())
        if tokens >= settings["tokens"]:
            break
    seconds = time.perf_counter() - ready
    module.teardown("fit")
    return {"seconds": seconds, "tokens": tokens, "start_seconds": ready - start}


def time_recipe(settings: Settings) -> dict[str, float]:
    """Return tokens and seconds of the usual script: map, map, iterate."""
    import datasets
    import torch
    import transformers

    datasets.disable_progress_bars()
    tokenizer = transformers.AutoTokenizer.from_pretrained(settings["tokenizer"])
    length = settings["sequence_length"]

    def group_texts(examples: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined = {name: list(itertools.chain(*values)) for name, values in examples.items()}
        total = len(joined["input_ids"]) // length * length
        rows = {name: [values[i : i + length] for i in range(0, total, length)] for name, values in joined.items()}
        return rows | {"labels": rows["input_ids"].copy()}

    start = time.perf_counter()
    raw = datasets.load_dataset("json", data_files=settings["sample"], split="train")
    tokenized = raw.map(
        lambda examples: tokenizer(examples["text"]), batched=True, num_proc=CORES, remove_columns=raw.column_names
    )
    grouped = tokenized.map(group_texts, batched=True, num_proc=CORES)
    collate = transformers.default_data_collator
    loader = torch.utils.data.DataLoader(grouped, batch_size=MICRO_BATCH_SIZE, shuffle=True, collate_fn=collate)
    tokens = sum(batch["input_ids"].numel() for batch in loader)
    return {"seconds": time.perf_counter() - start, "tokens": tokens}


def time_first_batch(settings: Settings, row: int) -> float:
    """Return seconds from nothing but imports to the first batch at a row of the large corpus."""
    import lightning_mixcn.data  # noqa: F401  # is not timed

    start = time.perf_counter()
    module = data_module(settings, settings["large"], CORES)
    module.setup("fit")
    if row:
        module.load_state_dict(state_at(module, row))
    next(iter(module.train_dataloader()))
    seconds = time.perf_counter() - start
    module.teardown("fit")
    return seconds


def state_at(module: Any, row: int) -> dict[str, Any]:
    """Return a state as a run has it at about that row: each stream at the document it would have come to."""
    state, streams = module.state_dict(), module.num_streams
    (documents,) = module._plan.documents
    tokens = row // streams * module.sequence_length
    bytes_a_token = 3.0
    dealt = int(tokens * bytes_a_token / (documents.num_bytes / len(documents)))
    stood = {
        stream: {
            "position": row // streams,
            "documents": [[stream + dealt * streams, 0]],
            "read": [[tokens, 0.0]],
            "served": [tokens],
            "phases": [0.0],
            "pools": [[]],
            "too_long": [[0, 0, 0]],
        }
        for stream in range(streams)
    }
    return state | {"rows": row // streams * streams, "streams": stood}


def measure_memory(settings: Settings, workers: int) -> float:
    """Return the bytes that the largest worker has after some batches, above one that has read nothing."""
    import psutil
    import torch

    import lightning_mixcn.data  # noqa: F401  # what the workers have imported, too

    def own_bytes() -> list[int]:
        return [process.memory_full_info().uss for process in psutil.Process().children()]

    idle = iter(torch.utils.data.DataLoader(range(100), num_workers=1))  # type: ignore[arg-type]
    next(idle)
    (nothing,) = own_bytes()
    del idle
    module = data_module(settings, settings["large"], workers)
    module.setup("fit")
    batches = iter(module.train_dataloader())
    for _ in range(settings["memory_batches"]):
        next(batches)
    largest = max(own_bytes())
    module.teardown("fit")
    return largest - nothing


def as_usual(start_method: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call in a spawned process, which would spawn loader workers, too, but for this."""
    multiprocessing.set_start_method(start_method, force=True)
    return function(*arguments)


def alone(function: Callable[..., Any], *arguments: Any, cache: str | None = None) -> Any:
    """Call in a new process, with a new cache folder unless one is given."""
    with tempfile.TemporaryDirectory() as fresh:
        os.environ["MIXCN_CACHE"] = os.environ["HF_HOME"] = cache or fresh
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(as_usual, multiprocessing.get_start_method(), function, *arguments).result()


def compare(settings: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Measure the three in turn; speeds in tokens per second, and ratios pair by pair."""
    rates: dict[str, list[float]] = {name: [] for name in ("tokenizer", "rows", "first_pass", "recipe")}
    for _ in range(rounds):
        tokenizer = alone(time_tokenizer, settings)
        settings["tokens"] = tokenizer["tokens"]
        rows, recipe = alone(time_rows, settings), alone(time_recipe, settings)
        rates["tokenizer"].append(tokenizer["tokens"] / tokenizer["seconds"])
        rates["rows"].append(rows["tokens"] / rows["seconds"])
        rates["first_pass"].append(rows["tokens"] / (rows["seconds"] + rows["start_seconds"]))
        rates["recipe"].append(recipe["tokens"] / recipe["seconds"])
        print({name: round(values[-1]) for name, values in rates.items()}, flush=True)

    def ratio(over: str, under: str) -> dict[str, float]:
        return record.spread([a / b for a, b in zip(rates[over], rates[under], strict=True)])

    return {
        "tokens_per_second": {name: record.spread(values) for name, values in rates.items()},
        "rows_over_tokenizer": ratio("rows", "tokenizer"),
        "first_pass_over_recipe": ratio("first_pass", "recipe"),
    }


def measure_large(settings: dict[str, Any], rounds: int, row: int, folder: str) -> dict[str, Any]:
    """Measure resuming and memory, on a corpus that is unpacked once."""
    cache = str(Path(folder, "cache"))
    unpacking = alone(time_first_batch, settings, 0, cache=cache)
    seconds: dict[str, list[float]] = {"fresh": [], "resumed": []}
    for _ in range(rounds):
        seconds["fresh"].append(alone(time_first_batch, settings, 0, cache=cache))
        seconds["resumed"].append(alone(time_first_batch, settings, row, cache=cache))
    return {
        "seconds_to_first_batch": {name: record.spread(values) for name, values in seconds.items()},
        "seconds_to_first_batch_ever": unpacking,
        "worker_bytes_above_idle": {
            f"{workers} workers": alone(measure_memory, settings, workers, cache=cache) for workers in (1, CORES)
        },
    }


def main() -> None:
    """Measure and write results/data.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--tokenizer", required=True, help="folder of a tokenizer")
    parser.add_argument("--text", required=True, nargs="+", help="JSON lines with a field text, .gz or not")
    parser.add_argument("--sequence_length", type=int, default=1024, help="tokens a row")
    parser.add_argument("--sample_megabytes", type=float, default=48, help="text of each measurement of speed")
    parser.add_argument("--large_megabytes", type=float, default=1000, help="text of the generated corpus")
    parser.add_argument("--row", type=int, default=1_000_000, help="where to resume")
    parser.add_argument("--memory_batches", type=int, default=500, help="batches read before memory is measured")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sample, large = Path(folder, "sample.jsonl"), Path(folder, "large.jsonl")
        write_texts(sample, in_turn(options.text), options.sample_megabytes)
        write_texts(large, numbered(str(sample)), options.large_megabytes)
        settings = vars(options) | {"sample": str(sample), "large": str(large), "tokens": 0}
        figures = compare(settings, options.rounds)
        figures |= measure_large(settings, options.rounds, options.row, folder)
    # No path of a machine in a result.
    names = {"tokenizer": Path(options.tokenizer).name, "text": [Path(path).name for path in options.text]}
    print(json.dumps(figures, indent=2))
    print("written to", record.write("data", {"settings": vars(options) | names | {"cores": CORES}} | figures))


if __name__ == "__main__":
    main()
