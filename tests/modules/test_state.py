"""Checkpoints: what they hold, that they load and resume, and what they refuse."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from peft import LoraConfig

from lightning_mixcn.callbacks import AdapterCheckpoint, DataMonitor, StepCheckpoint
from lightning_mixcn.errors import UserError
from lightning_mixcn.modules import PretrainModule
from lightning_mixcn.modules.checkpoint_schema import check_content
from lightning_mixcn.modules.checkpoints import find_fault, sidecar
from lightning_mixcn.modules.state import adapter_folder, plain_arguments
from lightning_mixcn.testing import FixedBatches, random_batch, save_tiny_mixtral

Make = Callable[..., Any]
Change = Callable[[dict[str, Any]], object]

pytestmark = [
    # The batches of these tests are no resumable stream; they are all alike.
    pytest.mark.filterwarnings(
        "ignore:You're resuming from a checkpoint that ended before the epoch ended:UserWarning"
    ),
    pytest.mark.filterwarnings("ignore:Checkpoint directory:UserWarning"),  # a run is resumed in its folder
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
        (
            {"train_embeddings": True},
            r"checkpoint lacks model\..*embed_tokens.*Give `lora`, `train_only`, `train_embeddings`",
        ),
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


# ---- tampered with: one line, before anything of it is used ----


@pytest.fixture
def resume(tiny_base: Path, lora: Any, trainer: Make, tmp_path: Path) -> Callable[[int], Trainer]:
    """Return a function that trains to a step, from the newest checkpoint on."""

    def fit(steps: int) -> Trainer:
        saving = StepCheckpoint(every_n_steps=1, dirpath=str(tmp_path))
        callbacks = [
            saving,
            DataMonitor(),
            AdapterCheckpoint(),
            EarlyStopping("train/loss", check_on_train_epoch_end=True),
        ]
        run: Trainer = trainer(max_steps=steps, max_epochs=-1, enable_checkpointing=True, callbacks=callbacks)
        module = PretrainModule(str(tiny_base), dtype="float32", lora=lora())
        run.fit(module, FixedBatches([random_batch([9])] * 9), ckpt_path="last" if steps > 2 else None)
        return run

    return fit


def first(values: dict[Any, Any]) -> Any:
    return next(iter(values.values()))


def moments(content: dict[str, Any]) -> dict[str, Any]:
    state: dict[str, Any] = first(content["optimizer_states"][0]["state"])
    return state


def loop(content: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = content["loops"]["fit_loop"]
    return found


STEPS = "epoch_loop.automatic_optimization.optim_progress"
TAMPERED: dict[str, tuple[Change, str]] = {
    "NaN in weights": (lambda c: first(c["state_dict"]).fill_(float("nan")), r"state_dict\[.* NaN or infinite"),
    "no tensor": (lambda c: c["state_dict"].update(x=3), r"state_dict\['x'\] is 3, expected a tensor"),
    "inf in moments": (lambda c: moments(c)["exp_avg"].fill_(float("inf")), r"exp_avg holds NaN or infinite values"),
    "negative squares": (lambda c: moments(c)["exp_avg_sq"].fill_(-1.0), r"exp_avg_sq holds a mean of squares below"),
    "step -5": (lambda c: c.update(global_step=-5), "global_step is -5, expected a whole number of 0"),
    "step 10^12": (lambda c: c.update(global_step=10**12), "global_step is 1,000,000,000,000, but its loop has done 2"),
    "step a word": (lambda c: c.update(global_step="x"), "global_step is 'x', expected a whole number"),
    "step true": (lambda c: c.update(global_step=True), "global_step is true, expected a whole number"),
    "epoch": (lambda c: c.update(epoch=None), "epoch is null, expected a whole number"),
    "version": (lambda c: c.update({"pytorch-lightning_version": "x"}), "version is 'x', expected a version"),
    "no loops": (lambda c: c.pop("loops"), "loops is missing"),
    "loops a list": (lambda c: c.update(loops=[]), "loops is a list of 0 entries, expected a mapping"),
    "no progress": (lambda c: loop(c).pop("epoch_progress"), r"loops\.fit_loop\.epoch_progress is missing"),
    "counts": (
        lambda c: loop(c)["epoch_progress"]["total"].update(processed=10**9),
        "counts more completed than ready",
    ),
    "steps": (lambda c: loop(c)[STEPS]["optimizer"]["step"]["total"].update(completed=1), "counts|global_step is 2"),
    "no optimizer": (lambda c: c.pop("optimizer_states"), "optimizer_states is missing"),
    "optimizers": (lambda c: c.update(optimizer_states=[]), "optimizer_states has 0 entries, expected at least one"),
    "groups": (lambda c: c["optimizer_states"][0].pop("param_groups"), r"\[0\]\.param_groups is missing"),
    "lr": (lambda c: c["optimizer_states"][0]["param_groups"][0].update(lr=1e9), r"lr is 1000000000\.0, expected"),
    "lr NaN": (
        lambda c: c["optimizer_states"][0]["param_groups"][0].update(lr=torch.tensor(float("nan"))),
        r"lr is a tensor of shape \[\], expected",
    ),
    "schedule": (lambda c: c["lr_schedulers"][0].update(last_epoch=10**9), "has taken 1,000,000,000 steps, but"),
    "schedule's lr": (lambda c: c["lr_schedulers"][0].update(base_lrs=[1e9]), r"base_lrs\[0\] is 1000000000\.0"),
    "no schedule": (lambda c: c.pop("lr_schedulers"), "lr_schedulers is missing"),
    "sparse": (lambda c: c["state_dict"].update(x=torch.eye(3).to_sparse()), r"\['x'\] is no plain tensor"),
    "a view": (lambda c: c["state_dict"].update(x=torch.zeros(1).expand(10**12)), r"\['x'\] is no plain tensor"),
    "a parameter's steps": (lambda c: moments(c)["step"].fill_(1e12), r"step is 1e\+12, expected at most the run's 2"),
    "settings' groups": (lambda c: c["mixcn_settings"].update(groups=[]), "groups has 0 entries, expected 1"),
    "no state_dict": (lambda c: c.pop("state_dict"), "state_dict is missing"),
    "no callbacks": (lambda c: c.pop("callbacks"), "callbacks is missing"),
    "patience": (
        lambda c: next(v for k, v in c["callbacks"].items() if "EarlyStopping" in k).pop("patience"),
        r"callbacks\[EarlyStopping\]\.patience is missing",
    ),
    "base a list": (lambda c: c.update(mixcn_base=[1]), "mixcn_base is a list of 1 entries, expected a mapping"),
    "base without sum": (lambda c: c["mixcn_base"].pop("sha256"), r"mixcn_base\.sha256 is missing"),
    "lora": (lambda c: c["mixcn_lora"].update(layers={"a": [0, 1.0]}), r"layers\['a'\]\[0\] is 0, expected"),
    "settings": (lambda c: c["mixcn_settings"].pop("lr"), r"mixcn_settings\.lr is missing"),
    "accumulation": (lambda c: c.update(mixcn_accumulate_grad_batches=0), "accumulate_grad_batches is 0, expected"),
}
# Seen only where the module or a callback is: through a whole resume.
RESUMED: dict[str, tuple[Change, str]] = {
    "shape": (lambda c: moments(c).update(exp_avg=torch.zeros(3)), r"exp_avg has the shape \[3\], expected \[4, 32\]"),
    "no moment": (lambda c: moments(c).pop("exp_avg_sq"), "exp_avg_sq is missing, expected a tensor"),
    "groups": (
        lambda c: c["optimizer_states"][0]["param_groups"][0]["params"].pop(),
        "optimizer_states have groups",
    ),
    "callback": (lambda c: c["callbacks"].update(AdapterCheckpoint=[1]), "state of AdapterCheckpoint: it is a list"),
    "monitor": (lambda c: c["callbacks"].update(DataMonitor={"tokens": {"a": -1}}), r"state of DataMonitor: tokens"),
    "mixcn_base": (lambda c: c.pop("mixcn_base"), "names no base model"),
}


def test_tampered_content_is_refused_and_named(resume: Callable[[int], Trainer], tmp_path: Path) -> None:
    """One run for all of them: each is changed alone."""
    resume(2)
    path = (tmp_path / "last.ckpt").resolve()
    whole = torch.load(path, weights_only=True)
    for version in ("2.6.6.post0", "2.7.0.dev20270101", "2.7.0rc1", "2.6.6+local.1"):
        check_content(whole | {"pytorch-lightning_version": version}, fitting=True, sharded=False)
    check_content(
        {key: whole[key] for key in ("state_dict", "global_step", "pytorch-lightning_version")},
        fitting=False,
        sharded=False,
    )
    for name, (change, fault) in TAMPERED.items():
        content = copy.deepcopy(whole)
        change(content)
        with pytest.raises(UserError, match=fault) as raised:
            check_content(content, fitting=True, sharded=False)
        assert "\n" not in str(raised.value), name
    with pytest.raises(UserError, match="what it holds is a list of 2 entries, expected a mapping"):
        check_content([1, 2], fitting=True, sharded=False)
    sidecar(path).unlink()
    for name, (change, fault) in ({"step": TAMPERED["step a word"]} | RESUMED).items():
        content = copy.deepcopy(whole)
        change(content)
        torch.save(content, path)
        with pytest.raises(UserError, match=fault) as raised:
            resume(3)
        assert "\n" not in str(raised.value), name
    torch.save(whole, path)
    assert resume(3).global_step == 3


def test_sums_name_the_checkpoint_alone(resume: Callable[[int], Trainer], tmp_path: Path) -> None:
    resume(2)
    path = (tmp_path / "last.ckpt").resolve()
    assert torch.load(path, weights_only=True)["mixcn_summed"] is True
    with sidecar(path).open("a") as sums:
        sums.write(f"{'0' * 64}  ../../../etc/passwd\n")
    assert find_fault(path) == f"{sidecar(path).name} names '../../../etc/passwd', which is no part of the checkpoint"


class Data(FixedBatches):
    """Has a position, as every data module that goes on where a run stopped."""

    def state_dict(self) -> dict[str, Any]:
        return {"rows": 2}


def test_without_a_position_in_the_data_it_does_not_begin_again(
    tiny_base: Path, lora: Make, trainer: Make, tmp_path: Path
) -> None:
    module = PretrainModule(str(tiny_base), dtype="float32", lora=lora())
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=2, filename="{step}")
    trainer(enable_checkpointing=True, callbacks=[saving]).fit(module, datamodule=Data([random_batch([9])] * 4))
    path = tmp_path / "step=2.ckpt"
    content = torch.load(path, weights_only=True)
    del content["Data"]
    torch.save(content, path)
    with pytest.raises(UserError, match="cannot be used: Data, the position in the data, is missing"):
        trainer(max_steps=3).fit(module, datamodule=Data([random_batch([9])] * 4), ckpt_path=path)
