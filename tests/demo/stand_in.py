"""A stand-in for ``mixcn``, which writes what `mixcn` would, for tests of the demos."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers

from lightning_mixcn.commands.process import Usage
from lightning_mixcn.demo import run

SOURCES = {name: {"bits_per_byte": 2.5, "nll_nats_per_token": 3.0, "tokens": 9, "bytes": 9} for name in ("zh", "en")}
FACTS = {
    "parameters": {"total": 10, "trainable": 2, "quantised": 7},
    "bytes_in_memory": {"quantised": 4},
    "tokens_seen": 100,
    "tokens_per_second": 5.0,
    "validations": [{"step": 94, "sources": SOURCES}],
}


@dataclass
class Mixcn:
    """Stands for ``mixcn``."""

    calls: list[list[str]] = field(default_factory=list)
    typed: list[str] = field(default_factory=list)

    def __call__(self, arguments: list[str], typed: str, defaults: dict[str, str]) -> Usage:
        assert Path(defaults["MIXCN_CACHE"]) == Path(".cache/mixcn").absolute()
        self.calls.append(arguments)
        self.typed.append(typed)
        getattr(self, arguments[0])(arguments[1:])
        return Usage(1.0, 1_000_000_000 * len(self.calls))

    def upcycle(self, arguments: list[str]) -> None:
        assert Path(arguments[0]).read_bytes() == b"GGUF"
        out = Path(arguments[1])
        out.mkdir(exist_ok=True)
        tokenizer = Tokenizer(models.BPE({"<|endoftext|>": 0, "<|im_start|>": 1, "a": 2}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>"])
        tokenizer.save(str(out / "tokenizer.json"))
        settings = {"bos_token": "<|im_start|>", "eos_token": "<|im_start|>", "unk_token": "<|endoftext|>"}
        (out / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        (out / "config.json").write_text(json.dumps({"bos_token_id": 1, "hidden_size": 8}), encoding="utf-8")

    def quantize(self, arguments: list[str]) -> None:
        shutil.copytree(arguments[0], arguments[1], dirs_exist_ok=True)

    def validate(self, arguments: list[str]) -> None:
        (root,) = [Path(argument.partition("=")[2]) for argument in arguments if "default_root_dir" in argument]
        root.mkdir(parents=True, exist_ok=True)
        (root / "validate.json").write_text(json.dumps({"sources": SOURCES}), encoding="utf-8")

    def fit(self, arguments: list[str]) -> None:
        run.RUN.mkdir(parents=True, exist_ok=True)
        (run.RUN / "facts.json").write_text(json.dumps(FACTS), encoding="utf-8")
        sample = {"step": 0, "prompt": "你", "continuation": "好\n"}
        (run.RUN / "samples.jsonl").write_text(json.dumps(sample) + "\n", encoding="utf-8")


def fake_text(newspaper: Path, summaries: Path, encode: Callable[[list[str]], list[list[int]]], out: Path) -> None:
    assert encode(["aa"]) == [[2, 2]]
    out.mkdir(exist_ok=True)
    (out / "text.json").write_text(json.dumps({"shared_24_token_runs": 0}), encoding="utf-8")
