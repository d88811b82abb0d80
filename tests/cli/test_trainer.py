"""``mixcn fit`` and the like on a tiny model, from a YAML file as a user writes it."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]  # published without types
    EventAccumulator,
)

from lightning_mixcn.cli import main
from lightning_mixcn.cli.parser import config_path


def write_source(path: Path, sentence: str, documents: int = 40) -> Path:
    lines = (json.dumps({"text": sentence * (1 + number % 4) + str(number)}) for number in range(documents))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def config(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return a configuration; paths are relative to the folder that the test runs in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    write_source(tmp_path / "zh.jsonl", "今天天气很好。")
    write_source(tmp_path / "en.jsonl", "The weather is fine. ")
    content: dict[str, Any] = yaml.safe_load(CONFIG)
    content["model"]["init_args"]["base"] = str(tiny_base)
    return content


CONFIG = """
model:
  class_path: PretrainModule
  init_args:
    dtype: float32
    lora:
      {r: 4, lora_alpha: 8, lora_dropout: 0.05, target_modules: [q_proj, k_proj, v_proj, o_proj, gate, w1, w2, w3]}
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1.0e-3}}
    lr_scheduler: {class_path: WarmupCosine, init_args: {warmup_fraction: 0.25}}
data:
  class_path: PretrainDataModule
  init_args:
    sources: [{name: zh, path: zh.jsonl, weight: 0.9}, {name: en, path: en.jsonl, weight: 0.1}]
    test_sources: [{name: zh, path: zh.jsonl}]
    predict_sources: [{name: en, path: en.jsonl}]
    sequence_length: 48
    micro_batch_size: 2
    num_streams: 4
    num_workers: 0
    val_fraction: 0.2
trainer:
  accelerator: cpu
  max_steps: 4
  accumulate_grad_batches: 2
  val_check_interval: 4
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - {class_path: SampleText, init_args: {prompts: [今天], max_new_tokens: 3}}
    - {class_path: StepCheckpoint, init_args: {every_n_steps: 2}}
"""


def run(config: dict[str, Any], command: str = "fit", *options: str) -> int:
    Path("tiny.yaml").write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    return main([command, "--config", "tiny.yaml", *options])


def test_a_run_from_training_to_prediction(config: dict[str, Any]) -> None:
    root = Path("runs/tiny")  # the default: the configuration's name
    assert run(config) == 0
    names = {"adapter", "adapter_best", "checkpoints", "config.yaml", "samples.jsonl", "tensorboard"}
    assert names == {path.name for path in root.iterdir()}
    assert (root / "checkpoints" / "last.ckpt").resolve().name == "step=00000004.ckpt"
    assert (root / "adapter" / "adapter_model.safetensors").is_file()
    saved = yaml.safe_load((root / "config.yaml").read_text(encoding="utf-8"))
    assert saved["trainer"]["default_root_dir"] == str(root)
    assert saved["model"]["init_args"]["lora"]["init_args"]["r"] == 4

    assert run(config, "validate", "--ckpt_path", "last") == 0
    report = json.loads((root / "validate.json").read_text(encoding="utf-8"))
    assert set(report["sources"]) == {"zh", "en"}
    assert report["steps_trained"] == 4
    assert report["checkpoint"].endswith("step=00000004.ckpt")

    assert run(config, "test", "--ckpt_path", "last") == 0
    report = json.loads((root / "test.json").read_text(encoding="utf-8"))
    texts = [json.loads(line)["text"] for line in Path("zh.jsonl").read_text(encoding="utf-8").splitlines()]
    # Bytes of every text, and every byte is a token, as is each end.
    assert report["sources"]["zh"]["bytes"] == sum(len(text.encode()) for text in texts)
    assert report["sources"]["zh"]["tokens"] == report["sources"]["zh"]["bytes"] + len(texts)

    assert run(config, "predict", "--ckpt_path", "last") == 0
    lines = [json.loads(line) for line in (root / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    texts = [json.loads(line)["text"] for line in Path("en.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(line["source"], line["index"], line["bytes"]) for line in lines] == [
        ("en", index, len(text.encode())) for index, text in enumerate(texts)
    ]
    assert (root / "config.predict.yaml").is_file()


def test_validation_after_a_time_and_an_empty_list_of_loggers(
    config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    config["trainer"] |= {"val_check_interval": {"minutes": 30}, "logger": [], "max_steps": 1}
    assert run(config) == 0
    assert not Path("runs/tiny/tensorboard").exists()
    capsys.readouterr()
    assert run(config, "fit", "--trainer.val_check_interval={}", "--trainer.default_root_dir=other") == 2
    assert "`trainer.val_check_interval={}`: expected" in capsys.readouterr().err


def test_what_tensorboard_shows(config: dict[str, Any]) -> None:
    assert run(config) == 0
    events = EventAccumulator("runs/tiny/tensorboard").Reload()
    expected = {
        "data/en/tokens",
        "data/padding_share",
        "data/seconds_waiting",
        "data/wait_share",
        "data/zh/tokens",
        "lr-AdamW",
        "throughput/tokens_per_second",
        "train/auxiliary_loss",
        "train/gradient_norm",
        "train/loss",
        "train/nll_nats_per_token",
        "val/bits_per_byte",
        "val/en/bits_per_byte",
        "val/en/nll_nats_per_token",
        "val/zh/bits_per_byte",
        "val/zh/nll_nats_per_token",
    }
    assert expected <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("train/loss")] == [0, 1, 2, 3]
    # One step of warm-up of four, then a cosine to a tenth.
    rates = {event.step: event.value for event in events.Scalars("lr-AdamW")}
    assert [rates[0], rates[1]] == pytest.approx([0.0005, 0.001])
    assert {"config/text_summary", "samples/0/text_summary"} <= set(events.Tags()["tensors"])


def test_each_group_of_learning_rates_has_a_curve(config: dict[str, Any]) -> None:
    config["trainer"] |= {"limit_val_batches": 0, "max_steps": 2}
    config["model"]["init_args"]["learning_rates"] = {"lora_B": 16, "router": 0.5}
    assert run(config) == 0
    events = EventAccumulator("runs/tiny/tensorboard").Reload()
    tags = {tag.removeprefix("lr-AdamW/") for tag in events.Tags()["scalars"] if tag.startswith("lr-")}
    places = [place for place in ("embeddings", "attention", "router", "experts") if f"{place}.lora_B" in tags]
    assert {"router.lora_A", "router.lora_B"} < tags
    assert tags - {"embeddings"} == {f"{place}.{factor}" for place in places for factor in ("lora_A", "lora_B")}
    first = {tag: events.Scalars(f"lr-AdamW/{tag}")[0].value for tag in tags}
    assert first["router.lora_B"] == pytest.approx(16 * first["router.lora_A"])
    assert first["router.lora_A"] == pytest.approx(0.5 * first["experts.lora_A"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lora_C": 16}, "expected one of embeddings, attention, router, experts, lora_A, lora_B"),
        ({"lora_B": -1}, "expected more than 0"),
        ({"lora_B": 1000, "router": 1000}, "router.lora_B would train at 100000, expected at most 1000"),
    ],
)
def test_wrong_learning_rates_are_one_line(
    given: dict[str, float], message: str, config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    config["model"]["init_args"]["learning_rates"] = given
    config["model"]["init_args"]["optimizer"]["init_args"]["lr"] = 0.1
    assert run(config) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sources": ["zh"], "coefficient": -1}, "`kl_to_base['coefficient']=-1"),
        ({"sources": ["zhh"], "coefficient": 1.0}, "`kl_to_base.sources[0]='zhh'` is no source (did you mean 'zh'?)"),
        ({"sources": ["zh"]}, "kl_to_base: Missing required keys: {'coefficient'}"),
    ],
)
def test_a_wrong_kl_to_base_is_one_line(
    given: dict[str, Any], message: str, config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    config["model"]["init_args"] |= {"kl_to_base": given, "train_embeddings": False}
    assert run(config) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("mixcn: error:") == 1


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(config: dict[str, Any]) -> None:
    """As after a kill between the checkpoints of steps 2 and 4."""
    config["trainer"]["limit_val_batches"] = 0
    assert run(config) == 0
    folder = Path("runs/tiny/checkpoints")
    whole = torch.load(folder / "last.ckpt", weights_only=True)
    (folder / "step=00000004.ckpt").unlink()
    (folder / "last.ckpt").unlink()
    (folder / "last.ckpt").symlink_to("step=00000002.ckpt")
    assert run(config, "fit", "--ckpt_path=last") == 0
    resumed = torch.load(folder / "last.ckpt", weights_only=True)
    assert resumed["global_step"] == whole["global_step"] == 4
    assert all(torch.equal(value, whole["state_dict"][name]) for name, value in resumed["state_dict"].items())
    names = ["last.ckpt", *(f"step=0000000{step}.ckpt{ending}" for step in (2, 4) for ending in ("", ".sha256"))]
    assert sorted(path.name for path in folder.iterdir()) == names


def test_the_saved_configuration_runs(config: dict[str, Any]) -> None:
    config["trainer"]["max_steps"] = 1
    assert run(config) == 0
    Path("runs/tiny").rename("runs/before")
    assert main(["fit", "--config", "runs/before/config.yaml"]) == 0
    ends = [torch.load(f"runs/{name}/checkpoints/last.ckpt", weights_only=True) for name in ("before", "tiny")]
    assert all(torch.equal(value, ends[1]["state_dict"][name]) for name, value in ends[0]["state_dict"].items())


def test_a_run_goes_on_from_an_adapter_without_its_configuration(config: dict[str, Any]) -> None:
    """It is the run that has it, and resumes."""
    config["trainer"]["max_steps"] = 2
    assert run(config) == 0
    arguments, folders = config["model"]["init_args"], ("runs/given", "runs/own")
    arguments["adapter"], arguments["lora"]["lora_dropout"] = "runs/tiny", 0.0
    for folder in folders:
        assert run(config, "fit", f"--trainer.default_root_dir={folder}") == 0
        arguments["lora"] = None
    ends = [torch.load(f"{folder}/checkpoints/last.ckpt", weights_only=True)["state_dict"] for folder in folders]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    on = ("--trainer.default_root_dir=runs/own", "--ckpt_path=last", "--trainer.max_steps=4")
    assert run(config, "fit", *on) == 0


def change(config: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for parent in parents:
        config = config[parent]
    config[last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model.init_args.bsae", "x", "Option 'bsae' is not accepted (did you mean 'base'?)"),
        ("model.init_args.lora.rank", 4, "Option 'rank' is not accepted"),
        ("model.init_args.lora.peft_type", "LORE", "`lora.peft_type='LORE'`: expected LORA. Leave it out"),
        (
            "model.class_path",
            "PretrainModul",
            "model: there is no class 'PretrainModul' (did you mean 'PretrainModule'?)",
        ),
        ("model.init_args.quantization", "int8", "int8"),
        ("data.init_args.sequence_lenght", 48, "is not accepted (did you mean 'sequence_length'?)"),
        ("trainer.max_step", 4, "'trainer.max_step' (did you mean 'trainer.max_steps'?)"),
        ("modell", {"class_path": "PretrainModule"}, "'modell.class_path' (did you mean 'model'?)"),
        (
            "trainer.callbacks",
            [{"class_path": "SampleTexts"}],
            "there is no class 'SampleTexts' (did you mean 'SampleText'?)",
        ),
        ("model.init_args.base", "nowhere", "'nowhere' is not there. Give a folder"),
        ("trainer.precision", "bf16-true", "Set `trainer.precision: 32-true`"),
        ("model.init_args.lora.target_modules", ["fc1"], "'fc1', which matches nothing"),
        ("data.init_args.sources", [{"name": "zh", "path": "none*.jsonl"}], "`sources[0].path='none*.jsonl'` matches"),
        ("data.init_args.sequence_length", 0, "`sequence_length=0`"),
        ("trainer.max_steps", -1, "`trainer.max_steps=-1`"),
        (
            "model.init_args.optimizer.init_args.lr",
            1e30,
            "optimizer`: `lr=1e+30`, expected at least 0 and at most 1000",
        ),
        ("model.init_args.optimizer.init_args.lr", -1, "`model.init_args.optimizer` cannot be made: Invalid learning"),
        ("model.init_args.optimizer.init_args.eps", math.inf, "`eps=inf`, expected a finite number"),
        ("model.init_args.lr_scheduler.init_args.warmup_fraction", 2, "`warmup_fraction=2.0`: expected less than 1"),
        ("model.init_args.seed", None, "`seed=None`: expected a whole number; see PretrainModule"),
        ("trainer.gradient_clip_val", -1, "`trainer.gradient_clip_val=-1`: expected at least 0"),
        ("trainer.gradient_clip_val", math.nan, "`trainer.gradient_clip_val=nan`: expected a finite number"),
        ("trainer.accumulate_grad_batches", -3, "`trainer.accumulate_grad_batches=-3`: expected at least 1"),
        ("trainer.val_check_interval", 10**21, "`trainer.val_check_interval=1000000000000000000000`: expected at most"),
        ("trainer.max_time", {}, "`trainer.max_time={}`: expected a time such as {minutes: 30}"),
        ("trainer.max_time", {"hours": -1}, "`trainer.max_time['hours']=-1`: expected at least 0"),
        (
            "trainer.callbacks",
            [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"save_top_k": -5}}],
            "`ModelCheckpoint` cannot be made: Invalid value for save_top_k=-5",
        ),
        ("trainer.profiler", "fastest", "`trainer` cannot be made: "),
        ("seed_everything", -1, "`seed_everything=-1`: expected at least 0"),
        ("ckpt_path", "best", "`--ckpt_path best`: runs/tiny has none yet"),
        ("data", None, "`data` is missing: give a data module"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    path: str, value: Any, message: str, config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    change(config, path, value)
    assert run(config) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mixcn: error:")]
    assert len(error) == 1
    assert message in error[0]
    assert not list(Path().glob("runs/tiny/checkpoints/*"))


@pytest.mark.parametrize(
    ("record", "message"),
    [(b"{", "line 1 is not JSON"), (b'{"text": "\xff"}', "line 1 is not UTF-8"), (b'{"text": 3}', "line 1")],
    ids=["json", "utf-8", "number"],
)
def test_a_bad_record_is_one_line(
    record: bytes, message: str, config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.jsonl").write_bytes(record + b"\n")
    config["data"]["init_args"]["sources"] = [{"name": "zh", "path": str(tmp_path / "bad.jsonl")}]
    assert run(config) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mixcn: error:")]
    assert message in error


def test_nan_keeps_the_last_checkpoint(
    config: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_mixcn.modules.checks.LARGEST_RATE", math.inf)
    assert run(config) == 0
    before = torch.load("runs/tiny/checkpoints/last.ckpt", weights_only=True)
    config["trainer"]["max_steps"] = 9
    content = Path("runs/tiny/checkpoints/last.ckpt").read_bytes()
    assert run(config, "fit", "--ckpt_path=last", "--model.init_args.optimizer.init_args.lr=1e30") == 2
    assert "is nan; nothing was updated in this step" in capsys.readouterr().err
    assert Path("runs/tiny/checkpoints/last.ckpt").read_bytes() == content
    assert before["global_step"] == 4


@pytest.mark.parametrize(
    ("command", "path", "message"),
    [
        ("validate", "last", "`--ckpt_path last`: there is no checkpoint in"),
        ("fit", "nothing.ckpt", "`--ckpt_path nothing.ckpt` is not there"),
    ],
)
def test_a_checkpoint_that_is_not_there(
    command: str, path: str, message: str, config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(config, command, "--ckpt_path", path) == 2
    assert message in capsys.readouterr().err


def test_another_base_does_not_go_unnoticed(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """LightningCLI would take `base` from the checkpoint's hyper-parameters."""
    from lightning_mixcn.testing import save_tiny_mixtral

    config["trainer"]["max_steps"] = 1
    assert run(config) == 0
    config["model"]["init_args"]["base"] = str(save_tiny_mixtral(tmp_path / "other", seed=1))
    assert run(config, "validate", "--ckpt_path", "runs/tiny/checkpoints/last.ckpt") == 2
    assert "The checkpoint was trained on the base" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_another_scaling_is_refused_by_every_subcommand(
    command: str, config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    config["trainer"]["max_steps"] = 1
    assert run(config) == 0
    assert run(config, command, "--ckpt_path=last", "--model.init_args.lora.lora_alpha=80") == 2
    assert "`lora.lora_alpha` was 8 and is 80" in capsys.readouterr().err


def test_the_configuration_s_own_callbacks_and_logger_stay(config: dict[str, Any]) -> None:
    config["trainer"] |= {
        "max_steps": 1,
        "logger": {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "own"}},
        "callbacks": [{"class_path": "ModelCheckpoint", "init_args": {"filename": "mine", "every_n_train_steps": 1}}],
    }
    assert run(config) == 0
    assert [path.name for path in Path("runs/tiny/checkpoints").iterdir()] == ["mine.ckpt"]
    assert not Path("runs/tiny/tensorboard").exists()
    assert list(Path("own").rglob("metrics.csv"))


SUBCLASS = """
import torch
from lightning_mixcn import PretrainModule

class WeightedSources(PretrainModule):
    def __init__(self, first_source_weight: float = 3.0, **kwargs):
        super().__init__(**kwargs)
        self.first_source_weight = first_source_weight

    def compute_loss(self, batch, output):
        weight = torch.where(batch["source_ids"] == 0, self.first_source_weight, 1.0)
        return (output.nll * weight).sum(), (weight * (batch["labels"] != -100)).sum()
"""


def test_a_subclass_in_the_folder_one_works_in(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("my_losses.py").write_text(SUBCLASS, encoding="utf-8")
    config["trainer"]["max_steps"] = 1
    config["model"]["class_path"] = "my_losses.WeightedSources"
    config["model"]["init_args"]["first_source_weight"] = 2.0
    assert run(config) == 0
    saved = torch.load("runs/tiny/checkpoints/last.ckpt", weights_only=True)
    assert saved["hyper_parameters"]["first_source_weight"] == 2.0


@pytest.mark.parametrize("name", ["trainer/cpu", "trainer/cpu.yaml", "configs/trainer/cpu.yaml"])
def test_a_config_of_the_package_is_known_by_its_name(
    name: str, config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("demo.yaml").write_text(yaml.safe_dump(config | {"seed_everything": 7}), encoding="utf-8")
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", "demo.yaml", "--config", name, "--print_config"])
    assert end.value.code == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["seed_everything"] == 7  # a file that is there comes before a name
    assert shown["trainer"]["accelerator"] == "cpu"


def test_an_unknown_config_says_which_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--config", "pretrain"]) == 2
    error = capsys.readouterr().err
    assert "`--config pretrain` is no file" in error
    assert "pretrain_mixtral_8x7b, " in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_every_subcommand(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab", reason="the completion script is shtab's")
    with pytest.raises(SystemExit) as end:
        main([f"--print_completion=shtab-{shell}"])
    assert end.value.code == 0
    script = capsys.readouterr().out
    for word in ("fit", "predict", "upcycle", "quantize", "num_experts", "default_root_dir"):
        assert word in script
    assert len(script) < 5_000_000  # a shell reads it at its start


def test_only_a_file_hides_a_configuration_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    assert Path(config_path("demo")).name == "demo.yaml"
    (tmp_path / "demo.yaml").touch()
    assert config_path("demo.yaml") == "demo.yaml"
    content = f'{{"trainer": "{"x" * 400}"}}'
    assert config_path(content) == content
