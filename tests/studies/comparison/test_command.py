"""`mixcn compare` on a tiny base; commands run in this process."""

import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_mixcn.cli import main
from lightning_mixcn.testing import save_tiny_model
from tests.studies.comparison.compare_recipes import InThisProcess, lines_of, write_study

SAME = ("comparison.csv", "comparison.json", "comparison.png", "study.json")
# Lightning says so of every resumed run; `mixcn` as a program does not let it.
pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")


@pytest.fixture
def mixcn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> InThisProcess:
    monkeypatch.chdir(tmp_path)
    stand_in = InThisProcess()
    stand_in.patch(monkeypatch)
    return stand_in


def read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def test_a_whole_study(
    mixcn: InThisProcess, tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_study(tmp_path, tiny_base, seeds=[0, 1])
    assert main(["compare", str(recipe), "--out=one"]) == 0
    captured = capsys.readouterr()
    # The start of `base` does not depend on the seed.
    assert mixcn.ran == ["vocab", "vocab", *["validate"] * 3, *["fit"] * 4]
    assert "[7/10] fit: base, seed 0\n" in captured.err
    assert "[10/10] fit: longer, seed 1; about 0 minutes left" in captured.err
    lines = lines_of(tmp_path / "one" / "comparison.csv")
    assert len(lines) == 2 * 2 * 2
    for line in lines:
        folder = tmp_path / "one" / "runs" / line["arm"] / f"seed{line['seed']}"
        facts, start = read(folder / "fit" / "facts.json"), read(folder / "start" / "validate.json")
        last = facts["validations"][-1]["sources"][line["source"]]
        assert float(line["bits_per_byte_before"]) == start["sources"][line["source"]]["bits_per_byte"]
        assert float(line["bits_per_byte_after"]) == last["bits_per_byte"]
        assert last["bits_per_byte"] < start["sources"][line["source"]]["bits_per_byte"]
        assert int(line["text_bytes_seen"]) == facts["text_bytes_seen"]
        assert abs(facts["text_bytes_seen"] - 800) < facts["text_bytes_seen"] / facts["steps"]
        assert int(line["trainable_parameters"]) == facts["parameters"]["trainable"]
    check_table(captured.out, lines)
    costs = lines_of(tmp_path / "one" / "costs.csv")
    for line in costs:
        facts = read(tmp_path / "one" / "runs" / line["arm"] / f"seed{line['seed']}" / "fit" / "facts.json")
        assert float(line["tokens_per_second"]) > 0 < int(line["peak_memory_bytes"])
        # A step's tokens in its seconds are the speed, whatever the validations take.
        tokens = float(line["seconds_per_step"]) * float(line["tokens_per_second"])
        assert tokens == pytest.approx(facts["tokens_seen"] / facts["steps"])
    assert (tmp_path / "one" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    # The same again is not done again; in another folder it gives the same numbers.
    mixcn.ran.clear()
    assert main(["compare", str(recipe), "--out=one"]) == 0
    again = capsys.readouterr()
    assert captured.out.endswith(again.out)
    assert again.out.startswith("# Vocabulary\n")
    assert "was finished before" in again.err
    assert mixcn.ran == []
    # Nor in a folder of an older version, whose recipe and runs are gone.
    report = read(tmp_path / "one" / "comparison.json")
    check_differences(report["differences"], lines, again.out)
    assert report.pop("differences")
    (tmp_path / "one" / "comparison.json").write_text(json.dumps(report), encoding="utf-8")
    kept = {name: (tmp_path / "one" / name).read_bytes() for name in ("comparison.csv", "comparison.png", "costs.csv")}
    shutil.rmtree(tmp_path / "one" / "runs")
    recipe.unlink()
    assert main(["compare", "one"]) == 0
    assert capsys.readouterr().out == again.out
    assert read(tmp_path / "one" / "comparison.json")["differences"]["reference"] == "base"
    assert all((tmp_path / "one" / name).read_bytes() == content for name, content in kept.items())


def check_differences(found: dict[str, Any], lines: list[dict[str, str]], shown: str) -> None:
    """Check pairs of seeds by hand: with two, t is 12.706 and the standard error half of their distance."""
    after = {(line["arm"], line["seed"], line["source"]): float(line["bits_per_byte_after"]) for line in lines}
    for source in ("zh", "en"):
        one, two = (after["longer", seed, source] - after["base", seed, source] for seed in "01")
        interval = found["arms"]["longer"][source]
        half = 12.7062 * abs(one - two) / 2
        assert interval["difference"] == pytest.approx((one + two) / 2)
        assert interval["high"] - interval["difference"] == pytest.approx(half, rel=1e-4)
        assert f"{interval['difference']:+.4f}" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recipe.yaml"], "`out`: expected the folder of the study"),
        (["folder"], "`recipe='folder'` is a folder without comparison.json. Give a recipe"),
        (["folder", "--out=other"], "a finished study takes no `out`"),
    ],
)
def test_a_recipe_or_a_finished_study(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    assert main(["compare", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("mixcn")
@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe"])
@pytest.mark.slow
def test_other_families(family: str, tmp_path: Path) -> None:
    """Paper's and file's names of what LoRA adapts."""
    base = save_tiny_model(tmp_path / "base", family, num_experts=16, num_experts_per_tok=4)
    targets = ["q_proj", "gate_proj", "up_proj", "down_proj"]
    arms = {"paper": {}, "file": {"model.init_args.lora.target_modules": targets}}
    recipe = write_study(tmp_path, base, arms=arms, prepare=None, text_bytes=600, validations=1)
    assert main(["compare", str(recipe), "--out=one"]) == 0
    lines = lines_of(tmp_path / "one" / "comparison.csv")
    assert len(lines) == 2 * 2
    assert all(float(line["bits_per_byte_after"]) < float(line["bits_per_byte_before"]) for line in lines)


@pytest.mark.slow
@pytest.mark.usefixtures("mixcn", "no_pictures")
def test_chosen_experts(tmp_path: Path, tiny_base: Path) -> None:
    """As `configs/studies/experts.yaml` does: a study, a choice from it, and arms that train what is chosen."""
    measure = ["experts", str(tiny_base), "--mode=saliency", "--sequence_length=48", "--max_tokens=96", "--device=cpu"]
    text = [f"{name}={tmp_path / f'{name}.jsonl'}" for name in ("zh", "en")]
    choice = "{prepared}/choice.json"
    prepare = {
        "measured": [*measure, "--text", *text, "--out", "{prepared}/measured"],
        "choice.json": ["experts", "{prepared}/measured", "--choose=1", "--choose_by=load", "--out", choice],
    }
    arms = {
        "all": {},
        "chosen": {"model.init_args.train_only": choice},
        "router": {"model.init_args.train_only": {"experts": [], "attention": False}},
    }
    recipe = write_study(tmp_path, tiny_base, arms=arms, prepare=prepare, text_bytes=200, validations=1)
    assert main(["compare", str(recipe), "--out=one"]) == 0
    runs = lines_of(tmp_path / "one" / "comparison.csv")
    trained = {line["arm"]: int(line["trainable_parameters"]) for line in runs}
    config = read(tiny_base / "config.json")
    # Three projections of an expert, with factors of rank 2.
    expert = 3 * 2 * (config["hidden_size"] + config["intermediate_size"])
    left_out = config["num_hidden_layers"] * (config["num_local_experts"] - 1) * expert
    assert trained["all"] - trained["chosen"] == left_out
    assert trained["router"] < trained["chosen"] - config["num_hidden_layers"] * expert


@pytest.mark.slow
def test_arms_without_training(
    mixcn: InThisProcess, tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `configs/studies/revert.yaml` does: an adapter, and exports of it with layers taken back."""
    made = write_study(tmp_path, tiny_base, prepare=None, text_bytes=400, validations=1, arms={"a": {}, "b": {}})
    assert main(["compare", str(made), "--out=trained"]) == 0
    run = tmp_path / "trained" / "runs" / "a" / "seed0" / "fit"
    scales = {"same": "{}", "first": '{"0": 0}', "none": '{"0-1": 0.0001}'}
    prepare = {
        name: ["export", str(run), f"{{prepared}}/{name}", "--format=peft-per-expert", "--layer_scale", scale]
        for name, scale in scales.items()
    }
    embeddings = {"model.init_args.train_embeddings": True}
    arms: dict[str, dict[str, Any]] = {"whole": {"model.init_args.adapter": str(run / "adapter")}} | {
        name: {"model.init_args.adapter": f"{{prepared}}/{name}"} for name in scales
    }
    arms["first"]["model.init_args.train_only"] = {"layers": [1]}
    untrained: dict[str, Any] = {"train": False, "text_bytes": None, "validations": None, "settings": embeddings}
    recipe = write_study(tmp_path, tiny_base, arms=arms, prepare=prepare, **untrained)
    mixcn.ran.clear()
    capsys.readouterr()
    assert main(["compare", str(recipe), "--out=one"]) == 0
    assert mixcn.ran == [*["export"] * 3, *["validate"] * 4]
    found = {(line["arm"], line["source"]): line for line in lines_of(tmp_path / "one" / "comparison.csv")}
    values = {key: float(line["bits_per_byte_after"]) for key, line in found.items()}
    ends = {
        (line["arm"], line["source"]): float(line["bits_per_byte_after"])
        for line in lines_of(tmp_path / "trained" / "comparison.csv")
    }
    for source in ("zh", "en"):
        # Rank and scaling are written alike; the run's last validation is of its adapter.
        assert values["whole", source] == pytest.approx(ends["a", source], rel=1e-6)
        assert values["same", source] == pytest.approx(values["whole", source], rel=1e-6)
        assert len({values[arm, source] for arm in ("whole", "first", "none")}) == 3
    table = capsys.readouterr().out
    assert "Nothing is trained." in table
    assert f"{values['first', 'zh']:.4f} |" in table
    assert f"{values['first', 'zh'] - values['whole', 'zh']:+.4f} |" in table
    assert (tmp_path / "one" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert main(["compare", "one"]) == 0
    assert table.endswith(capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.usefixtures("mixcn")
def test_arms_of_preference(tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As `configs/studies/preference.yaml` does: other losses, whose rewards differ, on the same pairs."""
    loss, beta = "model.init_args.loss", "model.init_args.beta"
    arms: dict[str, dict[str, Any]] = {"SFT": {loss: "orpo", beta: 1e-6}, "DPO": {loss: "dpo", beta: 0.5}}
    recipe = write_study(tmp_path, tiny_base, arms=arms, prepare=None, text_bytes=2000, validations=1, seeds=[0, 1])
    lines = [
        json.dumps({"prompt": f"Number {number}?", "chosen": f"It is {number}.", "rejected": f"{number} it is not!"})
        for number in range(40)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines), encoding="utf-8")
    config = yaml.safe_load((tmp_path / "run.yaml").read_text(encoding="utf-8"))
    config["model"]["class_path"], config["data"]["class_path"] = "PreferenceModule", "PreferenceDataModule"
    config["model"]["init_args"]["lora"]["lora_alpha"] = 16
    config["data"]["init_args"] = {
        "sources": [{"name": "en", "path": str(tmp_path / "pairs.jsonl")}],
        "val_fraction": 0.3, "sequence_length": 192, "micro_batch_size": 2, "num_streams": 1, "num_workers": 0,
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    assert main(["compare", str(recipe), "--out=one"]) == 0
    table = capsys.readouterr().out
    assert "| pairs of answers, before → after |" in " ".join(table.split())
    report = read(tmp_path / "one" / "comparison.json")
    margins: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}
    for run in report["runs"]:
        margins[run["arm"]].append(run["sources"]["en"]["pairs"]["likelihood_margin_nats_per_token"])
    # The same model on the same pairs, whatever the loss.
    starts = {margin["before"] for of_arm in margins.values() for margin in of_arm}
    assert max(starts) - min(starts) < 1e-6
    assert all(margin["after"] > margin["before"] for margin in margins["DPO"])
    ends = report["differences"]["arms"]["DPO"]
    assert list(ends) == ["en", "en accuracy", "en margin", "en nll of chosen"]
    expected = [one["after"] - other["after"] for one, other in zip(margins["DPO"], margins["SFT"], strict=True)]
    assert ends["en margin"]["difference"] == pytest.approx(statistics.fmean(expected))


def check_table(shown: str, lines: list[dict[str, str]]) -> None:
    """Check that the first table is mean and deviation of the CSV's seeds."""
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in shown.splitlines() if row.startswith("|")]
    assert rows[0] == ["arm", "zh before", "zh after", "zh change", "en before", "en after", "en change"]
    for row in rows[2:4]:
        for column, source in ((2, "zh"), (5, "en")):
            values = [
                float(line["bits_per_byte_after"])
                for line in lines
                if (line["arm"], line["source"]) == (row[0], source)
            ]
            assert row[column] == f"{statistics.fmean(values):.3f} ± {statistics.stdev(values):.3f}"


@pytest.mark.slow
def test_killed_anywhere_it_goes_on_to_the_same_files(
    mixcn: InThisProcess, tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_mixcn.callbacks import RunFacts

    recipe = write_study(tmp_path, tiny_base)
    for dies_in in (1, 0, 2):
        mixcn.ran.clear()
        mixcn.dies_in = dies_in
        assert main(["compare", str(recipe), "--out=killed"]) == 130
    mixcn.dies_in = None
    # In the middle of a run, which then goes on with its checkpoint.
    counts: Any = RunFacts.on_train_batch_end

    def dying(self: RunFacts, trainer: Any, *arguments: Any) -> None:
        counts(self, trainer, *arguments)
        if trainer.global_step == 3:
            raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(RunFacts, "on_train_batch_end", dying)
        with pytest.raises(MemoryError):
            main(["compare", str(recipe), "--out=killed"])
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    assert (killed / "runs/base/seed0/fit/checkpoints/last.ckpt").exists()
    assert not (killed / "comparison.md").exists()
    mixcn.ran.clear()
    assert main(["compare", str(recipe), "--out=killed"]) == 0
    assert mixcn.ran == ["fit", "fit"]
    assert main(["compare", str(recipe), "--out=whole"]) == 0
    for name in SAME:
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    # Between the last checkpoint and the facts.
    for name in ("runs/longer/seed0/fit/facts.json", "comparison.json"):
        (whole / name).unlink()
    mixcn.ran.clear()
    assert main(["compare", str(recipe), "--out=whole"]) == 0
    assert mixcn.ran == ["fit"]
    assert (killed / "comparison.json").read_bytes() == (whole / "comparison.json").read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"arms": {"a": {"trainer.max_step": 3}, "b": {}}},
            "--trainer.max_step=3 (did you mean 'trainer.max_steps'?)",
        ),
        ({"arms": {"a": {}, "b": {"model.init_args.lora.rank": 3}}}, "arm 'b' of the recipe: model: "),
        ({"settings": {"data.init_args.weight_unit": "words"}}, "weight_unit"),
        ({"settings": {"model.init_args.base": "nowhere"}}, "'nowhere' is not there. Give a folder"),
        ({"settings": {"data.init_args.sources": [{"name": "a", "path": "none.jsonl"}]}}, "none.jsonl"),
        ({"prepare": {"x": ["vocab", "train", "text", "--sizes=3"]}}, "'x' of the recipe: "),
        ({"prepare": {"x": ["fit"]}}, "'fit' is no command"),
        ({"needs": {"base": "make base"}}, "is not there. First run: make base"),
    ],
)
def test_nothing_is_started_with_bad_input(
    changes: dict[str, Any], message: str, mixcn: InThisProcess, tmp_path: Path, tiny_base: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    recipe = write_study(tmp_path, tiny_base, **changes)
    assert main(["compare", str(recipe), "--out=study"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert mixcn.ran == []
    assert not (tmp_path / "study").exists()


def test_other_text_for_one_arm_is_no_comparison(
    mixcn: InThisProcess, tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = {"data.init_args.val_sources": [{"name": "zh", "path": "zh.jsonl"}]}
    recipe = write_study(tmp_path, tiny_base, prepare=None, arms={"a": {}, "b": other})
    assert main(["compare", str(recipe), "--out=study"]) == 2
    assert "Arms are validated on different text: bytes by source are" in capsys.readouterr().err
    assert mixcn.ran == ["validate", "validate"]


def test_a_folder_of_something_else(
    mixcn: InThisProcess, tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_study(tmp_path, tiny_base, prepare=None, arms={"a": {}, "b": {"model.init_args.new_rows": "zeros"}})
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "mine").touch()
    assert main(["compare", str(recipe), "--out=study"]) == 2
    assert "is a folder with something else in it" in capsys.readouterr().err
    mixcn.dies_in = 0
    assert main(["compare", str(recipe), "--out=begun"]) == 130
    recipe.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | {"text_bytes": 999}))
    capsys.readouterr()
    assert main(["compare", str(recipe), "--out=begun"]) == 2
    assert "holds a study with `text_bytes=800`, but now it is 999" in capsys.readouterr().err
