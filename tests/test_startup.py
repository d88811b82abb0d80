"""What a person waits for at the prompt: help needs none of the heavy libraries."""

import subprocess
import sys

import pytest

from lightning_mixcn.commands.table import FUNCTIONS, NESTED

HEAVY = ("torch", "transformers", "lightning", "peft", "bitsandbytes", "pyarrow", "numpy", "pandas", "matplotlib")
RUNS = ("fit", "validate", "test", "predict")
TOPICS = (
    "trainer",
    "callbacks",
    "strategies",
    "optimizers",
    "PretrainDataModule",
    "ExpertLoadMonitor",
    "torch.optim.SGD",
)

PROGRAM = """
import runpy, sys
sys.argv = ["mixcn", *sys.argv[1:]]
try:
    runpy.run_module("lightning_mixcn", run_name="__main__", alter_sys=True)
except SystemExit as end:
    code = end.code or 0
print("\\nLOADED", code, *sorted(name for name in sys.modules if "." not in name))
"""


def loaded_after(*arguments: str) -> set[str]:
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=True)
    _, code, *names = done.stdout.splitlines()[-1].split()
    assert code == "0", done.stderr
    return set(names)


SUBCOMMANDS = [[name, *more] for name in FUNCTIONS for more in ((), *((nested,) for nested in NESTED.get(name, ())))]


@pytest.mark.parametrize("subcommand", [[], *SUBCOMMANDS], ids=" ".join)
def test_help_loads_nothing_heavy(subcommand: list[str]) -> None:
    assert not loaded_after(*subcommand, "--help") & set(HEAVY)


@pytest.mark.parametrize("subcommand", RUNS)
def test_help_of_a_run_loads_nothing_heavy(subcommand: str) -> None:
    assert not loaded_after(subcommand, "--config", "demo", "--help") & set(HEAVY)


@pytest.mark.parametrize("topic", TOPICS)
def test_help_of_a_class_loads_nothing_heavy(topic: str) -> None:
    assert not loaded_after("help", topic) & set(HEAVY)


def test_package_loads_nothing_heavy() -> None:
    program = "import sys, lightning_mixcn; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & set(HEAVY)
