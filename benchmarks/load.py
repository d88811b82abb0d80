"""Loading: 16-bit weights quantised on the way, and a 4-bit folder, each beside what it cannot be faster than.

    python benchmarks/load.py                   # a random base of 1.4 GB, removed afterwards
    python benchmarks/load.py --cold            # pages are dropped from the cache before each load

`quantising`: bf16 safetensors to a model in NF4. Its limit: reading the file piece by piece into one buffer, and
bitsandbytes' quantise kernel on each piece. Beside it: transformers' loader and bitsandbytes' `replace_parameter_4bit`
on the experts. `stored`: a folder of `mixcn quantize`. Its limit: reading the file into new memory. They take turns in
one process; files are in the page cache for all of them, or with --cold for none.
"""

import argparse
import gc
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import record
import torch
from random_base import PRESETS, config_of, write_random_base

_PIECE = 2**26  # bytes that the limit reads and quantises at a time


def files_of(folder: Path) -> list[Path]:
    """Read the weights of a folder."""
    return sorted(folder.glob("*.safetensors"))


def read_and_quantise(folder: Path) -> None:
    """Read each piece and give it to bitsandbytes' kernel; only the result is thrown away."""
    buffer = torch.empty(_PIECE, dtype=torch.uint8)
    for path in files_of(folder):
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer.numpy().data):
                values = buffer[: count // 128 * 128].view(torch.bfloat16)
                torch.ops.bitsandbytes.quantize_4bit(values, 64, "nf4", torch.uint8)


def read(folder: Path) -> None:
    """Return all bytes, into new memory, file by file."""
    for path in files_of(folder):
        buffer = torch.empty(path.stat().st_size, dtype=torch.uint8).numpy().data
        filled = 0
        with path.open("rb", buffering=0) as file:
            while filled < len(buffer):
                filled += file.readinto(buffer[filled:])


def ours(folder: Path) -> None:
    """Call `load_moe`, whatever the folder holds."""
    from lightning_mixcn.model import load_moe

    load_moe(folder)


def transformers_and_bitsandbytes(folder: Path) -> None:
    """Quantise the experts alone."""
    import transformers
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for layer in model.model.layers:
        for name in ("gate_up_proj", "down_proj"):
            replace_parameter_4bit(layer.mlp.experts, name, compress_statistics=True, quant_type="nf4")


CASES: dict[str, dict[str, Callable[[Path], None]]] = {
    "quantising": {
        "ours": ours,
        "limit": read_and_quantise,
        "transformers and bitsandbytes": transformers_and_bitsandbytes,
    },
    "stored": {"ours": ours, "limit": read},
}


def set_pages(folder: Path, cold: bool) -> None:
    """Bring the folder's pages into the cache, or drop them."""
    for path in files_of(folder):
        with path.open("rb", buffering=0) as file:
            if cold:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while file.read(_PIECE):
                    pass


def measure(case: str, folder: Path, options: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Return seconds on the clock and of the processor, contestant by contestant."""
    seconds: dict[str, dict[str, list[float]]] = {name: {"clock": [], "cpu": []} for name in CASES[case]}
    for number in range(1 + options.rounds):
        for name, load in CASES[case].items():
            set_pages(folder, options.cold)
            clock, cpu = time.perf_counter(), time.process_time()
            load(folder)
            taken = {"clock": time.perf_counter() - clock, "cpu": time.process_time() - cpu}
            gc.collect()
            for kind, value in taken.items() if number else ():  # the first round warms up
                seconds[name][kind].append(value)
    return seconds


def report(case: str, size: int, seconds: dict[str, dict[str, list[float]]]) -> dict[str, object]:
    """Print one case; gives what is recorded of it."""
    print(f"{case}: {size / 1e9:.2f} GB of files")
    rates = {name: record.spread([size / 1e9 / value for value in kinds["clock"]]) for name, kinds in seconds.items()}
    for name, rate in rates.items():
        print(f"  {name:30} {rate['median']:.2f} GB/s ({rate['min']:.2f} to {rate['max']:.2f})")
    pairs = {
        kind: record.spread([a / b for a, b in zip(seconds["limit"][kind], seconds["ours"][kind], strict=True)])
        for kind in ("clock", "cpu")
    }
    print(
        f"  ours / limit, pair by pair: {pairs['clock']['median']:.2f}, by processor time {pairs['cpu']['median']:.2f}"
    )
    return {"bytes": size, "gigabytes_per_second": rates, "share_of_limit": pairs["clock"], "by_cpu_time": pairs["cpu"]}


def main() -> None:
    """Measure and write results/load.json."""
    from lightning_mixcn.model.convert.quantize import quantize

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--preset", choices=list(PRESETS), default="load", help="sizes of the random base")
    parser.add_argument("--rounds", type=int, default=5, help="timed loads of each, after one that is not")
    parser.add_argument("--cold", action="store_true", help="drop the files from the page cache before each load")
    parser.add_argument("--result", default="load", help="name of the JSON under benchmarks/results")
    options, figures = parser.parse_args(), {}
    with tempfile.TemporaryDirectory() as temporary:
        folders = {"quantising": Path(temporary) / "base", "stored": Path(temporary) / "stored"}
        write_random_base(config_of(options.preset), folders["quantising"])
        quantize(str(folders["quantising"]), str(folders["stored"]))
        for case, folder in folders.items():
            size = sum(path.stat().st_size for path in files_of(folder))
            figures[case] = report(case, size, measure(case, folder, options))
    print("written to", record.write(options.result, {"settings": vars(options), "cases": figures}))


if __name__ == "__main__":
    main()
