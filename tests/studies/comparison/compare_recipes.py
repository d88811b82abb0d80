"""Recipes for a tiny base, which tests of `mixcn compare` share, and the command run in this process."""

import contextlib
import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_mixcn.cli import main
from lightning_mixcn.commands import process as commands
from lightning_mixcn.commands.process import CommandFailed, Usage
from tests.extended_tokenizers import CYRILLIC, HAN, TALES

WORDS = {"zh": "".join(HAN), "ru": " ".join(CYRILLIC)}

CONFIG = """
model:
  class_path: PretrainModule
  init_args:
    dtype: float32
    train_embeddings: true
    activation_checkpointing: none
    lora: {r: 2, lora_alpha: 4, target_modules: [q_proj, gate, w1, w2, w3]}
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1.0e-2}}
data:
  class_path: PretrainDataModule
  init_args:
    sequence_length: 64
    micro_batch_size: 2
    num_streams: 2
    num_workers: 0
    weight_unit: bytes
trainer:
  accelerator: cpu
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  num_sanity_val_steps: 0
  callbacks: [{class_path: RunFacts}, {class_path: StepCheckpoint, init_args: {every_n_steps: 2}}]
"""


def write_study(folder: Path, base: Path, language: str = "zh", **changes: Any) -> Path:
    """Text, configuration and recipe of a vocabulary study.

    Args:
        folder: Where to write them.
        base: A tiny Mixtral.
        language: Of the text beside English, ``zh`` or ``ru``.
        changes: Other values of the recipe; ``None`` leaves a key out.

    Returns:
        The recipe.
    """
    for name, texts in ((language, [WORDS[language][start:] * 2 for start in range(30)]), ("en", TALES * 5)):
        lines = [json.dumps({"text": f"{text} {number}"}) for number, text in enumerate(texts)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    config = yaml.safe_load(CONFIG)
    config["model"]["init_args"]["base"] = str(base)
    sources = [{"name": name, "path": str(folder / f"{name}.jsonl")} for name in (language, "en")]
    config["data"]["init_args"] |= {"sources": sources, "val_sources": sources, "max_eval_rows": None}
    (folder / "run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    pieces = "{prepared}/pieces.model"
    train = ["vocab", "train", str(folder / f"{language}.jsonl"), "--out", pieces, "--vocab_size", 130]
    merge = ["vocab", "merge", str(base), pieces, "--out", "{prepared}/longer"]
    recipe: dict[str, Any] = {
        "config": "run.yaml",
        "title": "Vocabulary",
        "text_bytes": 800,
        "validations": 2,
        "arms": {"base": {}, "longer": {"model.init_args.tokenizer": "{prepared}/longer"}},
        "prepare": {
            "pieces.model": train,
            "longer": [*merge, "--script", {"zh": "Han", "ru": "Cyrillic"}[language]],
        },
    }
    recipe = {name: value for name, value in (recipe | changes).items() if value is not None}
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe, allow_unicode=True, sort_keys=False), encoding="utf-8")
    return file


class InThisProcess:
    """Stands for processes of their own, which take seconds to start; everything else is real.

    Args:
        dies_in: Number of the command, from 0, in which the study is killed, before it begins.
    """

    def __init__(self, dies_in: int | None = None) -> None:
        self.ran: list[str] = []
        self.dies_in = dies_in

    def run_mixcn(self, arguments: Sequence[str], inherited: Sequence[int] = ()) -> Usage:
        assert inherited
        if len(self.ran) == self.dies_in:
            raise KeyboardInterrupt
        self.ran.append(arguments[0])
        if main(list(arguments)) != 0:
            raise CommandFailed("the reason is above")
        return Usage(1.0, 1)

    def output_of_mixcn(self, arguments: Sequence[str]) -> str:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = main(list(arguments))
            except SystemExit as end:
                code = int(end.code or 0)
        if code != 0:
            raise CommandFailed(err.getvalue().splitlines()[-1].removeprefix("mixcn: error: "))
        return out.getvalue()

    def patch(self, monkeypatch: Any) -> None:
        monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
        for name in ("run_mixcn", "output_of_mixcn"):
            monkeypatch.setattr(commands, name, getattr(self, name))


def run_in_this_process() -> None:
    """Let this process run all of a study's commands, for good."""
    InThisProcess().patch(pytest.MonkeyPatch())


def lines_of(file: Path) -> list[dict[str, str]]:
    """Read a CSV file."""
    with file.open(encoding="utf-8", newline="") as opened:
        return list(csv.DictReader(opened))
