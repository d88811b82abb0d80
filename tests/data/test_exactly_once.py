"""Runs that are killed and resumed on other ranks and workers train on the rows of one that never stopped."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lightning_mixcn.text import PACKINGS, PreferenceSource, Source
from tests.text.pair_files import pair_records, write_records

pytestmark = pytest.mark.multiprocess


@dataclass(frozen=True)
class Part:
    """What may change when a run is resumed, and when it ends.

    Args:
        ranks: Processes that train.
        num_workers: Loader workers of each.
        micro_batch_size: Rows of a batch.
        accumulate: Batches of a step.
        batches: Batches of rank zero after which this part is killed; the last part stops by itself.
        delay_seconds: From that batch to the signal.
    """

    ranks: int
    num_workers: int
    micro_batch_size: int
    accumulate: int
    batches: int = 0
    delay_seconds: float = 0.0


def draw_parts(draw: random.Random, count: int, every_n_steps: int) -> list[Part]:
    """Draw parts, each on another number of ranks and workers than the one before."""
    parts: list[Part] = []
    for _ in range(count):
        ranks = draw.choice([number for number in (1, 2, 4) if not parts or number != parts[-1].ranks])
        workers = draw.choice([number for number in (0, 1, 3) if not parts or number != parts[-1].num_workers])
        accumulate = draw.choice((1, 1, 2, 3))
        # Seldom before there is a checkpoint, often in the middle of a step.
        batches = draw.randint(every_n_steps * accumulate - 1, 3 * every_n_steps * accumulate)
        parts.append(Part(ranks, workers, draw.choice((1, 2, 3, 4)), accumulate, batches, draw.random() * 0.02))
    return parts


class Launcher:
    """The program that forks runs; see `recording_run`."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "log"
        self._leader: int | None = None
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("recording_run.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                # A killed run leaves there the checkpoint that it was writing.
                env=os.environ | {"TMPDIR": str(folder)},
            )

    def start(self, run: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(run) + "\n")
        self._process.stdin.flush()
        self._leader = int(self._answer())

    def alive(self) -> bool:
        assert self._leader is not None
        try:
            os.kill(self._leader, 0)
        except ProcessLookupError:
            return False
        return True

    def kill(self) -> None:
        """Kill ranks and workers alike."""
        assert self._leader is not None
        os.killpg(self._leader, signal.SIGKILL)

    def wait(self) -> int:
        """Wait for the run's end. Returns: its exit code."""
        code = int(self._answer())
        self._leader = None
        return code

    def close(self) -> None:
        if self._leader is not None and self.alive():
            self.kill()
        self._process.kill()
        self._process.communicate()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, self.log.read_text()[-4000:]
        return line


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    made = Launcher(tmp_path_factory.mktemp("runs"))
    yield made
    made.close()


class Run:
    """A run in parts, in one folder; `data` are arguments of the data module, whose class is `data_module`."""

    def __init__(
        self, launcher: Launcher, folder: Path, every_n_steps: int, data: dict[str, Any], data_module: str
    ) -> None:
        folder.mkdir()
        self.data_module = data_module
        self.launcher = launcher
        self.folder = folder
        self.every_n_steps = every_n_steps
        self.data = data
        self.resume: Path | None = None

    @property
    def step(self) -> int:
        """Optimizer steps of the checkpoint that the next part begins with."""
        return int(self.resume.stem.removeprefix("step=")) if self.resume else 0

    def start(self, name: str, part: Part, max_steps: int) -> None:
        changes = {"num_workers": part.num_workers, "micro_batch_size": part.micro_batch_size}
        self.launcher.start(
            {
                "name": name,
                "folder": str(self.folder),
                "ranks": part.ranks,
                "accumulate": part.accumulate,
                "max_steps": max_steps,
                "every_n_steps": self.every_n_steps,
                "resume": self.resume and str(self.resume),
                "data_module": self.data_module,
                "data": self.data | changes,
            }
        )

    def kill(self, name: str, part: Part) -> list[NDArray[np.int64]]:
        """Run a part until it is killed. Returns: the rows up to the newest checkpoint, none where it saved none."""
        before = self.step
        self.start(name, part, max_steps=1_000_000)
        file = self.folder / f"{name}.0.rows"
        while len(records(file)[0]) < part.batches:
            assert self.launcher.alive(), self.launcher.log.read_text()[-4000:]
            time.sleep(0.002)
        time.sleep(part.delay_seconds)
        self.launcher.kill()
        assert self.launcher.wait() == -signal.SIGKILL
        newest = self.folder / "checkpoints" / "last.ckpt"
        self.resume = newest.resolve() if newest.exists() else None
        return [self.rows(name, part)] if self.step > before else []

    def finish(self, name: str, part: Part, steps: int) -> NDArray[np.int64]:
        """Run a part to its end. Returns: its rows."""
        self.start(name, part, max_steps=self.step + steps)
        assert self.launcher.wait() == 0, self.launcher.log.read_text()[-4000:]
        self.resume = (self.folder / "checkpoints" / "last.ckpt").resolve()
        return self.rows(name, part)

    def rows(self, name: str, part: Part) -> NDArray[np.int64]:
        """Rows of all ranks before the checkpoint, in the order of the run: ``[rows, fields, sequence_length]``."""
        kept = []
        for rank in range(part.ranks):
            steps, batches = records(self.folder / f"{name}.{rank}.rows")
            kept.append(batches[steps < self.step])
        rows = np.stack(kept, axis=1)
        return rows.reshape(-1, *rows.shape[3:])


def positions(checkpoint: Path, data_module: str) -> dict[int, int]:
    """Read the rows made of each stream, as a checkpoint has it."""
    streams = torch.load(checkpoint, weights_only=True)[data_module]["streams"]
    return {stream: state["position"] for stream, state in streams.items()}


def records(file: Path) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Read the steps ``[batches]`` and rows ``[batches, rows, fields, sequence_length]`` that one rank has written."""
    content = file.read_bytes() if file.exists() else b""
    numbers = np.frombuffer(content[: len(content) // 8 * 8], dtype=np.int64)
    if len(numbers) < 4:
        return numbers[:0], numbers[:0]
    shape = numbers[1:4].tolist()
    size = 4 + math.prod(shape)
    whole = numbers[: len(numbers) // size * size].reshape(-1, size)
    return whole[:, 0], whole[:, 4:].reshape(-1, *shape)


# Chinese and English by fraction of the run, of which the parts together are about a half.
PROGRESS_ROWS = 400
BY_PROGRESS: list[dict[float | str, float]] = [{0.0: 0.2, 0.25: 0.9}, {0.0: 0.8, 0.25: 0.1}]
SEEDS = [(seed, False) for seed in range(20)] + [(seed, True) for seed in range(12)]
FAST = [(0, False), (1, False), (2, False), (3, False), (2, True)]


def require_shares(sources_RS: NDArray[np.int64]) -> None:
    """Compare the share of Chinese in every 64 rows with what their places in the run ask for."""
    zh_RS, found_RS = sources_RS == 0, sources_RS >= 0
    asked_R = np.interp(np.arange(len(sources_RS)) / PROGRESS_ROWS, list(map(float, BY_PROGRESS[0])), (0.2, 0.9))
    for first in range(len(sources_RS) - 63):
        window = slice(first, first + 64)
        assert abs(zh_RS[window].sum() / found_RS[window].sum() - asked_R[window].mean()) < 0.05


def killed_as_if_whole(
    launcher: Launcher,
    folder: Path,
    draw: random.Random,
    every_n_steps: int,
    parts: int,
    data: dict[str, Any],
    data_module: str,
) -> NDArray[np.int64]:
    """Train in parts, all but the last of them killed. Returns: the rows, which are those of a run that never stopped.

    They are ``[rows, fields, sequence_length]``, each once.
    """
    *killed, last = draw_parts(draw, parts, every_n_steps)
    run = Run(launcher, folder / "killed", every_n_steps, data, data_module)
    rows = [part_rows for number, part in enumerate(killed) for part_rows in run.kill(str(number), part)]
    rows.append(run.finish("last", last, steps=draw.randint(2, 8)))
    trained = np.concatenate(rows)
    # Where every stream stands is known, whichever rank read it: nothing is made twice.
    assert run.resume is not None
    dealt = {stream: len(range(stream, len(trained), data["num_streams"])) for stream in range(data["num_streams"])}
    assert positions(run.resume, data_module) == {stream: count for stream, count in dealt.items() if count}

    whole = Run(launcher, folder / "whole", 1_000_000, data, data_module)
    expected = whole.finish("whole", Part(1, 0, 4, 1), steps=-(-len(trained) // 4))[: len(trained)]
    assert np.array_equal(trained, expected)
    assert len(np.unique(expected[:, 0], axis=0)) > len(expected) // 2  # rows that could be told apart
    return trained


@pytest.mark.parametrize(
    ("seed", "by_progress"), [pytest.param(*case, marks=() if case in FAST else pytest.mark.slow) for case in SEEDS]
)
def test_no_row_is_lost_or_repeated(
    seed: int,
    by_progress: bool,
    launcher: Launcher,
    arguments: Callable[..., dict[str, Any]],
    sources: list[Source],
    tmp_path: Path,
) -> None:
    draw = random.Random(seed)
    every_n_steps = draw.choice((2, 3, 5))
    data = arguments(
        sources=[
            asdict(source) | ({"weight": weight} if by_progress else {})
            for source, weight in zip(sources, BY_PROGRESS, strict=True)
        ],
        progress_rows=PROGRESS_ROWS,
        packing=PACKINGS[seed % len(PACKINGS)],
        num_streams=(1, 5, 8, 64)[seed % 4],
        sequence_length=draw.choice((16, 32, 100)),
        seed=seed,
    )
    trained = killed_as_if_whole(launcher, tmp_path, draw, every_n_steps, 3 + seed % 2, data, "PretrainDataModule")
    if by_progress and data["num_streams"] >= 8:
        require_shares(trained[:, 4])


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 8))])
def test_no_pair_is_lost_or_repeated(
    seed: int, launcher: Launcher, arguments: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """Of two sources, some pairs too long for a row; and both answers of a pair are in one row, with their sides."""
    draw, sources = random.Random(seed), []
    for name, count, weight in (("zh", 900, 0.7), ("en", 300, 0.3)):
        path = write_records(tmp_path / f"{name}.jsonl", pair_records(count, long_ones=True))
        sources.append(asdict(PreferenceSource(name, path, weight=weight)))
    data = arguments(
        sources=sources,
        packing=("best_fit", "documents")[seed % 2],
        on_too_long=("truncate", "drop")[seed // 2 % 2],
        num_streams=(5, 1, 8, 16)[seed % 4],
        sequence_length=draw.choice((160, 200, 400)),
        seed=seed,
    )
    trained = killed_as_if_whole(launcher, tmp_path, draw, 3, 3 + seed % 2, data, "PreferenceDataModule")
    documents_RS, sides_RS = trained[:, 3], trained[:, 5]
    assert np.array_equal(sides_RS, np.select([documents_RS < 0, documents_RS % 2 == 0], [0, 1], -1))
    assert np.all(documents_RS.max(axis=1) % 2 == 1)
