"""The reference is the model of the first step: in every way to have it, after a kill, and on any number of ranks."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from peft import LoraConfig

from lightning_mixcn.cli.plan import meta_model_of
from lightning_mixcn.model import MoePeftModel, load_moe
from lightning_mixcn.model.memory.layer import MicroBatch
from lightning_mixcn.model.memory.plan import Sharing, plan_memory
from lightning_mixcn.modules import PreferenceModule
from lightning_mixcn.modules.memory import planned_run
from lightning_mixcn.modules.preference.reference import FILE, answer_keys
from lightning_mixcn.testing import run_distributed, save_tiny_mixtral
from tests.model.trained_values import draw_trained
from tests.modules.preference import preference_run
from tests.modules.preference.preference_run import TARGETS, pairs, train
from tests.text.pair_files import pair_records, write_records

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory")  # runs go on in their folder
WAYS = ["fresh", "continued", "embeddings", "rounding"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_mixtral(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_records(tmp_path_factory.mktemp("pairs") / "zh.jsonl", pair_records(60))


@pytest.fixture(scope="module")
def adapter(base: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the folder of an adapter that changes what the model says."""
    folder = tmp_path_factory.mktemp("adapter")
    model = load_moe(base, lora=LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS), dtype="float32")
    assert isinstance(model, MoePeftModel)
    draw_trained(model, 0.2)
    model.save_pretrained(folder)
    return str(folder)


def settings_of(way: str, adapter: str) -> dict[str, Any]:
    settings: dict[str, dict[str, Any]] = {
        "fresh": {},
        "continued": {"adapter": adapter},
        "embeddings": {"train_embeddings": True},
        "rounding": {"lora_start": "rounding_error"},
    }
    return settings[way]


@pytest.mark.parametrize("way", WAYS)
def test_it_stays_where_it_was_while_the_model_moves(way: str, base: str, file: str, adapter: str) -> None:
    """Against a second model, made anew; what trains comes back bit for bit."""
    settings = settings_of(way, adapter)
    module = preference_run.module(base, **settings)
    module.configure_model()
    assert module.model is not None
    start: dict[str, Any] = {name: settings.get(name) for name in ("adapter", "lora_start")}
    other = load_moe(base, lora=module.lora, dtype="float32", **start)
    draw_trained(module.model, 0.3, seed=5)
    before = {name: parameter.clone() for name, parameter in module.model.named_parameters()}
    data = pairs(base, file, micro_batch_size=3)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    inputs = {name: batch[name] for name in ("input_ids", "labels", "position_ids", "document_ids")}
    with torch.no_grad():
        expected, moved = other.eval()(**inputs).nll, module.model.eval()(**inputs).nll
    assert float((expected - moved).abs().max()) > 0.1
    torch.testing.assert_close(module.with_reference(batch)["reference_nll"], expected)
    for name, parameter in module.model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_no_second_copy_of_the_base_is_held(base: str, adapter: str) -> None:
    module = preference_run.module(base, adapter=adapter, dtype="bfloat16")
    module.configure_model()
    assert module.model is not None
    trained = sum(parameter.numel() for parameter in module.model.parameters() if parameter.requires_grad)
    assert module._start is not None
    assert sum(copy.nbytes for _, copy in module._start._copies) == 2 * trained
    assert preference_run.module(base)._start is None


@pytest.mark.parametrize(
    ("way", "reference"),
    [
        ("continued", "start"),
        ("fresh", "precompute"),
        *(
            pytest.param(way, reference, marks=pytest.mark.slow)
            for way in WAYS
            for reference in ("start", "precompute")
            if (way, reference) not in (("continued", "start"), ("fresh", "precompute"))
        ),
    ],
)
def test_resumed_as_if_it_had_not_been_killed(
    reference: str, way: str, base: str, file: str, adapter: str, tmp_path: Path
) -> None:
    settings = settings_of(way, adapter) | {"reference": reference}
    whole = train(base, file, str(tmp_path / "whole"), **settings)
    train(base, file, str(tmp_path / "cut"), max_steps=2, **settings)
    resumed = train(base, file, str(tmp_path / "cut"), ckpt_path=_last(tmp_path / "cut"), **settings)
    assert [step["train/loss"] for step in resumed["steps"]] == [step["train/loss"] for step in whole["steps"][2:]]
    assert resumed["adapter"].keys() == whole["adapter"].keys()
    for name, expected in whole["adapter"].items():
        assert torch.equal(resumed["adapter"][name], expected), name


@pytest.mark.parametrize("way", WAYS)
def test_computed_before_or_in_each_step_is_the_same(
    way: str, base: str, file: str, adapter: str, tmp_path: Path
) -> None:
    runs = [
        train(base, file, str(tmp_path / reference), reference=reference, **settings_of(way, adapter))["steps"]
        for reference in ("start", "precompute")
    ]
    for one, other in zip(*runs, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
    assert runs[0][0]["train/preference_loss"] == pytest.approx(math.log(2), rel=1e-5)  # nothing is preferred yet


@pytest.mark.multiprocess
@pytest.mark.parametrize("reference", [pytest.param("start", marks=pytest.mark.slow), "precompute"])
@pytest.mark.parametrize("way", [pytest.param("fresh", marks=pytest.mark.slow), "continued"])
def test_ranks_do_what_one_process_does(
    way: str, reference: str, base: str, file: str, adapter: str, tmp_path: Path
) -> None:
    settings = settings_of(way, adapter) | {"reference": reference}
    one = train(base, file, str(tmp_path / "one"), **settings)
    for rank in run_distributed(_train_ranks, 2, base, file, str(tmp_path / "two"), settings):
        for step, expected in zip(rank["steps"], one["steps"], strict=True):
            assert step == pytest.approx(expected, rel=1e-4, abs=1e-5)
        for name in (name for name in one["end"] if name.startswith("val/")):
            assert rank["end"][name] == pytest.approx(one["end"][name], rel=1e-4, abs=1e-5), name
        for name, expected in one["adapter"].items():
            assert torch.linalg.norm(rank["adapter"][name] - expected) <= 1e-3 * torch.linalg.norm(expected), name


def _train_ranks(base: str, file: str, out: str, settings: dict[str, Any]) -> dict[str, Any]:
    return train(base, file, out, **settings)


def _last(run: Path) -> str:
    return str(max((run / "checkpoints").glob("step*.ckpt"), key=lambda path: path.stat().st_mtime_ns))


def test_another_start_is_refused(base: str, file: str, adapter: str, tmp_path: Path) -> None:
    train(base, file, str(tmp_path / "run"), max_steps=2, adapter=adapter)
    other = tmp_path / "other"
    shutil.copytree(adapter, other)
    model = load_moe(base, lora=LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS), dtype="float32")
    assert isinstance(model, MoePeftModel)
    draw_trained(model, 0.2, seed=9)
    model.save_pretrained(other)
    last = _last(tmp_path / "run")
    with pytest.raises(ValueError, match="The checkpoint's reference was another model than this run begins with"):
        train(base, file, str(tmp_path / "run"), ckpt_path=last, adapter=str(other))
    with pytest.raises(ValueError, match="was trained with `loss: dpo`, but it is ipo"):
        train(base, file, str(tmp_path / "run"), ckpt_path=last, adapter=adapter, loss="ipo")
    with pytest.raises(ValueError, match="base"):
        train(
            str(save_tiny_mixtral(tmp_path / "base", seed=7)),
            file,
            str(tmp_path / "run"),
            ckpt_path=last,
            adapter=adapter,
        )


def test_the_file_of_a_reference_is_checked(base: str, file: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(base, file, str(run), max_steps=2, reference="precompute")
    last, kept = _last(run), (run / FILE).read_bytes()
    (run / FILE).write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    with pytest.raises(ValueError, match="was changed or damaged after it was written"):
        train(base, file, str(run), reference="precompute", ckpt_path=last)
    (run / FILE).unlink()
    with pytest.raises(FileNotFoundError, match=FILE):
        train(base, file, str(run), reference="precompute", ckpt_path=last)
    train(
        base,
        write_records(tmp_path / "more.jsonl", pair_records(9)),
        str(tmp_path / "o"),
        max_steps=1,
        reference="precompute",
    )
    (run / FILE).write_bytes((tmp_path / "o" / FILE).read_bytes())
    with pytest.raises(ValueError, match="was computed with another base, adapter, text or template"):
        train(base, file, str(run), reference="precompute", ckpt_path=last)


def test_pairs_are_known_by_their_tokens_and_labels(base: str, file: str) -> None:
    data = pairs(base, file, micro_batch_size=4)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    keys = [key for _, _, key in answer_keys(batch)]
    assert len(keys) == int((batch["document_ids"].amax(1) + 1).sum())
    every = [key for part in data.every_pair() for _, _, key in answer_keys(part)]
    assert set(keys) < set(every)
    assert len(every) == 120
    assert isinstance(preference_run.module(base), PreferenceModule)


def test_the_plan_has_the_copy(base: str, adapter: str) -> None:
    """Two bytes for each float32 that trains, and four more for the time of the reference's pass."""
    continued = preference_run.module(base, adapter=adapter, dtype="bfloat16")
    before = preference_run.module(base, adapter=adapter, dtype="bfloat16", reference="precompute")
    assert (continued.keeps_start, before.keeps_start) == (True, False)
    assert not preference_run.module(base).keeps_start
    model, batch = meta_model_of(continued), MicroBatch(1, 64)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    plans = [
        plan_memory(model, planned_run(model, batch, ["none"] * 2, "cpu", True, Sharing(), None, module))
        for module in (continued, before)
    ]
    assert plans[0].trained - plans[1].trained == 2 * trained
    (reference,) = (moment for moment in plans[0].moments if moment.name == "the reference")
    assert reference.total > 4 * trained


@pytest.mark.parametrize("reference", ["start", "precompute"])
def test_what_was_loaded_is_the_reference_of_an_evaluation(
    reference: str, base: str, file: str, adapter: str, tmp_path: Path
) -> None:
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    module = preference_run.module(base, adapter=adapter, reference=reference)
    (figures,) = trainer.validate(module, pairs(base, file), verbose=False)
    assert figures["val/zh/preference_loss"] == pytest.approx(math.log(2), rel=1e-4)
    assert figures["val/zh/reward_margin"] == pytest.approx(0.0, abs=1e-5)


def test_a_start_has_one_digest_in_every_process(base: str, adapter: str) -> None:
    """Targets are a set to PEFT, whose order is another in another process."""
    one, other = (
        preference_run.module(base, adapter=adapter, lora=LoraConfig(r=4, lora_alpha=8, target_modules=names))
        for names in (TARGETS, TARGETS[::-1])
    )
    assert one._start_digest == other._start_digest
    assert one._start_digest != preference_run.module(base)._start_digest
