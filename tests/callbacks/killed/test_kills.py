"""kill -9 at a call to the file system: the next run goes on or does it again, and nothing of the killed one is left.

A fixed sample of the calls in the quick run, all of them in the slow one.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_mixcn.testing import save_tiny_model
from tests.callbacks.conftest import ForkedFits
from tests.studies.benchmark_data import harness, write_ceval
from tests.studies.comparison.compare_recipes import write_study

# Command to a function that prepares the process for it, see `ForkedFits.start`.
COMMANDS = {
    "fit": "",
    "quantize": "",
    "export": "",
    "quantization": "",
    "experts": "",
    "sheet": "",
    "score": "",
    "vocab train": "",
    "vocab merge": "",
    "upcycle": "",
    "compare": "tests.studies.comparison.compare_recipes:run_in_this_process",
    "evaluate": "tests.studies.benchmark_data:index_few_tasks",
}

# What a run took, and the configuration, which says whether it was resumed.
DIFFERENT = ("config.yaml", "costs.csv", "facts.json", "comparison.md")


@pytest.fixture(scope="module")
def commands(
    forked_fits: ForkedFits, fit_config: Path, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[str]]:
    """Arguments of each command, which writes to ``out`` in the folder that it works in."""
    folder = tmp_path_factory.mktemp("inputs")
    steps = ["--trainer.max_steps=2", "--trainer.default_root_dir"]
    fit = ["fit", "--config", str(fit_config), *steps]
    assert run(forked_fits, folder, [*fit, "run"]) == 0, forked_fits.log.read_text()[-4000:]
    text = str(json.loads(fit_config.read_text())["data"]["init_args"]["sources"][0]["path"])
    (folder / "questions.txt").write_text("天气？\n", encoding="utf-8")
    models, read = [str(tiny_base), str(folder / "run")], ["--text", f"zh={text}"]
    few = ["--sequence_length=16", "--max_tokens=32"]
    sheet = ["preference", "sheet", *models, f"--questions={folder}/questions.txt", "--max_new_tokens=1"]
    vocab = ["vocab", "train", text, "--vocab_size=24"]
    for made in ([*sheet, "--out=sheet"], [*vocab, "--out=pieces.model"]):
        assert run(forked_fits, folder, made) == 0, forked_fits.log.read_text()[-4000:]
    (item,) = json.loads((folder / "sheet" / "key.json").read_text())["items"]
    (folder / "judge.csv").write_text(f"item,verdict\n{item['name']},left\n", encoding="utf-8")
    write_ceval(folder / "ceval", questions=2)
    recipe = write_study(folder, tiny_base, validations=1)
    return {
        "fit": [*fit, "out"],
        "quantize": ["quantize", str(tiny_base), "out"],
        "export": ["export", str(folder / "run"), "out"],
        "quantization": ["quantization", str(tiny_base), *read, "--out=out", *few],
        "experts": ["experts", str(tiny_base), *read, "--out=out", *few],
        "sheet": [*sheet, "--out=out"],
        "score": ["preference", "score", f"{folder}/judge.csv", f"--key={folder}/sheet/key.json", "--out=out"],
        "vocab train": [*vocab, "--out=out"],
        "vocab merge": ["vocab", "merge", str(tiny_base), f"{folder}/pieces.model", "--out=out"],
        "upcycle": ["upcycle", str(save_dense(folder / "dense")), "out", "--num_experts=2"],
        "compare": ["compare", str(recipe), "--out=out"],
        "evaluate": ["evaluate", str(folder / "run"), "--tasks=ceval_two", f"--data_dir={folder}/ceval", "--out=out",
                     "--quantization=none", "--dtype=float32", "--device=cpu"],
    }  # fmt: skip


def save_dense(folder: Path) -> Path:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def run(forked_fits: ForkedFits, folder: Path, arguments: list[str], prepare: str = "", kill_at: int = -1) -> int:
    folder.mkdir(exist_ok=True)
    forked_fits.start(folder, arguments, kill_at=kill_at, cache=str(folder / "cache"), prepare=prepare)
    (code,) = forked_fits.wait()
    return code


def content(folder: Path) -> dict[str, str]:
    """Digests of what the same command writes twice."""
    out, found = folder / "out", {}
    for path in [out, *sorted(out.rglob("*"))]:
        if path.is_file() and path.suffix not in (".png", ".ckpt", ".sha256") and path.name not in DIFFERENT:
            written = path.read_bytes()
            if path.name == "experts.json":
                written = json.dumps(json.loads(written) | {"seconds": 0}).encode()
            found[str(path.relative_to(folder))] = hashlib.sha256(written).hexdigest()
    return found


@pytest.mark.multiprocess
@pytest.mark.parametrize("every", [40, pytest.param(1, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
@pytest.mark.parametrize("name", COMMANDS)
def test_the_next_run_is_as_if_nothing_had_been_killed(
    name: str, every: int, forked_fits: ForkedFits, commands: dict[str, list[str]], tmp_path: Path
) -> None:
    if name == "evaluate":
        harness()
    prepare = COMMANDS[name]
    code = run(forked_fits, tmp_path / "whole", commands[name], prepare, kill_at=0)
    assert code == 0, forked_fits.log.read_text()[-4000:]
    wanted, calls = content(tmp_path / "whole"), forked_fits.calls()
    assert wanted
    assert len(calls) > 2
    faults: dict[str, str] = {}
    for number, call in calls[min(every, len(calls)) // 2 :: every]:
        killed = tmp_path / str(number)
        assert run(forked_fits, killed, commands[name], prepare, kill_at=number) == -9, call
        again = ["--ckpt_path=last"] if any(killed.glob("out/checkpoints/step=*.ckpt")) else []
        code, log = run(forked_fits, killed, [*commands[name], *again], prepare), forked_fits.log.read_text()
        found, left = content(killed), sorted(str(path.relative_to(killed)) for path in killed.rglob(".*"))
        # A command that had just finished refuses to replace its output.
        if not (code == 0 or (code == 2 and "is not empty" in log) or "is a file, expected a new" in log):
            faults[call] = log[-2000:]
        elif found != wanted or left:
            faults[call] = f"differs: {sorted(file for file, _ in wanted.items() ^ found.items())}, left: {left}"
        shutil.rmtree(killed)
    assert not faults, "\n".join(f"{call}: {fault}" for call, fault in faults.items())


@pytest.mark.multiprocess
@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe"])
def test_another_family_goes_on_exactly(family: str, forked_fits: ForkedFits, fit_config: Path, tmp_path: Path) -> None:
    arguments = ["fit", "--config", str(fit_config), f"--model.base={save_tiny_model(tmp_path / 'base', family)}"]
    steps = ["--trainer.max_steps=12"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    for folder in (killed, whole):
        folder.mkdir()
    forked_fits.start(killed, [*arguments, *steps, "--trainer.default_root_dir=out"])
    forked_fits.wait_for(killed / "out" / "checkpoints", "last.ckpt")
    forked_fits.kill()
    forked_fits.wait()
    assert not (killed / "out/checkpoints/step=00000012.ckpt").exists()
    for folder, again in ((killed, ["--ckpt_path=last"]), (whole, [])):
        forked_fits.start(folder, [*arguments, *steps, "--trainer.default_root_dir=out", *again])
        assert forked_fits.wait() == [0], forked_fits.log.read_text()[-4000:]
    assert content(killed) == content(whole)


def test_a_second_run_is_refused_while_the_first_one_works(
    forked_fits: ForkedFits, fit_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments: list[Any] = ["fit", "--config", str(fit_config), f"--trainer.default_root_dir={tmp_path / 'run'}"]
    forked_fits.start(tmp_path, [*arguments, "--trainer.max_steps=100000"])
    forked_fits.wait_for(tmp_path / "run" / "checkpoints", "last.ckpt")
    (process,) = forked_fits.processes()
    from lightning_mixcn.cli import main

    assert main([*arguments, "--ckpt_path=last", "--trainer.max_steps=1"]) == 2
    expected = f"`trainer.default_root_dir='{tmp_path / 'run'}'` is being written by process {process} on "
    assert expected in capsys.readouterr().err
    assert main(["validate", *arguments[1:], "--trainer.limit_val_batches=1"]) == 0  # which writes other files
    forked_fits.kill()
    forked_fits.wait()
