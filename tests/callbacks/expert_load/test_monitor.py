"""What the monitor counts in real runs, against transformers' own router logits on each document alone."""

import csv
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from peft import LoraConfig
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]  # published without types
    EventAccumulator,
)

from lightning_mixcn import build_mixtral
from lightning_mixcn.callbacks import ExpertLoadMonitor, SampleText, StepCheckpoint
from lightning_mixcn.model.experts.block import Router
from lightning_mixcn.modules import PretrainModule
from lightning_mixcn.testing import FixedBatches, random_batch, save_tiny_model, tiny_mixtral_config

Make = Callable[..., Any]
Key = tuple[str, str, int, int]  # stage, source, layer, expert
Batch = dict[str, torch.Tensor]
SOURCES = ["zh", "en"]

pytestmark = [
    # Fixed batches are no resumable stream: a resumed run begins with the first one again.
    pytest.mark.filterwarnings(
        "ignore:You're resuming from a checkpoint that ended before the epoch ended:UserWarning"
    ),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create:UserWarning"),
]


def packed_batch(seed: int) -> Batch:
    """Two rows of a Chinese and an English document each, and padding after them."""
    batch = random_batch([24, 24], seed=seed)
    for row, (zh, end) in enumerate([(10 + seed, 20), (5, 24 - seed)]):
        batch["document_ids"][row, zh:end], batch["source_ids"][row, zh:end] = 1, 1
        batch["document_ids"][row, end:], batch["source_ids"][row, end:] = -1, -1
        batch["position_ids"][row] = torch.cat((torch.arange(zh), torch.arange(end - zh), torch.arange(24 - end)))
        batch["labels"][row, zh] = batch["labels"][row, end:] = -100
    batch["text_mask"] &= batch["labels"] != -100
    return batch


BATCHES = [packed_batch(seed) for seed in range(6)]


def recount(base: Path, batches: Iterable[Batch], stage: str = "train") -> Counter[Key]:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    counts: Counter[Key] = Counter()
    for batch in batches:
        for row, documents in enumerate(batch["document_ids"]):
            for document in range(int(documents.max()) + 1):
                inside = documents == document
                source = SOURCES[int(batch["source_ids"][row][inside][0])]
                with torch.no_grad():
                    logits = model(batch["input_ids"][row][inside][None], output_router_logits=True).router_logits
                for layer, logits_TE in enumerate(logits):
                    chosen = logits_TE.topk(model.config.num_experts_per_tok).indices.flatten().tolist()
                    counts.update((stage, source, layer, expert) for expert in chosen)
    return counts


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "experts.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def counted(folder: Path, **where: Any) -> Counter[Key]:
    counts: Counter[Key] = Counter()
    for row in rows(folder):
        if all(row[name] == str(value) for name, value in where.items()):
            counts[row["stage"], row["source"], int(row["layer"]), int(row["expert"])] += int(row["tokens"])
    return +counts


def still(base: Path, **changes: Any) -> PretrainModule:
    """Make a module whose steps change nothing, so that it stays the base, whose counts are known."""
    lora = LoraConfig(r=2, target_modules=["q_proj", "gate", "w1", "w2", "w3"])
    settings: dict[str, Any] = {"quantization": "none", "dtype": "float32", "lora": lora}
    settings["optimizer"] = lambda parameters: torch.optim.SGD(parameters, lr=0.0)
    return PretrainModule(str(base), **(settings | changes))


@pytest.mark.parametrize(
    ("mode", "accumulation"), [("none", 4), ("selective", 1), ("full", 1), ("full", 4)], ids=lambda value: str(value)
)
def test_counts_are_those_of_transformers(
    mode: str, accumulation: int, tmp_path: Path, tiny_base: Path, trainer: Make
) -> None:
    """Packed rows, a validation after each step, one before the first, and samples of the model's own text."""
    callbacks = [SampleText(["ab"], every_n_steps=1, max_new_tokens=2), ExpertLoadMonitor(every_n_steps=1)]
    run = trainer(
        max_steps=2,
        max_epochs=-1,
        accumulate_grad_batches=accumulation,
        val_check_interval=accumulation,
        check_val_every_n_epoch=None,
        limit_val_batches=2,
        num_sanity_val_steps=1,
        callbacks=callbacks,
    )
    run.fit(still(tiny_base, activation_checkpointing=mode), FixedBatches(BATCHES * 2, SOURCES))
    for step in (1, 2):
        seen = [BATCHES[index % 6] for index in range((step - 1) * accumulation, step * accumulation)]
        assert counted(tmp_path, step=step, stage="train") == recount(tiny_base, seen)
        assert counted(tmp_path, step=step, stage="val") == recount(tiny_base, BATCHES[:2], "val")
    assert counted(tmp_path, step=0, stage="base") == recount(tiny_base, BATCHES[:1], "base")
    assert {(row["step"], row["stage"]) for row in rows(tmp_path)} == {
        ("0", "base"), ("1", "train"), ("2", "train"), ("1", "val"), ("2", "val"),
    }  # fmt: skip


class Collapse(Callback):
    """Makes every router choose the same experts for each token, once the check before training is over."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for module in pl_module.modules():
            if isinstance(module, Router):
                for parameter in module.parameters():
                    torch.nn.init.zeros_(parameter)


def entropy_of(counts: Counter[Key], stage: str, source: str) -> list[float]:
    """Compute the entropy of each layer's shares over log E, with numpy."""
    table = np.array([[counts[stage, source, layer, expert] for expert in range(4)] for layer in (0, 1)])
    parts = table / table.sum(1, keepdims=True)
    return [-sum(float(p) * math.log(p, 4) for p in row if p) for row in parts]


def test_a_planted_collapse_is_seen_beside_the_base(tmp_path: Path, tiny_base: Path, trainer: Make) -> None:
    logger = TensorBoardLogger(tmp_path, name="log", version="")
    monitor = ExpertLoadMonitor(every_n_steps=1, all_numbers=True, per_layer=True)
    settings = {"max_epochs": -1, "val_check_interval": 2, "check_val_every_n_epoch": None}
    settings |= {"limit_val_batches": 2, "num_sanity_val_steps": -1}
    run = trainer(max_steps=2, callbacks=[monitor, Collapse()], logger=logger, log_every_n_steps=1, **settings)
    run.fit(still(tiny_base), FixedBatches(BATCHES, SOURCES))
    base, now = (counted(tmp_path, stage=stage) for stage in ("base", "val"))
    assert base == recount(tiny_base, BATCHES[:2], "base")
    kept = monitor.state_dict()["base_entropy"]
    events = EventAccumulator(str(tmp_path / "log"), {"scalars": 0, "images": 0}).Reload()
    for source in SOURCES:
        assert kept[source].tolist() == pytest.approx(entropy_of(base, "base", source))
        assert min(entropy_of(base, "base", source)) > 0.8
        assert entropy_of(now, "val", source) == pytest.approx([0.5, 0.5])  # two of four experts have all tokens
        for name in ("routing_entropy", "routing_entropy_worst_layer"):
            assert events.Scalars(f"experts/val/{source}/{name}")[-1].value == pytest.approx(0.5)
    assert events.Scalars("experts/val/layer_01/routing_entropy")[-1].value == pytest.approx(0.5)
    assert "experts/val/routing_entropy_by_layer" in events.Tags()["images"]
    # TensorBoard shows a tag once, as what it was first.
    assert not {*events.Tags()["images"]} & {*events.Tags()["scalars"]}


@pytest.mark.filterwarnings("ignore:Experts have starved:UserWarning")
@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe"])
def test_64_experts(family: str, tmp_path: Path, trainer: Make) -> None:
    """Their counts and numbers; tags and a heatmap as few and as small as of a few experts."""
    base = save_tiny_model(tmp_path / "base", family, num_experts=64, num_experts_per_tok=8)
    monitor = ExpertLoadMonitor(every_n_steps=1, all_numbers=True, per_layer=True, starving_steps=1)
    run = trainer(max_steps=1, callbacks=[monitor], logger=tensorboard(tmp_path), log_every_n_steps=1)
    run.fit(still(base), FixedBatches(BATCHES[:1], SOURCES))
    expected = recount(base, BATCHES[:1])
    assert counted(tmp_path) == expected
    of_layer = [[sum(expected["train", name, layer, e] for name in SOURCES) for e in range(64)] for layer in (0, 1)]
    tokens = int((BATCHES[0]["document_ids"] >= 0).sum())
    assert [sum(counts) for counts in of_layer] == [8 * tokens] * 2
    ((_, dead),) = scalars(tmp_path, "experts/dead_expert_fraction")
    assert dead == pytest.approx(sum(counts.count(0) for counts in of_layer) / 128)
    parts = [[count / (8 * tokens) for count in counts if count] for counts in of_layer]
    entropies = [-sum(part * math.log(part) for part in layer) for layer in parts]
    ((_, effective),) = scalars(tmp_path, "experts/effective_experts")
    assert effective == pytest.approx(sum(map(math.exp, entropies)) / 2, rel=1e-5)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert len([tag for tag in events.Tags()["scalars"] if tag.startswith("experts/")]) < 100
    assert all(event.width < 2500 for event in events.Images("experts/load"))


class WithReference(PretrainModule):
    """Holds a second Mixtral, which runs in no batch."""

    def configure_model(self) -> None:
        super().configure_model()
        self.reference = build_mixtral(tiny_mixtral_config()).train()


def test_another_model_of_the_module_is_not_counted(tmp_path: Path, tiny_base: Path, trainer: Make) -> None:
    module = WithReference(
        str(tiny_base), quantization="none", dtype="float32", lora=LoraConfig(r=2, target_modules=["q_proj"])
    )
    run = trainer(max_steps=1, callbacks=[ExpertLoadMonitor(every_n_steps=1)])
    run.fit(module, FixedBatches(BATCHES[:1], SOURCES))
    assert counted(tmp_path, stage="train") == recount(tiny_base, BATCHES[:1])


def tensorboard(tmp_path: Path) -> TensorBoardLogger:
    return TensorBoardLogger(str(tmp_path), name="tensorboard", version="")


def scalars(tmp_path: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


@pytest.fixture
def planted_base(tmp_path: Path, tiny_base: Path) -> Path:
    """Tokens below 128 go to expert 0, the others to expert 1, in every layer; one expert a token."""
    from lightning_mixcn.testing import save_tiny_mixtral

    base = save_tiny_mixtral(tmp_path / "planted", num_experts_per_tok=1)
    model: Any = transformers.MixtralForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
        # So long that what attention and experts add does not turn it.
        model.model.embed_tokens.weight[:128, 0] = model.model.embed_tokens.weight[128:, 1] = 1e4
        for layer in model.model.layers:
            layer.mlp.gate.weight.copy_(torch.eye(*layer.mlp.gate.weight.shape))
    model.save_pretrained(base)
    return base


def test_sources_that_use_other_experts_are_seen(tmp_path: Path, planted_base: Path, trainer: Make) -> None:
    batch = random_batch([24, 16], sources=2)
    batch["input_ids"] = torch.where(batch["source_ids"] == 1, 200, 100)
    monitor = ExpertLoadMonitor(every_n_steps=1, all_numbers=True, per_layer=True)
    run = trainer(max_steps=1, callbacks=[monitor], logger=tensorboard(tmp_path), log_every_n_steps=1)
    run.fit(still(planted_base), FixedBatches([batch], SOURCES))
    assert counted(tmp_path) == {
        ("train", source, layer, expert): tokens
        for expert, (source, tokens) in enumerate({"zh": 24, "en": 16}.items())
        for layer in (0, 1)
    }
    expected = {
        "experts/source_divergence_bits": 1.0,
        "experts/source_divergence_bits_largest_layer": 1.0,
        "experts/layer_01/source_divergence_bits": 1.0,
        "experts/layer_01/share_0": 0.6,
        "experts/layer_01/share_3": 0.0,
        "experts/imbalance_max_over_mean": 2.4,
        "experts/dead_expert_fraction": 0.5,
        "experts/zh/effective_experts": 1.0,
        "experts/zh/imbalance_max_over_mean_worst_layer": 4.0,
        "experts/drift_bits": 0.0,
    }
    for tag, value in expected.items():
        ((step, logged),) = scalars(tmp_path, tag)
        assert step == 0
        assert logged == pytest.approx(value, abs=1e-6), tag


def test_what_tensorboard_shows(tmp_path: Path, module: PretrainModule, trainer: Make) -> None:
    settings = {"max_steps": 5, "limit_val_batches": 1, "val_check_interval": 4, "logger": tensorboard(tmp_path)}
    monitor = ExpertLoadMonitor(every_n_steps=2, figure_every_n_steps=4, all_numbers=True, position_boundaries=[8])
    run = trainer(callbacks=[monitor], log_every_n_steps=1, **settings)
    run.fit(module, FixedBatches(BATCHES, SOURCES))
    tags = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Tags()
    named = {tag for tag in tags["scalars"] if tag.startswith("experts/")}
    numbers = {
        *("imbalance_max_over_mean", "coefficient_of_variation", "dead_expert_fraction", "effective_experts"),
        *("smallest_share", "router_entropy_nats", "router_confidence"),
    }
    tables = ["experts", "experts/zh", "experts/en", "experts/position_from_0", "experts/position_from_8"]
    assert {f"{table}/{number}" for table in tables for number in numbers} <= named
    assert {"experts/val/zh/effective_experts", "experts/drift_bits", "experts/val/source_divergence_bits"} <= named
    assert not [tag for tag in named if "layer_0" in tag]
    # Steps are numbered from 0, as in Lightning's own tags; the last log is of the last step alone.
    assert [step for step, _ in scalars(tmp_path, "experts/effective_experts")] == [1, 3, 4]
    assert [step for step, _ in scalars(tmp_path, "experts/val/effective_experts")] == [3]
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0}).Reload()
    # A figure is of the step in its title.
    assert [event.step for event in events.Images("experts/load")] == [2, 5]
    assert [event.step for event in events.Images("experts/val/load")] == [4]
    assert all(event.width > 100 and event.height > 100 for event in events.Images("experts/load"))
    by_position = {int(row["position_from"]) for row in rows(tmp_path)}
    assert by_position == {0, 8}


def test_heatmaps_beside_a_logger_of_numbers(tmp_path: Path, module: PretrainModule, trainer: Make) -> None:
    settings = {"max_steps": 2, "limit_val_batches": 1, "val_check_interval": 2, "logger": CSVLogger(str(tmp_path))}
    run = trainer(callbacks=[ExpertLoadMonitor(every_n_steps=1)], log_every_n_steps=1, **settings)
    run.fit(module, FixedBatches(BATCHES[:2], SOURCES))
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        "experts_load_step_00000001.png",
        *(f"experts_val_{name}_step_00000002.png" for name in ("load", "routing_entropy_by_layer")),
    }


def test_five_numbers_unless_more_are_asked_for(tmp_path: Path, module: PretrainModule, trainer: Make) -> None:
    settings = {"max_steps": 2, "limit_val_batches": 1, "val_check_interval": 2, "logger": tensorboard(tmp_path)}
    run = trainer(callbacks=[ExpertLoadMonitor(every_n_steps=1)], log_every_n_steps=1, **settings)
    run.fit(module, FixedBatches(BATCHES[:2], SOURCES))
    tags = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Tags()
    five = (
        "imbalance_max_over_mean", "dead_expert_fraction", "routing_entropy", "source_divergence_bits", "drift_bits",
    )  # fmt: skip
    assert {tag for tag in tags["scalars"] if tag.startswith("experts/")} == {
        f"{prefix}/{name}" for prefix in ("experts", "experts/val") for name in five
    }
    assert {row["source"] for row in rows(tmp_path)} == {*SOURCES}  # the file has all


def test_layers_and_positions_that_are_asked_for(tmp_path: Path, module: PretrainModule, trainer: Make) -> None:
    monitor = ExpertLoadMonitor(every_n_steps=1, per_layer=True, position_boundaries=[8])
    settings = {"max_steps": 1, "limit_val_batches": 0, "logger": tensorboard(tmp_path)}
    trainer(callbacks=[monitor], log_every_n_steps=1, **settings).fit(module, FixedBatches(BATCHES[:1], SOURCES))
    tags = {*EventAccumulator(str(tmp_path / "tensorboard")).Reload().Tags()["scalars"]}
    assert {"experts/layer_01/effective_experts", "experts/layer_01/share_0"} < tags
    assert "experts/position_from_8/dead_expert_fraction" in tags
    assert not {"experts/effective_experts", "experts/position_from_8/effective_experts"} & tags
    assert not [tag for tag in tags if tag.startswith("experts/zh/")]


def test_a_run_resumed_inside_a_window_counts_every_token_once(tmp_path: Path, tiny_base: Path, trainer: Make) -> None:
    """The checkpoint of step 3 is inside the window of steps 3 and 4, and the first run goes on to write more."""
    folder = tmp_path / "checkpoints"

    def fit(steps: int, **options: Any) -> None:
        callbacks = [ExpertLoadMonitor(every_n_steps=2), StepCheckpoint(1, keep=9, dirpath=str(folder))]
        settings = {"max_epochs": -1, "limit_val_batches": 1, "val_check_interval": 3, "check_val_every_n_epoch": None}
        run = trainer(max_steps=steps, enable_checkpointing=True, callbacks=callbacks, **settings)
        run.fit(still(tiny_base), FixedBatches(BATCHES, SOURCES), **options)

    fit(5)
    with (tmp_path / "experts.csv").open("a", encoding="utf-8") as file:
        file.write("5,train,z")  # as a kill leaves it
    whole = {step: counted(tmp_path, step=step, stage="val") for step in (3,)}
    fit(6, ckpt_path=str(folder / "step=00000003.ckpt"))
    # The resumed run begins with batch 0 again.
    windows = {2: [0, 1], 4: [2, 0], 6: [1, 2]}
    for step, window in windows.items():
        assert counted(tmp_path, step=step, stage="train") == recount(tiny_base, [BATCHES[index] for index in window])
    assert {row["step"] for row in rows(tmp_path) if row["stage"] == "train"} == {"2", "4", "6"}
    assert counted(tmp_path, step=3, stage="val") == whole[3] == recount(tiny_base, BATCHES[:1], "val")
    state = torch.load(folder / "step=00000006.ckpt", weights_only=True)["callbacks"]["ExpertLoadMonitor"]
    first = counted(tmp_path, step=2, stage="train")
    shares = [
        [sum(first["train", source, layer, expert] for source in SOURCES) for expert in range(4)] for layer in (0, 1)
    ]
    assert state["base_shares"].tolist() == [pytest.approx([count / sum(row) for count in row]) for row in shares]


def test_starving_experts_are_named(tmp_path: Path, planted_base: Path, trainer: Make) -> None:
    batch = random_batch([24])
    monitor = ExpertLoadMonitor(every_n_steps=2, starving_steps=3)
    run = trainer(max_steps=6, max_epochs=-1, callbacks=[monitor])
    batch["input_ids"] = torch.full_like(batch["input_ids"], 100)
    with pytest.warns(UserWarning, match="layer 0: 1, 2, 3; layer 1: 1, 2, 3") as warned:
        run.fit(still(planted_base), FixedBatches([batch]))
    assert len([one for one in warned if "starved" in str(one.message)]) == 1
    assert monitor.state_dict()["starving"]["steps"].tolist() == [[0, 6, 6, 6]] * 2


PROGRAM = """
import os, sys
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader
from lightning_mixcn import build_mixtral
from lightning_mixcn.callbacks import ExpertLoadMonitor, StepCheckpoint
from lightning_mixcn.modules import PretrainModule
from lightning_mixcn.testing import FixedBatches
from peft import LoraConfig

base, out, rank = sys.argv[1], sys.argv[2], int(os.environ["LOCAL_RANK"])
torch.distributed.init_process_group("gloo", init_method=f"file://{out}/meet", rank=rank, world_size=2)

class Shared(FixedBatches):
    def _loader(self):
        return DataLoader(self.batches[rank::2], batch_size=None)
    train_dataloader = val_dataloader = _loader

module = PretrainModule(
    base, quantization="none", dtype="float32", lora=LoraConfig(r=2, target_modules=["gate", "w1"]),
    optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0), activation_checkpointing="full",
)
trainer = Trainer(
    accelerator="cpu", devices=2, strategy="ddp", max_steps=3, use_distributed_sampler=False, logger=False,
    enable_progress_bar=False, enable_model_summary=False, default_root_dir=out, num_sanity_val_steps=2,
    callbacks=[ExpertLoadMonitor(every_n_steps=2), StepCheckpoint(1, keep=3, dirpath=out)],
)
trainer.fit(module, Shared(torch.load(f"{out}/batches.pt"), ["zh", "en"]))
torch.distributed.destroy_process_group()
"""


@pytest.mark.multiprocess
def test_two_ranks_are_added_up(tmp_path: Path, tiny_base: Path) -> None:
    torch.save(BATCHES, tmp_path / "batches.pt")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(tiny_base), str(tmp_path)],
            env=os.environ | {"LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    for process in processes:
        _, error = process.communicate(timeout=240)
        assert process.returncode == 0, error
    assert counted(tmp_path, step=2) == recount(tiny_base, BATCHES[:4])
    assert counted(tmp_path, step=3, stage="train") == recount(tiny_base, BATCHES[4:])
    assert counted(tmp_path, step=3, stage="val") == recount(tiny_base, BATCHES, "val")
    state = torch.load(tmp_path / "step=00000001.ckpt", weights_only=True)["callbacks"]["ExpertLoadMonitor"]
    assert int(state["window"]["sums"][0].sum()) == recount(tiny_base, BATCHES[:2]).total()
