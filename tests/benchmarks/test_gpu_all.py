"""The one command for a GPU: what becomes of stages that fail, its plan, its winners, and all of it on a CPU."""

import argparse
import io
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lightning_mixcn.model.experts.path import FastestPaths, read_fastest

ROOT = Path(__file__).parents[2]
SMALL = ["--layers", "1", "--hidden", "256", "--intermediate", "512"]
Imported = Callable[[str], Any]


@pytest.fixture
def imported(monkeypatch: pytest.MonkeyPatch) -> Imported:
    """Import a module of benchmarks/, which is no package."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for name in [name for name in sys.modules if name == "gpu_all" or name.startswith("gpu_stages")]:
        monkeypatch.delitem(sys.modules, name)

    def module(name: str) -> Any:
        __import__(name)
        return sys.modules[name]

    return module


WRITE = "import pathlib, sys, time, os; file = pathlib.Path(sys.argv[1]); file.write_text({!r}); "


@pytest.mark.parametrize(
    ("script", "error", "figures"),
    [
        (WRITE.format('{"a": 1}'), None, {"a": 1}),
        (WRITE.format('{"a": 1, "error": "it\\n broke"}') + "sys.exit(1)", "it broke", {"a": 1}),
        (WRITE.format('{"a": 1}') + "sys.exit(3)", "ended with exit code 3", {"a": 1}),
        (WRITE.format('{"a": 1}') + "os.kill(os.getpid(), 11)", "ended by SIGSEGV", {"a": 1}),
        (WRITE.format('{"a": 1}') + "time.sleep(600)", "killed after 2 s, its limit", {"a": 1}),
        ("raise SystemExit", "wrote no figures", None),
        (WRITE.format('{"a": ') + "sys.exit(3)", "ended with exit code 3", None),
        (WRITE.format('{"a": '), "wrote figures that cannot be read: Expecting value", None),
        (WRITE.format("[1]"), "wrote figures that cannot be read: a JSON list, expected an object", None),
        (WRITE.format("\xff" * 9) + "file.write_bytes(bytes(range(128, 256)))", "cannot be read", None),
        ("import sys; open(sys.argv[1], 'wb').truncate(2**25)", "bytes, expected at most", None),
    ],
    ids=["good", "says why", "exit code", "signal", "late", "nothing", "both", "cut", "list", "bytes", "large"],
)
def test_a_stage_is_its_figures_and_a_line(
    imported: Imported, tmp_path: Path, script: str, error: str | None, figures: Any
) -> None:
    file, log = tmp_path / "figures.json", io.StringIO()
    limit = 2 if "sleep" in script else 60
    entry = imported("gpu_stages.running").run_stage([sys.executable, "-c", script, str(file)], limit, file, log)
    assert entry.get("figures") == figures
    assert error in entry["error"] if error else "error" not in entry
    assert not file.exists()


def test_all_that_a_stage_has_started_ends_with_it(imported: Imported, tmp_path: Path) -> None:
    """A process that holds the GPU, and the pipe of what is printed, would stop all later stages."""
    child = (
        "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']).pid)"
    )
    log = io.StringIO()
    imported("gpu_stages.running").run_stage([sys.executable, "-c", child], 60, tmp_path / "figures.json", log)
    pid = int(log.getvalue())
    for _ in range(200):  # the kernel may take a moment to end it
        if not Path(f"/proc/{pid}").exists() or Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] == "Z":
            return
        time.sleep(0.05)
    pytest.fail(f"process {pid} is still there")


def test_what_a_stage_prints_is_in_the_log(imported: Imported, tmp_path: Path, capsys: Any) -> None:
    log, script = io.StringIO(), "import sys; print('one'); print('two', file=sys.stderr)"
    imported("gpu_stages.running").run_stage([sys.executable, "-c", script], 60, tmp_path / "figures.json", log)
    assert sorted(log.getvalue().split()) == ["one", "two"]
    assert capsys.readouterr().out == log.getvalue()


def test_time_is_shared(imported: Imported) -> None:
    running = imported("gpu_stages.running")
    first, second, last = (running.Stage(name, seconds, 10) for name, seconds in (("a", 100), ("b", 50), ("c", 20)))
    limit = running.limit_seconds
    assert limit(first, 170, [second, last]) == 130  # its share, and what it may be late
    assert limit(second, 170, [last]) == 150  # what the first has left
    assert limit(second, 60, [last]) == 40  # the last one keeps its time
    assert limit(second, 29, [last]) == 0
    assert limit(last, 9, []) == 0
    assert limit(last, 15, []) == 15


def test_the_shares_are_the_default_time(imported: Imported) -> None:
    options = imported("gpu_all").parse(["--out", "x"])
    assert sum(stage.seconds for stage in imported("gpu_stages.running").STAGES) <= 60 * options.minutes


@pytest.fixture
def stubbed(imported: Imported, monkeypatch: pytest.MonkeyPatch) -> Any:
    """gpu_all.py, whose stages are not run: the attribute `entries` has what becomes of them, by name."""
    module = imported("gpu_all")
    entries: dict[str, Any] = {"correct": {"figures": {"ok": True}}}

    def run_stage(command: list[str], limit_s: float, figures: Path, log: Any) -> dict[str, Any]:
        name = command[command.index("--stage") + 1]
        written = figures.with_name("gpu.json")
        stub.seen[name] = list(json.loads(written.read_text())["stages"]) if written.exists() else []
        entry: dict[str, Any] = entries.get(name, {"figures": {}})
        return {"seconds": 1.0, "limit_seconds": limit_s} | entry

    stub = SimpleNamespace(module=module, entries=entries, seen=dict[str, list[str]]())
    monkeypatch.setattr(module, "run_stage", run_stage)
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "x")
    return stub


def test_a_stage_that_fails_is_a_line_and_the_others_go_on(stubbed: Any, tmp_path: Path) -> None:
    stubbed.entries["block"] = {"error": "killed after 100 s, its limit", "figures": {"cases": []}}
    assert stubbed.module.measure(stubbed.module.parse(["--out", str(tmp_path)])) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    names = list(found["stages"])
    assert names == ["env", "correct", "block", "step", "generate", "long", "decide"]
    assert found["stages"]["block"]["error"] == "killed after 100 s, its limit"
    assert stubbed.seen == {name: names[:number] for number, name in enumerate(names)}  # the file after each


@pytest.mark.parametrize(
    "entry", [{"error": "2 tests failed", "figures": {"ok": False}}, {"error": "killed", "figures": {}}, {"error": "x"}]
)
def test_the_exit_code_is_that_of_the_tests(stubbed: Any, tmp_path: Path, entry: Any) -> None:
    stubbed.entries["correct"] = entry
    assert stubbed.module.measure(stubbed.module.parse(["--out", str(tmp_path)])) == 1
    assert stubbed.seen["decide"]


def test_a_stage_without_time_is_not_started(stubbed: Any, tmp_path: Path) -> None:
    assert stubbed.module.measure(stubbed.module.parse(["--out", str(tmp_path), "--minutes", "0.01"])) == 1
    stages = json.loads((tmp_path / "gpu.json").read_text())["stages"]
    assert {entry["error"] for entry in stages.values()} == {"not started: 1 of 1 s were left"}
    assert not stubbed.seen


def test_one_stage_again_keeps_the_figures_of_others(stubbed: Any, tmp_path: Path) -> None:
    stubbed.entries["block"] = {"figures": {"of": "the first run"}}
    stubbed.module.measure(stubbed.module.parse(["--out", str(tmp_path)]))
    stubbed.entries |= {"step": {"figures": {"of": "the second"}}, "correct": {"error": "not asked for"}}
    assert stubbed.module.measure(stubbed.module.parse(["--out", str(tmp_path), "--only", "step"])) == 0
    stages = json.loads((tmp_path / "gpu.json").read_text())["stages"]
    assert stages["block"]["figures"] == {"of": "the first run"}
    assert stages["step"]["figures"] == {"of": "the second"}


def test_a_stage_gets_the_command_lines_options(imported: Imported) -> None:
    module = imported("gpu_all")
    given = [*SMALL, "--tests", "a.py", "--deselect", "a", "b"]
    options = module.parse(["--out", "x", *given])
    inner = module.parse(module.stage_arguments(imported("gpu_stages.running").STAGES[1], 12.34, options))
    assert (inner.stage, inner.seconds, inner.layers, inner.hidden, inner.intermediate) == (
        "correct",
        12.3,
        1,
        256,
        512,
    )
    assert (inner.tests, inner.deselect, inner.out) == (["a.py"], ["a", "b"], options.out)
    none = module.parse(["--out", "x", "--deselect"])
    assert module.parse(module.stage_arguments(imported("gpu_stages.running").STAGES[1], 1, none)).deselect == []


def test_the_test_that_is_left_out_is_there(imported: Imported) -> None:
    file, _, name = imported("gpu_all").PAGED.partition("::")
    text = (ROOT / file).read_text()
    function, _, case = name.partition("[")
    assert f"def {function}(" in text
    assert case.removesuffix("]") in text


def test_files_with_the_mark(imported: Imported) -> None:
    files = imported("gpu_stages.correct").marked_files()
    assert "tests/model/experts/test_block.py" in files
    assert "tests/test_style.py" not in files
    assert all((ROOT / file).exists() for file in files)
    # The first is of what all else depends on.
    assert files[0].startswith(("tests/model/kernels", "tests/model/experts"))


def size(rows: float, training: bool, dropout: float = 0.0, disagreement: Any = None, **milliseconds: float) -> Any:
    return {
        "tokens": int(4 * rows),
        "rows_per_expert": rows,
        "training": training,
        "dropout": dropout,
        "milliseconds": {path: {"median": value} for path, value in milliseconds.items()},
        "disagreement": disagreement or dict.fromkeys(milliseconds, 0.001),
        "absent": {},
    }


def test_a_path_must_agree_before_it_wins(imported: Imported) -> None:
    decide = imported("gpu_stages.decide")
    block = {
        "cases": [
            size(1, True, loop=3, grouped=2, decode=1, disagreement={"loop": 0.0, "grouped": 0.019, "decode": 0.001}),
            size(4, True, loop=3, grouped=2, decode=1, disagreement={"loop": 0.0, "grouped": 0.019, "decode": 0.021}),
        ]
    }
    assert decide.excluded(block) == {"decode": "differs from loop by 2.1% with 16 tokens"}
    assert decide.table(block, "training") == [[None, "grouped"]]
    assert decide.table(block, "forward") == []
    assert decide.winner(block, 1.0) == "grouped"
    assert decide.winner({}, 1.0) is None


def test_dropout_counts_and_a_path_that_broke_somewhere_does_not(imported: Imported) -> None:
    decide = imported("gpu_stages.decide")
    cases = [size(16, True, loop=3, grouped=2, decode=1), size(16, True, 0.05, {}, loop=3, grouped=5)]
    cases[1]["disagreement"] = {}
    assert decide.table({"cases": cases}, "training") == [[None, "loop"]]


@pytest.mark.parametrize("measured", [True, False])
def test_winners_are_written_as_the_package_reads_them(imported: Imported, tmp_path: Path, measured: bool) -> None:
    decide, running = imported("gpu_stages.decide"), imported("gpu_stages.running")
    cases = [size(1, kind, loop=2, grouped=1) for kind in (True, False)]
    cases += [size(4, kind, loop=1, grouped=2) for kind in (True, False)]
    figures_of = {"block": {"cases": cases} if measured else {}, "env": {"capability": "9.0"}}
    settings = SimpleNamespace(on_gpu=True, options=argparse.Namespace(out=tmp_path), figures_of=figures_of.get)
    figures = running.Figures(tmp_path / "figures")
    if not measured:
        with pytest.raises(ValueError, match="the block was not measured"):
            decide.run(settings, figures)
        return
    decide.run(settings, figures)
    table = ((2.0, "grouped"), (math.inf, "loop"))
    found, packaged = read_fastest(tmp_path / "fastest.json"), read_fastest(decide.PACKAGED)
    assert found == packaged | {"9.0": FastestPaths(table, table)}


def test_every_path_is_measured_and_compared(imported: Imported, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ones that cannot run on a CPU say so, and one that raises loses only itself."""
    block, settings = imported("gpu_stages.block"), imported("gpu_stages.settings")
    monkeypatch.setenv("MIXCN_EXPERT_PATH", "loop")  # which the stage changes
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    options = argparse.Namespace(layers=1, hidden=64, intermediate=96, seconds=60.0)
    here = settings.Settings(options, device="cpu")
    made = imported("contenders.experts")
    experts, rows = made.Block(here.config, 16, "cpu"), made.Rows(here.config, 8, "cpu")

    def breaks(*_: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access")

    case = block.measured(experts, rows, True, 0.0, here)
    assert case["rows_per_expert"] == 2.0
    assert case["milliseconds"].keys() == case["disagreement"].keys() == {"loop", "grouped"}
    assert 0 < case["disagreement"]["grouped"] < 2e-2
    assert case["absent"].keys() == {"fused", "decode"}
    assert "run on a GPU, not on cpu" in case["absent"]["decode"]
    monkeypatch.setitem(made.PATHS, "grouped", breaks)
    case = block.measured(experts, rows, True, 0.05, here)
    assert case["milliseconds"].keys() == {"loop"}
    assert case["disagreement"] == {}  # masks may differ


def test_figures_that_are_not_finite_are_an_error(imported: Imported) -> None:
    import torch

    difference = imported("gpu_stages.block").difference
    ones = [torch.ones(3), torch.ones(2)]
    assert difference([torch.ones(3), torch.tensor([1.0, 1.1])], ones) == pytest.approx(0.1 / 2**0.5, rel=1e-5)
    with pytest.raises(FloatingPointError):
        difference([torch.full((3,), float("nan")), torch.ones(2)], ones)


@pytest.mark.slow
def test_full_size_fits_into_80_gb_and_into_its_time(imported: Imported) -> None:
    """By the plan of memory, and by operations at the shares of an H100's rate that are expected."""
    from lightning_mixcn.model import build_mixtral
    from lightning_mixcn.model.memory.budget import RESERVE

    running, step, long = (imported(f"gpu_stages.{name}") for name in ("running", "step", "long"))
    shares, rate = {stage.name: stage.seconds for stage in running.STAGES}, 989.4e12
    config = imported("random_base").config_of("full-8x7b")
    model = build_mixtral(config, lora=imported("contenders.step").lora(64, 0.05), device="meta")
    for name, cases, paths in (("step", step.CASES, 2), ("long", long.CASES, 1)):
        seconds = 0.0
        for case in cases:
            step.set_dropout(model, case.dropout)
            assert step.planned_memory(model, case, "cuda").peak <= (1 - RESERVE) * 80e9, case.name
            seconds += paths * (case.warmup + case.rounds) * step.planned_seconds(model, case, rate)
        # The rest is for the model, the prefill or the limit, and to import torch.
        assert seconds <= 0.75 * shares[name], name


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.timeout(1200)
def test_all_stages_run_on_a_cpu(tmp_path: Path) -> None:
    """With time enough: that a minute does is a matter of the machine."""
    command = [sys.executable, "benchmarks/gpu_all.py", "--out", str(tmp_path / "out"), "--minutes", "20", *SMALL]
    environment = {name: value for name, value in os.environ.items() if name != "MIXCN_EXPERT_PATH"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["gpu.json", "gpu.log"]
    text = (tmp_path / "out/gpu.json").read_text()
    assert str(ROOT) not in text
    assert str(tmp_path) not in text
    stages = json.loads(text)["stages"]
    assert not {name: entry["error"] for name, entry in stages.items() if "error" in entry}
    figures = {name: entry["figures"] for name, entry in stages.items()}
    assert figures["correct"]["ok"]
    assert {case["training"] for case in figures["block"]["cases"]} == {True, False}
    for case in [*figures["step"]["cases"], *figures["long"]["steps"]]:
        assert case["tokens_per_second"]["median"] > 0, case
        assert case["planned"]["peak_bytes"] > 0
    assert all(case["share_of_limit"] > 0 for case in figures["step"]["cases"])
    assert figures["step"]["cases"][0]["profile"]["largest"]
    assert {case["batch"] for case in figures["generate"]["cases"]} == {1, 8}
    # Random weights: all of 32,000 tokens are about as likely.
    assert all(9 < row["nll_nats_per_token"] < 12 for row in figures["long"]["prefill"])
    assert figures["decide"]["winners"]["training"][-1][0] is None
