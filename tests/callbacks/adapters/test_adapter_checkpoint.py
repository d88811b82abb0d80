"""The adapter folder against stock PEFT."""

import json
import logging
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file

from lightning_mixcn.callbacks import AdapterCheckpoint, PredictionWriter, StepCheckpoint
from lightning_mixcn.data import InstructDataModule
from lightning_mixcn.errors import UserError
from lightning_mixcn.model import load_mixtral
from lightning_mixcn.model.checkpoints.identity import IDENTITY_FILE
from lightning_mixcn.model.convert.quantize import quantize
from lightning_mixcn.modules import InstructModule, PretrainModule
from lightning_mixcn.testing import FixedBatches, random_batch
from lightning_mixcn.text import (
    ChatTemplate,
    ConversationSource,
    TextTokenizer,
    Turn,
    load_tokenizer,
)
from lightning_mixcn.text.chat.turns import TurnTokens

Make = Callable[..., Any]


def test_the_adapter_at_the_end_continues_the_run(tmp_path: Path, module: PretrainModule, trainer: Make) -> None:
    batch = random_batch([20])
    trainer(callbacks=[AdapterCheckpoint()]).fit(module, FixedBatches([batch] * 2))
    folder = tmp_path / "adapter"
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= {f.name for f in folder.iterdir()}
    assert load_tokenizer(folder).encode_batch(["a"]) == load_tokenizer(module.tokenizer_path).encode_batch(["a"])
    continued = PretrainModule(module.base, dtype="float32", lora=module.lora, adapter=str(tmp_path))
    continued.configure_model()
    with torch.no_grad():
        torch.testing.assert_close(continued.eval()(batch).nll, module.eval()(batch).nll)


def test_every_checkpoint_has_its_adapter(tmp_path: Path, module: PretrainModule, trainer: Make) -> None:
    written: list[int] = []  # when the adapter was written, 0 for not yet

    class Watch(StepCheckpoint):
        def on_train_batch_end(self, *arguments: Any) -> None:
            super().on_train_batch_end(*arguments)
            folder = tmp_path / "adapter"
            written.append(folder.stat().st_mtime_ns if folder.exists() else 0)

    callbacks = [AdapterCheckpoint(), Watch(every_n_steps=2, dirpath=str(tmp_path / "checkpoints"))]
    trainer(max_steps=4, enable_checkpointing=True, callbacks=callbacks).fit(
        module, FixedBatches([random_batch([20])] * 4)
    )
    assert 0 == written[0] < written[1] == written[2] < written[3]


def test_without_lora_there_is_no_adapter(tmp_path: Path, tiny_base: Path, trainer: Make) -> None:
    module = PretrainModule(str(tiny_base), train_embeddings=True)
    trainer(max_steps=1, callbacks=[AdapterCheckpoint()]).fit(module, FixedBatches([random_batch([20])]))
    assert not (tmp_path / "adapter").exists()


# PEFT's own conversion of w1 and w3 to the fused layout leaves patterns for what was not adapted.
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match any targeted module:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys did not match any targeted module:RuntimeWarning")
def test_stock_peft_reads_it(tmp_path: Path, tiny_base: Path, module: PretrainModule, trainer: Make) -> None:
    module.quantization = "none"
    batch = random_batch([20])
    trainer(max_steps=2, callbacks=[AdapterCheckpoint()]).fit(module, FixedBatches([batch] * 2))
    stock: Any = transformers.MixtralForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    stock = PeftModel.from_pretrained(stock, str(tmp_path / "adapter")).eval()
    bare = load_mixtral(tiny_base, quantization="none", dtype="float32")
    with torch.no_grad():
        expected = stock(batch["input_ids"][:, :20]).logits
        assert module.model is not None
        trained = module.model.eval()(input_ids=batch["input_ids"][:, :20]).logits
        untrained = bare(input_ids=batch["input_ids"][:, :20]).logits
    # float32; PEFT multiplies A and B in another order.
    torch.testing.assert_close(trained, expected, rtol=1e-4, atol=1e-5)
    assert (trained - untrained).abs().max() > 1e-4


class Falling(PretrainModule):
    """A run whose validations measure given values."""

    values: list[float]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def on_validation_epoch_end(self) -> None:
        value = self.values.pop(0)
        measured = {"bits_per_byte": value, "nll_nats_per_token": value, "bytes": 7, "tokens": 1234}
        self.source_likelihoods["val"] = {"zh": measured}  # type: ignore[dict-item]  # not all that a likelihood has
        self.log("val/zh/accuracy", value)


@pytest.fixture
def falling(tiny_base: Path, module: PretrainModule) -> Falling:
    made = Falling(str(tiny_base), dtype="float32", lora=module.lora)
    made.values = [3.0, 1.5, 2.5]
    return made


@pytest.mark.parametrize(
    ("arguments", "best_step"),
    [({}, 2), ({"monitor": "val/zh/accuracy"}, 2), ({"monitor": "val/zh/accuracy", "mode": "max"}, 1)],
)
def test_the_best_validation_s_adapter_is_kept(
    arguments: dict[str, Any], best_step: int, tmp_path: Path, falling: Falling, trainer: Make
) -> None:
    batches = FixedBatches([random_batch([20])] * 3)
    callback = AdapterCheckpoint(**arguments)
    trainer(max_steps=3, limit_val_batches=1, val_check_interval=1, num_sanity_val_steps=0, callbacks=[callback]).fit(
        falling, batches
    )
    best, newest = (tmp_path / name / "README.md" for name in ("adapter_best", "adapter"))
    assert f"after {best_step} optimizer steps" in best.read_text(encoding="utf-8")
    card = newest.read_text(encoding="utf-8")
    assert "after 3 optimizer steps" in card
    assert "Measured after 3 steps" in card
    assert "| zh | 2.5000 | 2.5000 | 1,234 |" in card
    assert "content hash" in card
    weights = [load_adapter(folder.parent) for folder in (best, newest)]
    assert not torch.equal(weights[0], weights[1])


def test_a_resumed_run_knows_the_best(tmp_path: Path, falling: Falling, trainer: Make) -> None:
    before = AdapterCheckpoint()
    before.load_state_dict({"best": 1.0, "measured": {}})
    resumed = AdapterCheckpoint()
    resumed.load_state_dict(before.state_dict())
    batches = FixedBatches([random_batch([20])] * 3)
    trainer(max_steps=3, limit_val_batches=1, val_check_interval=1, num_sanity_val_steps=0, callbacks=[resumed]).fit(
        falling, batches
    )
    assert not (tmp_path / "adapter_best").exists()


def test_a_monitor_that_is_not_logged_is_named(falling: Falling, trainer: Make) -> None:
    batches = FixedBatches([random_batch([20])])
    callback = AdapterCheckpoint(monitor="val/en/accuracy")
    with pytest.raises(UserError, match=r"`monitor=val/en/accuracy` is not logged[.] Validation logs val/zh/accuracy"):
        trainer(max_steps=1, limit_val_batches=1, num_sanity_val_steps=0, callbacks=[callback]).fit(falling, batches)


class Named(FixedBatches):
    def source_names(self, stage: str) -> list[str]:
        return ["zh"]


@pytest.mark.parametrize("monitor", ["val/zh/bits_per_bite", "val/en/bits_per_byte", "loss"])
def test_a_monitor_that_nothing_logs_is_refused_before_loading(
    monitor: str, module: PretrainModule, trainer: Make
) -> None:
    run = trainer(max_steps=1, callbacks=[AdapterCheckpoint(monitor=monitor)])
    logged = "Validation logs val/bits_per_byte, val/zh/bits_per_byte, "
    with pytest.raises(UserError, match=rf"`monitor={monitor}` is not logged.* {logged}"):
        run.fit(module, Named([random_batch([20])]))
    assert module.model is None


def test_a_base_that_other_tools_cannot_find_is_said_at_the_start(
    tmp_path: Path, tiny_base: Path, module: PretrainModule, trainer: Make
) -> None:
    quantize(str(tiny_base), str(tmp_path / "small"))
    (tmp_path / "small" / IDENTITY_FILE).unlink()
    run = PretrainModule(str(tmp_path / "small"), dtype="float32", lora=module.lora)
    with pytest.warns(UserWarning, match="adapter: The base 'small' is in 4 bits and does not record what it was made"):
        trainer(max_steps=1, callbacks=[AdapterCheckpoint()]).fit(run, FixedBatches([random_batch([20])]))
    assert "does not record what it was made from" in (tmp_path / "adapter/README.md").read_text(encoding="utf-8")


class Shouting:
    """A chat template without an equal in Jinja."""

    def encode(self, turns: Sequence[Turn], tokenizer: TextTokenizer) -> list[TurnTokens]:
        texts = tokenizer.encode_batch([turn.content.upper()[::-1] for turn in turns])
        return [
            TurnTokens([*ids, tokenizer.eos_id], turn.role == "assistant", number)
            for number, (turn, ids) in enumerate(zip(turns, texts, strict=True))
        ]

    def encode_prompt(self, turns: Sequence[Turn], tokenizer: TextTokenizer) -> list[int]:
        return [index for segment in self.encode(turns, tokenizer) for index in segment.text_ids]

    def stop_ids(self, tokenizer: TextTokenizer) -> frozenset[int]:
        return frozenset([tokenizer.eos_id])

    def check_conversation(self, turns: Sequence[Turn], tokenizer: TextTokenizer) -> None:
        pass


class ShoutingData(InstructDataModule):
    @property
    def template(self) -> ChatTemplate:
        return Shouting()


def test_a_template_that_has_no_equal_in_jinja_is_said(
    tmp_path: Path, tiny_base: Path, module: PretrainModule, trainer: Make
) -> None:
    """The base's own would be another format, in silence."""
    base = shutil.copytree(tiny_base, tmp_path / "base")
    (base / "chat_template.jinja").write_text("{{ messages }}")
    records = [{"instruction": f"问{number}", "output": "答"} for number in range(12)]
    (tmp_path / "zh.json").write_text(json.dumps(records), encoding="utf-8")
    data = ShoutingData(
        [ConversationSource("zh", str(tmp_path / "zh.json"))], tokenizer=str(base), sequence_length=96,
        micro_batch_size=1, num_streams=1, num_workers=0, val_fraction=0.0,
    )  # fmt: skip
    run = InstructModule(str(base), dtype="float32", lora=module.lora)
    with pytest.warns(UserWarning, match="has no equal in Jinja for this tokenizer, so none is written"):
        trainer(max_steps=1, callbacks=[AdapterCheckpoint()]).fit(run, data)
    assert not (tmp_path / "adapter/chat_template.jinja").exists()
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "adapter").chat_template is None
    assert "there is no chat template here" in (tmp_path / "adapter/README.md").read_text(encoding="utf-8")


def test_a_bad_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="`mode='least'`: expected one of min, max"):
        AdapterCheckpoint(mode="least")  # type: ignore[arg-type]  # the test is of that


def load_adapter(folder: Path) -> torch.Tensor:
    tensors = load_file(folder / "adapter_model.safetensors")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


@pytest.mark.parametrize(
    ("saved", "begins_again"),
    [
        ({"monitor": None, "mode": "min"}, False),
        ({}, False),  # of before these were kept
        ({"monitor": "val/zh/nll_nats_per_token", "mode": "min"}, True),
        ({"monitor": None, "mode": "max"}, True),
    ],
)
def test_the_best_value_of_another_monitor_begins_again(
    saved: dict[str, Any], begins_again: bool, caplog: pytest.LogCaptureFixture
) -> None:
    callback = AdapterCheckpoint()
    with caplog.at_level(logging.INFO):
        callback.load_state_dict({"best": 1.5, "measured": {"step": 3, "sources": {}}, **saved})
    state = callback.state_dict()
    assert state["best"] == (math.inf if begins_again else 1.5)
    assert state["measured"]["step"] == 3
    assert [record.getMessage().count("begins again") for record in caplog.records] == [1] * begins_again
    assert (state["monitor"], state["mode"]) == (None, "min")


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "a/b",
        "/a",
        "../a",
        "a\n",
        "\x1b[2J",
        " a",
        ".a",
        "a" * 201,
        "checkpoints",
        "Tensorboard",
        "facts.json",
    ],
)
def test_a_name_that_is_not_plain_and_ones_own_is_refused(name: str) -> None:
    for make in (lambda: AdapterCheckpoint(folder=name), lambda: PredictionWriter(filename=name)):
        with pytest.raises(UserError, match=r"`fold?er=|`filename="):
            make()
    assert PredictionWriter().run_files == ("predictions.jsonl",)
    assert AdapterCheckpoint("中文").run_files == ("中文", "中文_best")


@pytest.mark.parametrize("dirpath", ["", " ", ".", "..", "a/..", "a\n"])
def test_checkpoints_need_a_folder_of_their_own(dirpath: str) -> None:
    with pytest.raises(UserError, match=r"`dirpath=.*expected a (folder for checkpoints|name or a path)"):
        StepCheckpoint(dirpath=dirpath)


def test_a_folder_that_is_no_adapter_is_not_replaced(tmp_path: Path, module: PretrainModule, trainer: Make) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "thesis.txt").write_text("mine")
    with pytest.raises(
        UserError, match=r"adapter' is a folder with something else in it: it has no adapter_config\.json"
    ):
        trainer(callbacks=[AdapterCheckpoint()]).fit(module, FixedBatches([random_batch([20])]))
    assert [path.name for path in (tmp_path / "adapter").iterdir()] == ["thesis.txt"]
