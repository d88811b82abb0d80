"""Chosen and rejected answers of a run of preference optimisation: what each side asks of the experts."""

import csv
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger

from lightning_mixcn.callbacks import ExpertLoadMonitor
from lightning_mixcn.data import PreferenceDataModule
from lightning_mixcn.text import PreferenceSource
from tests.modules.preference.preference_run import module
from tests.text.pair_files import pair_records, write_records


class Batches(Callback):
    """Keeps what is trained on."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(batch)


def recount(base: Path, batches: list[dict[str, torch.Tensor]]) -> Counter[tuple[str, int, int]]:
    """Count side, layer and expert with transformers, an answer with its prompt at a time."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    counts: Counter[tuple[str, int, int]] = Counter()
    for batch in batches:
        for row, documents in enumerate(batch["document_ids"]):
            for document in range(int(documents.max()) + 1):
                own = documents == document
                name = {1: "chosen", -1: "rejected"}[int(batch["sides"][row][own][0])]
                with torch.no_grad():
                    logits = model(batch["input_ids"][row][own][None], output_router_logits=True).router_logits
                sides = [name if label >= 0 else "other" for label in batch["labels"][row][own].tolist()]
                for layer, logits_TE in enumerate(logits):
                    for side, chosen in zip(sides, logits_TE.topk(2).indices.tolist(), strict=True):
                        counts.update((side, layer, expert) for expert in chosen)
    return counts


def run(base: Path, out: Path, name: str = "zh") -> tuple[Batches, CSVLogger]:
    """Train for two steps that change nothing; the reference's own pass, of the same length, is not to be counted."""
    seen, logger = Batches(), CSVLogger(out, name="logs")
    trainer = Trainer(
        accelerator="cpu", max_steps=2, logger=logger, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, default_root_dir=out,
        callbacks=[seen, ExpertLoadMonitor(every_n_steps=2, all_numbers=True)],
        num_sanity_val_steps=0, val_check_interval=2, check_val_every_n_epoch=None, log_every_n_steps=1,
    )  # fmt: skip
    data = PreferenceDataModule(
        [PreferenceSource(name, write_records(out / "zh.jsonl", pair_records(40)))], sequence_length=192,
        micro_batch_size=2, num_streams=4, num_workers=0, val_fraction=0.1, tokenizer=str(base),
    )  # fmt: skip
    still: dict[str, Any] = {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.0)}
    trainer.fit(module(str(base), quantization="none", **still), data)
    return seen, logger


def test_counts_are_those_of_transformers(tmp_path: Path, tiny_base: Path) -> None:
    seen, logger = run(tiny_base, tmp_path)
    found: Counter[tuple[str, int, int]] = Counter()
    with (tmp_path / "experts.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            source, _, side = row["source"].partition("/")
            assert source == "zh"
            if row["stage"] == "train":
                found[side, int(row["layer"]), int(row["expert"])] += int(row["tokens"])
    assert +found == recount(tiny_base, seen.seen)
    logger.save()
    header = Path(logger.log_dir, "metrics.csv").read_text(encoding="utf-8").splitlines()[0].split(",")
    for prefix in ("experts", "experts/val"):
        figures = {f"{prefix}/{side}/imbalance_max_over_mean" for side in ("chosen", "rejected", "zh")}
        assert figures | {f"{prefix}/side_divergence_bits"} < {*header}


def test_a_source_named_as_a_side_is_refused(tmp_path: Path, tiny_base: Path) -> None:
    with pytest.raises(ValueError, match="A source is named 'chosen', as a side of the pairs is under `experts/`"):
        run(tiny_base, tmp_path, "chosen")
