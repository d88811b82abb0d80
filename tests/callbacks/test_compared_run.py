"""The same bytes for every tokenizer, in real fits of a tiny model."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.profilers import PassThroughProfiler
from peft import LoraConfig
from torch import Tensor, nn

from lightning_mixcn.callbacks import ByteBudget, RunFacts, StepCheckpoint
from lightning_mixcn.callbacks.compared_run import FACTS_FILE, piece_bytes
from lightning_mixcn.commands.process import peak_resident_bytes
from lightning_mixcn.data import PretrainDataModule
from lightning_mixcn.modules import PretrainModule
from lightning_mixcn.testing import FixedBatches, random_batch
from lightning_mixcn.text import Source, load_tokenizer
from tests.extended_tokenizers import HAN, TALES, extend

BUDGET, ROW_TOKENS, ROWS_A_STEP = 4_000, 64, 4


@pytest.fixture(scope="module")
def extended(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return extend(tiny_base, tmp_path_factory.mktemp("extended") / "tokenizer", HAN, 160)


@pytest.fixture
def data(tmp_path: Path) -> Callable[..., PretrainDataModule]:
    for name, texts in (("zh", ["".join(HAN[start:] + HAN) for start in range(20)]), ("en", [*TALES])):
        lines = (json.dumps({"text": text}) for text in texts * 2)
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")

    def make(tokenizer: Path, max_epochs: int | None = None) -> PretrainDataModule:
        sources = [Source(name, str(tmp_path / f"{name}.jsonl"), max_epochs=max_epochs) for name in ("zh", "en")]
        return PretrainDataModule(
            sources, val_sources=sources, sequence_length=ROW_TOKENS, micro_batch_size=2, num_streams=4, num_workers=0,
            max_eval_rows=2, tokenizer=str(tokenizer), weight_unit="bytes",
        )  # fmt: skip

    return make


def model(base: Path, tokenizer: Path) -> PretrainModule:
    lora = LoraConfig(r=2, target_modules=["q_proj", "w1", "w2", "w3"])
    return PretrainModule(str(base), dtype="float32", tokenizer=str(tokenizer), train_embeddings=True, lora=lora)


class Killed(Exception):  # noqa: N818  # reads as what happened
    """Ends a run in the middle."""


class Rates(Callback):
    """Keeps the learning rate of each step.

    Args:
        kill_in: Step in which the run ends, as by a kill.
        validating: Kill in the validation after so many steps instead.
    """

    def __init__(self, kill_in: int | None = None, validating: bool = False) -> None:
        self.rates: list[float] = []
        self._kill_in, self._validating = kill_in, validating

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._validating and trainer.global_step == self._kill_in:
            raise Killed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == len(self.rates):
            self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        if trainer.global_step == self._kill_in and not self._validating:
            raise Killed


def run(
    folder: Path, trainer: Callable[..., Trainer], budget: ByteBudget, *others: Callback, **changes: Any
) -> Trainer:
    settings: dict[str, Any] = {
        "callbacks": [budget, RunFacts(), *others], "default_root_dir": folder, "accumulate_grad_batches": 2,
        "limit_val_batches": 1.0, "num_sanity_val_steps": 0, "max_epochs": -1, "max_steps": 1_000_000,
        "use_distributed_sampler": False,
    }  # fmt: skip
    return trainer(**(settings | changes))


def facts(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    return found


def test_two_tokenizers_see_the_same_bytes(
    tmp_path: Path, tiny_base: Path, extended: Path, data: Callable[..., PretrainDataModule], trainer: Any
) -> None:
    found = {}
    for tokenizer in (tiny_base, extended):
        folder, watch = tmp_path / tokenizer.name, Rates()
        fit = run(folder, trainer, ByteBudget(BUDGET, validations=3), watch)
        fit.fit(model(tiny_base, tokenizer), data(tokenizer))
        found[tokenizer.name] = facts(folder)
        of_run = found[tokenizer.name]
        assert of_run["steps"] == of_run["planned_steps"] == fit.max_steps == len(watch.rates)
        bytes_a_step = of_run["text_bytes_seen"] / of_run["steps"]
        assert abs(of_run["text_bytes_seen"] - BUDGET) < 0.75 * bytes_a_step
        due = [round(of_run["steps"] * part / 3) for part in (1, 2, 3)]
        assert [validation["step"] for validation in of_run["validations"]] == due
        # Half a cosine over the steps that the budget gives: the last but one rate is just above a tenth of the peak.
        assert watch.rates[-1] == pytest.approx(0.1e-4, rel=0.35)
        assert max(watch.rates) == pytest.approx(1e-4, rel=0.05)
    base, longer = found[tiny_base.name], found[extended.name]
    assert longer["steps"] < 0.8 * base["steps"]
    assert longer["tokens_seen"] == longer["steps"] * ROWS_A_STEP * ROW_TOKENS
    # Validation is of the same text, too.
    sizes = [
        {name: likelihood["bytes"] for name, likelihood in each["validations"][-1]["sources"].items()}
        for each in (base, longer)
    ]
    assert sizes[0].keys() == sizes[1].keys() == {"zh", "en"}


# Lightning says so of every resumed run; `mixcn` does not let it.
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")
@pytest.mark.parametrize("validating", [False, True])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    validating: bool, tmp_path: Path, tiny_base: Path, extended: Path, data: Callable[..., PretrainDataModule],
    trainer: Any,
) -> None:  # fmt: skip
    def fit(folder: Path, kill_in: int | None) -> Any:
        checkpoints = StepCheckpoint(every_n_steps=2, dirpath=str(folder / "checkpoints"))
        callbacks = checkpoints, Rates(kill_in, validating)
        fitting = run(folder, trainer, ByteBudget(BUDGET, validations=3), *callbacks, enable_checkpointing=True)
        last = folder / "checkpoints" / "last.ckpt"
        fitting.fit(model(tiny_base, extended), data(extended), ckpt_path=last if last.exists() else None)
        return torch.load(last, weights_only=True)

    whole = fit(tmp_path / "whole", None)
    with pytest.raises(Killed):
        fit(tmp_path / "killed", 6)
    killed = fit(tmp_path / "killed", None)
    assert whole["global_step"] == killed["global_step"] > 6
    assert all(torch.equal(value, killed["state_dict"][name]) for name, value in whole["state_dict"].items())
    first, second = facts(tmp_path / "whole"), facts(tmp_path / "killed")
    for name in ("steps", "tokens_seen", "text_bytes_seen", "validations"):
        assert first[name] == second[name]


def test_sources_that_end_are_too_little(
    tmp_path: Path, tiny_base: Path, data: Callable[..., PretrainDataModule], trainer: Any
) -> None:
    fit = run(tmp_path, trainer, ByteBudget(10**6))
    with pytest.raises(ValueError, match=r"`text_bytes=1000000`: the sources end after .* bytes. Give less"):
        fit.fit(model(tiny_base, tiny_base), data(tiny_base, max_epochs=1))


def test_validations_need_steps(
    tmp_path: Path, tiny_base: Path, data: Callable[..., PretrainDataModule], trainer: Any
) -> None:
    fit = run(tmp_path, trainer, ByteBudget(200, validations=2))
    with pytest.raises(ValueError, match=r"`text_bytes=200` are 1 steps, fewer than `validations=2`"):
        fit.fit(model(tiny_base, tiny_base), data(tiny_base))


def test_evaluation_is_left_alone(
    tmp_path: Path, tiny_base: Path, data: Callable[..., PretrainDataModule], trainer: Any
) -> None:
    fit = run(tmp_path, trainer, ByteBudget(BUDGET))
    fit.validate(model(tiny_base, tiny_base), data(tiny_base), verbose=False)
    assert fit.max_steps == 1_000_000


def test_other_data_has_no_rows(tmp_path: Path, module: PretrainModule, trainer: Any) -> None:
    with pytest.raises(TypeError, match="not of FixedBatches"):
        run(tmp_path, trainer, ByteBudget(BUDGET)).fit(module, FixedBatches([random_batch([20])]))


@pytest.mark.parametrize("arguments", [{"text_bytes": 0}, {"text_bytes": 5, "validations": 0}])
def test_numbers_out_of_range(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="expected at least 1"):
        ByteBudget(**arguments)


ROWS = {
    "document_ids": torch.tensor([[0, 0, 1, -1], [0, 0, 0, 0]]),
    "input_ids": torch.tensor([[1, 2, 3, 0], [4, 4, 4, 4]]),
}


class Host(nn.Module):
    """Stands for the LightningModule: some parameters, and the last validation's likelihoods."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Parameter(torch.zeros(10), requires_grad=False)
        self.trained = nn.Parameter(torch.zeros(3))
        self.source_likelihoods: dict[str, Any] = {}


@pytest.fixture
def tokenizer(monkeypatch: pytest.MonkeyPatch) -> object:
    """Stands for the tokenizer: piece 3 is a letter of three bytes, the others of one."""
    monkeypatch.setattr("lightning_mixcn.callbacks.compared_run.piece_bytes", lambda tokenizer: [1, 1, 1, 3, 1])
    return object()


def test_bytes_of_pieces_are_those_of_the_text(tiny_base: Path, extended: Path) -> None:
    text = "".join(HAN) + "A tale. " + chr(0x1F600) + TALES[0]
    for folder in (tiny_base, extended):
        tokenizer = load_tokenizer(folder)
        table, (ids,) = piece_bytes(tokenizer), tokenizer.encode_batch([text])
        # SentencePiece puts a blank in front of a text.
        assert sum(table[index] for index in ids) - len(text.encode()) in (0, 1)
        assert table[tokenizer.bos_id] == table[tokenizer.eos_id] == 0


class TwoRanks:
    """Stands for the strategy: another rank that has counted the same."""

    def reduce(self, here: Tensor, reduce_op: str) -> Tensor:
        return {"sum": 2 * here, "max": here + 1_000_000}[reduce_op]


def stand_in(tmp_path: Path, tokenizer: Any = None) -> Any:
    return SimpleNamespace(
        default_root_dir=str(tmp_path),
        global_step=0,
        max_steps=5,
        sanity_checking=False,
        is_global_zero=True,
        strategy=TwoRanks(),
        callbacks=[],
        profiler=PassThroughProfiler(),
        lightning_module=None,
        datamodule=SimpleNamespace(tokenizer=tokenizer),
    )


def train(facts: RunFacts, trainer: Any, host: Any, steps: int) -> None:
    trainer.callbacks = []
    facts.setup(trainer, host, "fit")
    facts.on_fit_start(trainer, host)
    (clock,) = trainer.callbacks
    clock.on_train_start(trainer, host)
    for step in range(steps):
        clock.on_train_batch_start(trainer, host, ROWS, step)
        trainer.global_step += 1
        for callback in (clock, facts):
            callback.on_train_batch_end(trainer, host, None, ROWS, step)


def written(tmp_path: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((tmp_path / FACTS_FILE).read_text(encoding="utf-8"))
    return facts


def test_facts_of_a_run(tmp_path: Path, tokenizer: object) -> None:
    trainer, host, callback = stand_in(tmp_path, tokenizer), Host(), RunFacts()
    train(callback, trainer, host, 2)
    host.source_likelihoods["val"] = {"zh": {"bits_per_byte": 2.5, "tokens": 7}}
    callback.on_validation_end(trainer, host)  # type: ignore[arg-type]  # a stand-in
    callback.on_fit_end(trainer, host)  # type: ignore[arg-type]  # a stand-in
    facts = written(tmp_path)
    assert (facts["steps"], facts["planned_steps"]) == (2, 5)
    peak = peak_resident_bytes()
    assert 0 < facts["peak_memory_bytes"] - 1_000_000 <= peak
    assert facts["training_seconds"] <= facts["fit_seconds"]
    assert facts["tokens_seen"] == 2 * 2 * 7
    assert facts["text_bytes_seen"] == 2 * 2 * (1 + 1 + 3 + 4)  # padding is no text
    assert facts["parameters"] == {"total": 13, "trainable": 3, "quantised": 0}
    assert facts["bytes_in_memory"] == {"quantised": 0, "trainable": 12, "dense": 40}
    likelihoods = {"zh": {"bits_per_byte": 2.5, "tokens": 7}}
    assert facts["validations"] == [{"step": 2, "text_bytes_seen": 36, "sources": likelihoods}]
    assert facts["tokens_per_second"] == pytest.approx(28 / facts["training_seconds"])
    assert [path.name for path in tmp_path.iterdir()] == [FACTS_FILE]


def test_without_a_tokenizer_bytes_are_unknown(tmp_path: Path) -> None:
    trainer, host, callback = stand_in(tmp_path), Host(), RunFacts()
    train(callback, trainer, host, 1)
    callback.on_fit_end(trainer, host)  # type: ignore[arg-type]  # a stand-in
    assert written(tmp_path)["text_bytes_seen"] is None


def test_a_resumed_run_goes_on_counting(tmp_path: Path, tokenizer: object) -> None:
    trainer, host, first, second = stand_in(tmp_path, tokenizer), Host(), RunFacts(), RunFacts()
    train(first, trainer, host, 1)
    first.on_validation_end(trainer, host)  # type: ignore[arg-type]  # a stand-in
    state = json.loads(json.dumps(first.state_dict()))
    second.load_state_dict(state)
    train(second, trainer, host, 1)
    second.on_fit_end(trainer, host)  # type: ignore[arg-type]  # a stand-in
    facts = written(tmp_path)
    assert facts["tokens_seen"] == 28
    assert facts["fit_seconds"] > state["fit_seconds"]
    assert [validation["step"] for validation in facts["validations"]] == [1]


def test_a_second_fit_goes_on_counting(tmp_path: Path, tokenizer: object) -> None:
    trainer, host, callback = stand_in(tmp_path, tokenizer), Host(), RunFacts()
    for _ in range(2):
        train(callback, trainer, host, 1)
        callback.on_fit_end(trainer, host)  # type: ignore[arg-type]  # a stand-in
    assert written(tmp_path)["tokens_seen"] == 28
    state = callback.state_dict()
    assert state["fit_seconds"] == written(tmp_path)["fit_seconds"]  # what came after the fit is not in it


def test_a_sanity_check_is_not_kept(tmp_path: Path) -> None:
    trainer, host, callback = stand_in(tmp_path), Host(), RunFacts()
    train(callback, trainer, host, 0)
    trainer.sanity_checking = True
    callback.on_validation_end(trainer, host)  # type: ignore[arg-type]  # a stand-in
    callback.on_fit_end(trainer, host)  # type: ignore[arg-type]  # a stand-in
    assert written(tmp_path)["validations"] == []


def test_only_rank_zero_writes(tmp_path: Path) -> None:
    trainer = stand_in(tmp_path)
    trainer.is_global_zero = False
    RunFacts().on_fit_end(trainer, Host())  # type: ignore[arg-type]  # a stand-in
    assert not (tmp_path / FACTS_FILE).exists()
