"""A tiny run with callbacks, in this process or in others."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from peft import LoraConfig

from lightning_mixcn.modules import PretrainModule

ROOT = Path(__file__).parents[2]


@pytest.fixture
def module(tiny_base: Path) -> PretrainModule:
    lora = LoraConfig(r=2, target_modules=["q_proj", "w1", "w2", "w3"])
    return PretrainModule(str(tiny_base), dtype="float32", lora=lora)


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., Trainer]:
    def make(**changes: Any) -> Trainer:
        settings: dict[str, Any] = {
            "accelerator": "cpu",
            "default_root_dir": tmp_path,
            "enable_checkpointing": False,
            "enable_model_summary": False,
            "enable_progress_bar": False,
            "limit_val_batches": 0,
            "logger": False,
            "max_steps": 2,
        }
        return Trainer(**(settings | changes))

    return make


class ForkedFits:
    """Runs of `mixcn` in processes that can be killed and signalled; see `forked_fits`."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "log"
        self._number = 0
        self._leader = 0
        self._runs = False
        self._answers: subprocess.Popen[str] | None = None
        self._folder = folder

    def start(
        self, folder: Path, arguments: list[str], ranks: int = 1, kill_at: int = -1, cache: str = "", prepare: str = ""
    ) -> None:
        """Start a run.

        Args:
            folder: To work in.
            arguments: Of `mixcn`.
            ranks: Processes that form a gloo group; the arguments have to say so, too.
            kill_at: Number of the call to the file system before which the run kills itself; 0 only lists them.
            cache: Folder of unpacked texts; empty for the one of all tests.
            prepare: Function of the tests, ``module:name``, that is called once before this run and those after it.
        """
        if self._runs:  # a test that failed has left it
            self.kill()
            self.wait()
        self._number += 1
        self.log = self._folder / f"{self._number}.log"
        run = {"ranks": ranks, "folder": str(folder), "arguments": arguments, "log": str(self.log)}
        run |= {"kill_at": kill_at, "cache": cache, "prepare": prepare}
        server = self._server()
        assert server.stdin is not None
        server.stdin.write(json.dumps(run) + "\n")
        server.stdin.flush()
        self._leader = int(self._answer())
        self._runs = True

    def processes(self) -> list[int]:
        """Process ids of the ranks."""
        file = Path(f"{self.log}.pids")
        while not (file.exists() and file.read_text()):
            time.sleep(0.01)
        return list(json.loads(file.read_text()))

    def calls(self) -> list[tuple[int, str]]:
        """Return the calls to the file system of a run that has ended, with their numbers.

        Only those before which something in the working folder has changed since the one before: to be killed at any of
        the others leaves the same files.
        """
        lines = [json.loads(line) for line in Path(f"{self.log}.calls").read_text().splitlines()]
        states = [None, *(state for _, state in lines)]
        return [
            (number, call)
            for number, ((call, state), before) in enumerate(zip(lines, states, strict=False), start=1)
            if state != before
        ]

    def running(self) -> bool:
        """Whether no rank has ended."""
        return not Path(f"{self.log}.codes").exists()

    def wait_for(self, path: Path, pattern: str) -> None:
        """Wait until there is a file in a folder, while the run goes on."""
        while not list(path.glob(pattern)):
            assert self.running(), self.log.read_text()[-4000:]
            time.sleep(0.005)

    def kill(self) -> None:
        """Kill all ranks, loader workers, and the leader."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._leader, signal.SIGKILL)

    def wait(self) -> list[int]:
        """Wait for the end. Returns: the ranks' exit codes; none if the leader was killed, too."""
        self._runs = False
        return list(json.loads(self._answer()))

    def close(self) -> None:
        """End the server and what runs."""
        if self._answers is not None:
            if self._runs:
                self.kill()
            self._answers.kill()
            self._answers.communicate()

    def _server(self) -> "subprocess.Popen[str]":
        if self._answers is None:
            self._answers = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("forked_fits.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ
                | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)},
            )
        return self._answers

    def _answer(self) -> str:
        assert self._answers is not None
        assert self._answers.stdout is not None
        return self._answers.stdout.readline()


@pytest.fixture(scope="module")
def forked_fits(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkedFits]:
    made = ForkedFits(tmp_path_factory.mktemp("runs"))
    yield made
    made.close()


@pytest.fixture(scope="session")
def fit_config(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configure a run whose steps take milliseconds, with dropout and a stream of text."""
    folder: Path = tmp_path_factory.mktemp("config")
    lines = (json.dumps({"text": "今天天气很好。" * (1 + number % 4) + str(number)}) for number in range(100))
    (folder / "zh.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    lora = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.1, "target_modules": ["q_proj", "gate", "w1", "w2", "w3"]}
    content = {
        "model": {
            "class_path": "PretrainModule",
            "init_args": {"base": str(tiny_base), "dtype": "float32", "quantization": "none", "lora": lora},
        },
        "data": {
            "class_path": "PretrainDataModule",
            "init_args": {
                "sources": [{"name": "zh", "path": str(folder / "zh.jsonl")}],
                "sequence_length": 32,
                "micro_batch_size": 1,
                "num_streams": 4,
                "num_workers": 0,
                "val_fraction": 0.1,
            },
        },
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "accumulate_grad_batches": 2,
            "limit_val_batches": 0,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [{"class_path": "StepCheckpoint", "init_args": {"every_n_steps": 1}}],
        },
    }
    (folder / "fit.yaml").write_text(json.dumps(content), encoding="utf-8")  # JSON is YAML
    return folder / "fit.yaml"
