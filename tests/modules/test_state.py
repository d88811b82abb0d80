"""Checkpoints: what they hold, that they load and resume, and what they refuse."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig

from lightning_mixcn.modules import PretrainModule
from lightning_mixcn.modules.state import adapter_folder, plain_arguments
from lightning_mixcn.testing import FixedBatches, random_batch, save_tiny_mixtral

Make = Callable[..., Any]

pytestmark = [
    # The batches of these tests are no resumable stream; they are all alike.
    pytest.mark.filterwarnings(
        "ignore:You're resuming from a checkpoint that ended before the epoch ended:UserWarning"
    ),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create:UserWarning"),
]


def batches() -> FixedBatches:
    return FixedBatches([random_batch([20, 9])] * 8)


def run_with_checkpoint(folder: Path, trainer: Make, module: PretrainModule, *, steps: int = 2) -> Path:
    """Run ``steps`` steps and give the checkpoint of the second one."""
    checkpoint = ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    trainer(max_steps=steps, enable_checkpointing=True, callbacks=[checkpoint]).fit(module, batches())
    return folder / "step=2.ckpt"


def test_it_holds_what_trains_and_names_its_base(tmp_path: Path, tiny_base: Path, lora: Make, trainer: Make) -> None:
    module = PretrainModule(str(tiny_base), lora=lora(), train_embeddings=True)
    content = torch.load(run_with_checkpoint(tmp_path, trainer, module), weights_only=True)
    trainable = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert set(content["state_dict"]) == trainable
    assert any("lora_A" in name for name in trainable)
    assert any("embed_tokens" in name for name in trainable)
    assert content["mixcn_base"]["path"] == str(tiny_base)
    assert len(content["mixcn_base"]["sha256"]) == 64
    assert content["hyper_parameters"]["lora"]["r"] == 4


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, tiny_base: Path, lora: Make, trainer: Make) -> None:
    """With dropout, whose random numbers go on, too."""
    whole = PretrainModule(str(tiny_base), lora=lora(lora_dropout=0.2))
    path = run_with_checkpoint(tmp_path, trainer, whole, steps=5)
    torch.manual_seed(123)
    resumed = PretrainModule(str(tiny_base), lora=lora(lora_dropout=0.2))
    trainer(max_steps=5).fit(resumed, batches(), ckpt_path=path, weights_only=True)
    assert resumed.trainer.global_step == 5
    expected, state = whole.state_dict(), resumed.state_dict()
    assert expected.keys() == state.keys()
    assert all(torch.equal(state[name], value) for name, value in expected.items())


def test_another_base_is_refused(tmp_path: Path, tiny_base: Path, lora: Make, trainer: Make) -> None:
    path = run_with_checkpoint(tmp_path, trainer, PretrainModule(str(tiny_base), lora=lora()))
    other = save_tiny_mixtral(tmp_path / "other", seed=1)
    with pytest.raises(
        ValueError, match=r"trained on the base .*tiny.*but `base` is .*other.*Set `model.init_args.base`"
    ):
        trainer(max_steps=4).fit(PretrainModule(str(other), lora=lora()), batches(), ckpt_path=path)


def test_a_base_may_move(tmp_path: Path, tiny_base: Path, lora: Make, trainer: Make) -> None:
    path = run_with_checkpoint(tmp_path, trainer, PretrainModule(str(tiny_base), lora=lora()))
    moved = PretrainModule(str(save_tiny_mixtral(tmp_path / "moved")), lora=lora())
    trainer(max_steps=3).fit(moved, batches(), ckpt_path=path)
    assert moved.trainer.global_step == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_embeddings": True}, r"checkpoint lacks model\..*embed_tokens.*Give `lora`, `train_embeddings`"),
        ({"target_modules": ["w1", "w2", "w3"]}, r"no adapter here: `lora.target_modules` was .*q_proj.* and is \["),
        ({"r": 8}, r"has the rank 4 and the scaling 2, here it has 8 and 1: `lora.r` was 4 and is 8"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path, tiny_base: Path, lora: Make, trainer: Make
) -> None:
    path = run_with_checkpoint(tmp_path, trainer, PretrainModule(str(tiny_base), lora=lora()))
    settings = {name: changes.pop(name) for name in ("train_embeddings",) if name in changes}
    with pytest.raises(ValueError, match=message):
        trainer(max_steps=4).fit(
            PretrainModule(str(tiny_base), lora=lora(**changes), **settings), batches(), ckpt_path=path
        )


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path, tiny_base: Path, lora: Make, trainer: Make) -> None:
    path = run_with_checkpoint(tmp_path, trainer, PretrainModule(str(tiny_base), lora=lora()))
    content = torch.load(path, weights_only=True)
    del content["mixcn_base"]
    torch.save(content, path)
    with pytest.raises(ValueError, match="names no base model: it was not written by lightning_mixcn"):
        trainer(max_steps=4).fit(PretrainModule(str(tiny_base), lora=lora()), batches(), ckpt_path=path)


# jsonargparse hands PEFT its own default of this option.
@pytest.mark.filterwarnings("ignore:`loftq_config` specified but will be ignored:UserWarning")
# Lightning 2.6 calls jsonargparse by an old name.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_load_from_checkpoint_makes_the_module_again(
    tmp_path: Path, tiny_base: Path, lora: Make, trainer: Make
) -> None:
    module = PretrainModule(str(tiny_base), lora=lora(lora_dropout=0.1), dtype="float32")
    path = run_with_checkpoint(tmp_path, trainer, module)
    loaded = PretrainModule.load_from_checkpoint(path, weights_only=True)
    assert loaded.lora is not None
    assert (loaded.lora.r, loaded.lora.lora_dropout, loaded.dtype_name) == (4, 0.1, "float32")
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in loaded.state_dict().items())


@pytest.mark.filterwarnings("ignore:`loftq_config` specified but will be ignored:UserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_load_from_checkpoint_checks_the_adapters_too(
    tmp_path: Path, tiny_base: Path, lora: Make, trainer: Make
) -> None:
    path = run_with_checkpoint(tmp_path, trainer, PretrainModule(str(tiny_base), lora=lora()))
    with pytest.raises(ValueError, match=r"`lora\.lora_alpha` was 8 and is 80"):
        PretrainModule.load_from_checkpoint(path, weights_only=True, lora=lora(lora_alpha=80))


def test_the_adapter_of_a_run_folder_is_found(tmp_path: Path) -> None:
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    assert adapter_folder(str(tmp_path / "run")) == str(tmp_path / "run" / "adapter")
    assert adapter_folder(str(tmp_path)) == str(tmp_path)
    assert adapter_folder(None) is None


def test_lora_is_reduced_to_what_was_set() -> None:
    lora = LoraConfig(r=4, lora_dropout=0.1, target_modules=["w3", "w1"], rank_pattern={"w1": 2})
    assert plain_arguments({"lora": lora}) == {
        "lora": {"r": 4, "lora_dropout": 0.1, "target_modules": ["w1", "w3"], "rank_pattern": {"w1": 2}}
    }


def test_plain_values_stay_and_callables_go() -> None:
    arguments = {"a": 1, "b": (1, "x"), "c": {"d": None}, "e": 0.5, "f": True, "g": print}
    assert plain_arguments(arguments) == {"a": 1, "b": [1, "x"], "c": {"d": None}, "e": 0.5, "f": True}
