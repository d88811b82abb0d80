"""An error that data raise, in whichever process, ends the command and all that it started, with its message."""

import contextlib
import gzip
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_mixcn.data import InstructDataModule
from lightning_mixcn.text import ConversationSource

pytestmark = pytest.mark.multiprocess

# From the message to the end of the last process.
LIMIT_SECONDS = 30
REFUSING = """{{ bos_token }}{% for message in messages %}{% if 'forbidden' in message.content %}
{{- raise_exception('forbidden word') }}{% endif %}{{ message.content }}{{ eos_token }}{% endfor %}"""
# Callbacks that tamper with a run once the data are set up.
CALLBACKS = """
import os, shutil, signal, time
from pathlib import Path
from lightning.pytorch import Callback
from multiprocessing import active_children

class Truncates(Callback):
    def setup(self, trainer, pl_module, stage):
        for file in Path(os.environ["MIXCN_CACHE"]).rglob("texts.bin"):
            os.truncate(file, 10)

class Removes(Callback):
    def setup(self, trainer, pl_module, stage):
        shutil.rmtree(os.environ["MIXCN_CACHE"])

class Kills(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 2 and trainer.global_rank == int(os.environ.get("KILLS_RANK", 0)):
            whom = os.environ["KILLS"]
            if whom == "run":
                print("killing", flush=True)
                time.sleep(3)  # meanwhile the workers are as far ahead as they may be
                os.kill(os.getpid(), signal.SIGKILL)
            os.kill(active_children()[0].pid, int(whom))

class Interrupts(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 2 and trainer.global_rank == int(os.environ.get("KILLS_RANK", 0)):
            os.kill(os.getpid(), signal.SIGINT)
"""


class Run:
    """``mixcn fit`` as a process, and whatever that starts."""

    def __init__(self, folder: Path, content: dict[str, Any], launcher: str = "", **environment: str) -> None:
        self.folder, self._mark = folder, f"MIXCN_TEST_RUN={uuid.uuid4()}"
        (folder / "run.yaml").write_text(json.dumps(content), encoding="utf-8")
        (folder / "tampering.py").write_text(CALLBACKS, encoding="utf-8")
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
        name, _, value = self._mark.partition("=")
        path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        with (folder / "log").open("w") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, *(torchrun if launcher == "torchrun" else []), "-m", "lightning_mixcn", "fit"),
                    *("--config", "run.yaml", "--trainer.default_root_dir", "run"),
                ],
                stdout=log,
                stderr=log,
                cwd=folder,
                start_new_session=True,
                env=os.environ
                | {name: value, "MIXCN_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
                | {"MASTER_PORT": str(free_port()), "TMPDIR": str(folder)}
                | environment,
            )

    @property
    def log(self) -> str:
        """What was printed."""
        return (self.folder / "log").read_text(encoding="utf-8", errors="replace")

    def processes(self) -> list[int]:
        """Every process that inherited this run's mark and is no zombie."""
        found = []
        for environ in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if self._mark.encode() in environ.read_bytes():
                    found.append(int(environ.parent.name))
        return found

    def end(self, message: str, timeout: float = 200, limit: float = LIMIT_SECONDS) -> tuple[int, float]:
        """Wait for a message, then for the end of all processes. Returns: exit code, and seconds between the two."""
        deadline, said = time.monotonic() + timeout, None
        while self.processes() or self.process.poll() is None:
            if said is None and re.search(message, " ".join(self.log.split())):
                said = time.monotonic()
            late = said is not None and time.monotonic() > said + limit
            assert not late, f"{len(self.processes())} processes are left {limit} s after: {self.log[-3000:]}"
            assert time.monotonic() < deadline, self.log[-3000:]
            time.sleep(0.05)
        assert re.search(message, " ".join(self.log.split())), self.log[-6000:]
        return self.process.returncode, time.monotonic() - (said or time.monotonic())

    def kill(self) -> None:
        """Kill what is left."""
        for process in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self.process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


Start = Callable[..., Run]


@pytest.fixture
def start(tmp_path: Path, tiny_base: Path) -> Iterator[Start]:
    """Start a run of conversations or, with `kind="Pretrain"`, of texts; of its data and its trainer some changed."""
    runs: list[Run] = []

    def make(
        kind: str = "Instruct",
        trainer: dict[str, Any] | None = None,
        launcher: str = "",
        ckpt_path: str | None = None,
        **changes: Any,
    ) -> Run:
        environment = {name: changes.pop(name) for name in list(changes) if name.isupper()}
        content = {
            "seed_everything": 0,
            "ckpt_path": ckpt_path,
            "model": {
                "class_path": f"{kind}Module",
                "init_args": {
                    "base": str(tiny_base), "dtype": "float32", "quantization": "none",
                    "lora": {"r": 2, "target_modules": ["q_proj", "w1"]},
                    "lr_scheduler": {"class_path": "WarmupCosine", "init_args": {"total_steps": 100}},
                },
            },
            "data": {
                "class_path": f"{kind}DataModule",
                "init_args": {
                    "sources": [{"name": "a", "path": "a.jsonl"}], "val_fraction": 0.0, "sequence_length": 64,
                    "micro_batch_size": 1, "num_streams": 2, "num_workers": 2, **changes,
                },
            },
            "trainer": {
                "accelerator": "cpu", "max_steps": 100_000, "num_sanity_val_steps": 0, "logger": False,
                "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False,
                **(trainer or {}),
            },
        }  # fmt: skip
        runs.append(Run(tmp_path, content, launcher, **environment))
        return runs[-1]

    yield make
    for run in runs:
        run.kill()


def conversation(question: str, answer: str = "yes") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write(path: Path, records: list[Any]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


GOOD = [conversation(f"question {number}") for number in range(120)]


def too_long(folder: Path) -> dict[str, Any]:
    write(folder / "a.jsonl", [conversation("long " * 40, str(number)) for number in range(40)])
    return {"on_too_long": "drop"}


def answers_that_do_not_fit(folder: Path) -> dict[str, Any]:
    write(folder / "a.jsonl", [conversation("long " * 40, str(number)) for number in range(40)])
    return {"on_too_long": "cut_at_turn"}


def refused_by_the_template(folder: Path) -> dict[str, Any]:
    """Odd numbers are forbidden: of so many conversations, every other one is tried before training."""
    texts = ["a forbidden question" if number % 82 == 1 else f"question {number}" for number in range(8_190)]
    write(folder / "a.jsonl", list(map(conversation, texts)))
    (folder / "refusing.jinja").write_text(REFUSING)
    return {"template": "refusing.jinja"}


def changed_by_the_template(folder: Path) -> dict[str, Any]:
    write(folder / "a.jsonl", [*GOOD, conversation("Capitals")])
    (folder / "lower.jinja").write_text("{% for m in messages %}{{ m.content | lower }}{{ eos_token }}{% endfor %}")
    return {"template": "lower.jinja"}


def cut_off(folder: Path) -> dict[str, Any]:
    write(folder / "a.jsonl", GOOD)
    return {"trainer": {"callbacks": [{"class_path": "tampering.Truncates"}]}}


def gone(folder: Path) -> dict[str, Any]:
    """Of a text, which nobody has opened before the workers do; conversations are tried before."""
    write(folder / "a.jsonl", [{"text": f"text {number}"} for number in range(120)])
    return {"kind": "Pretrain", "trainer": {"callbacks": [{"class_path": "tampering.Removes"}]}}


def not_json(folder: Path) -> dict[str, Any]:
    (folder / "a.jsonl").write_text('{"messages": [\n')
    return {}


def missing_key(folder: Path) -> dict[str, Any]:
    write(folder / "a.jsonl", [{"question": "?", "reply": "!"}])
    return {}


def no_answer(folder: Path) -> dict[str, Any]:
    write(folder / "a.jsonl", [*GOOD, {"messages": [{"role": "user", "content": "?"}]}])
    return {}


def unknown_encoding(folder: Path) -> dict[str, Any]:
    (folder / "a.jsonl").write_bytes('{"text": "天气"}\n'.encode("gb18030"))
    return {"kind": "Pretrain"}


def damaged_gz(folder: Path) -> dict[str, Any]:
    whole = gzip.compress(b"".join(json.dumps(record).encode() + b"\n" for record in GOOD))
    (folder / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    return {"sources": [{"name": "a", "path": "a.jsonl.gz"}]}


def no_file(folder: Path) -> dict[str, Any]:
    return {}


# Where the error is raised: in a worker, or before there are any.
ERRORS = [
    (too_long, r"mixcn: error: 1000 documents of source 'a', .* Raise `sequence_length`"),
    (answers_that_do_not_fit, r"mixcn: error: 1000 documents of source 'a', .* Raise `sequence_length`"),
    (refused_by_the_template, r"mixcn: error: `a.jsonl` line \d+: `refusing.jinja` cannot be used .*: forbidden word"),
    (changed_by_the_template, r"mixcn: error: `a.jsonl` line 121: `lower.jinja` does not write the contents"),
    (cut_off, r"mixcn: error: .*Start this process again"),
    (gone, r"mixcn: error: The unpacked texts in .* are gone"),
    (not_json, r"mixcn: error: .*a.jsonl"),
    (missing_key, r"mixcn: error: .*expected `messages`"),
    (no_answer, r"mixcn: error: .*line 121.*the last turn is the user's"),
    (unknown_encoding, r"mixcn: error: .*a.jsonl.*"),
    (damaged_gz, r"mixcn: error: .*a.jsonl.gz.*"),
    (no_file, r"mixcn: error: .*a.jsonl.* matches no file"),
]


@pytest.mark.parametrize(
    ("error", "message"),
    [ERRORS[0], *(pytest.param(*case, marks=pytest.mark.slow, id=case[0].__name__) for case in ERRORS[1:])],
)
def test_data_that_cannot_be_used(
    error: Callable[[Path], dict[str, Any]], message: str, start: Start, tmp_path: Path
) -> None:
    run = start(**error(tmp_path))
    code, _ = run.end(message)
    assert code == 2, run.log
    assert "Traceback" not in run.log


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_any_number_of_workers(workers: int, start: Start, tmp_path: Path) -> None:
    run = start(**refused_by_the_template(tmp_path), num_workers=workers)
    assert run.end(r"mixcn: error: `a.jsonl` line \d+: `refusing.jinja` cannot be used")[0] == 2


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_worker_that_dies(number: int, start: Start, tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", GOOD)
    run = start(trainer={"callbacks": [{"class_path": "tampering.Kills"}]}, KILLS=str(int(number)))
    code, _ = run.end(r"mixcn: error: DataLoader worker \(pid \d+\) is killed by signal: .*num_workers")
    assert code == 1, run.log
    assert "Traceback" not in run.log


def test_no_worker_outlives_a_killed_run(start: Start, tmp_path: Path) -> None:
    """Although nobody reads any more what the workers have sent, which is more than a pipe holds."""
    write(tmp_path / "a.jsonl", GOOD)
    trainer = {"callbacks": [{"class_path": "tampering.Kills"}]}
    run = start(trainer=trainer, micro_batch_size=16, sequence_length=512, KILLS="run")
    assert run.end("killing")[0] == -signal.SIGKILL


@pytest.mark.parametrize(
    ("launcher", "rank"),
    [
        pytest.param("lightning", 0, marks=pytest.mark.slow),
        pytest.param("lightning", 1, marks=pytest.mark.slow),
        pytest.param("torchrun", 0, marks=pytest.mark.slow),
        pytest.param("torchrun", 1, marks=pytest.mark.slow),
    ],
)
def test_a_killed_rank_ends_all(rank: int, launcher: str, start: Start, tmp_path: Path) -> None:
    """Nobody but torch and the launchers sees to it; the run's checkpoint is one to go on from."""
    write(tmp_path / "a.jsonl", GOOD)
    saving = {"class_path": "StepCheckpoint", "init_args": {"every_n_steps": 1}}
    trainer = {"devices": 2, "strategy": "ddp", "enable_checkpointing": True}
    killed = trainer | {"callbacks": [{"class_path": "tampering.Kills"}, saving]}
    run = start(trainer=killed, launcher=launcher, KILLS="run", KILLS_RANK=str(rank))
    code, seconds = run.end("killing", limit=60)
    print(f"ended after {seconds:.1f} s with {code}")
    assert code != 0
    start(trainer=trainer | {"max_steps": 4, "callbacks": [saving]}, ckpt_path="last").end("max_steps=4. reached")
    assert (tmp_path / "run/checkpoints/last.ckpt").resolve().name == "step=00000004.ckpt"


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_an_interrupt(workers: int, start: Start, tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", GOOD)
    run = start(trainer={"callbacks": [{"class_path": "tampering.Interrupts"}]}, num_workers=workers)
    assert run.end("SIGINT: stopped after optimizer step 3")[0] == 130
    assert "Traceback" not in run.log


def seed_of(rank: int, folder: Path, base: Path) -> int:
    """Find a seed with which, of two ranks, this one meets the record that the template refuses, after some steps."""
    for seed in range(100):
        data = InstructDataModule(
            [ConversationSource("a", str(folder / "a.jsonl"))], template=str(folder / "refusing.jinja"), num_streams=2,
            sequence_length=64, val_fraction=0.0, packing="documents", seed=seed, tokenizer=str(base),
        )  # fmt: skip
        data.setup("fit")
        rows = data.training_rows()
        row = 0
        with contextlib.suppress(ValueError):
            while True:
                next(rows)
                row += 1
        if row % 2 == rank and row > 8:
            return seed
    raise AssertionError("no seed does")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("launcher", "strategy"), [("lightning", "ddp"), ("lightning", "fsdp2"), ("torchrun", "ddp"), ("torchrun", "fsdp2")]
)
def test_one_rank_s_error_ends_all(
    launcher: str, strategy: str, rank: int, workers: int, start: Start, tmp_path: Path, tiny_base: Path
) -> None:
    """The other rank waits in a collective, or is about to."""
    settings = refused_by_the_template(tmp_path) | {"packing": "documents", "num_workers": workers}
    trainer = {"devices": 2, "strategy": strategy}
    run = start(trainer=trainer, launcher=launcher, seed=seed_of(rank, tmp_path, tiny_base), **settings)
    code, seconds = run.end("cannot be used for this conversation: forbidden word")
    print(f"ended after {seconds:.1f} s with {code}\n{run.log}")
    assert code in (1, 2), run.log
    assert re.search(r"mixcn: error: .*`refusing.jinja` cannot be used for this conversation: forbidden word", run.log)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["lightning", "torchrun"])
def test_all_ranks_errors_end_all(launcher: str, start: Start, tmp_path: Path) -> None:
    run = start(trainer={"devices": 2, "strategy": "ddp"}, launcher=launcher, **too_long(tmp_path))
    code, _ = run.end(r"mixcn: error: 1000 documents of source 'a'")
    assert code in (1, 2), run.log


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["lightning", "torchrun"])
@pytest.mark.parametrize("error", [not_json, damaged_gz])
def test_errors_before_training_end_all_ranks(
    error: Callable[[Path], dict[str, Any]], launcher: str, start: Start, tmp_path: Path
) -> None:
    run = start(trainer={"devices": 2, "strategy": "ddp"}, launcher=launcher, **error(tmp_path))
    code, _ = run.end(r"mixcn: error: .*a.jsonl")
    assert code in (1, 2), run.log


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["lightning", "torchrun"])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("callback", ["Kills", "Interrupts"])
def test_one_rank_s_killed_worker_or_interrupt_ends_all(
    callback: str, rank: int, launcher: str, start: Start, tmp_path: Path
) -> None:
    write(tmp_path / "a.jsonl", GOOD)
    trainer = {"devices": 2, "strategy": "ddp", "callbacks": [{"class_path": f"tampering.{callback}"}]}
    run = start(trainer=trainer, launcher=launcher, KILLS="9", KILLS_RANK=str(rank))
    interrupted = callback == "Interrupts"  # ends all ranks after a step, as if they were done
    code, _ = run.end("SIGINT: stopped after optimizer step 3" if interrupted else "is killed by signal")
    assert code == 130 if interrupted and launcher == "lightning" else code == 1, run.log
