"""A rank that dies or hangs makes the other one stop and name it."""

import json
import os
import queue
import re
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from torch.distributed import HashStore, TCPStore  # type: ignore[attr-defined]  # torch does not say that it does

from lightning_mixcn.callbacks import RankWatch
from lightning_mixcn.callbacks.rank_watch import Beat, Heartbeats, Watch
from lightning_mixcn.modules import PretrainModule
from lightning_mixcn.testing import FixedBatches, random_batch

OWN, OTHER = Beat(0, "here", 10), Beat(1, "there", 11, step=7)


class Ends(queue.Queue[str]):
    """Takes the place of the process's end."""

    def __call__(self, own: Beat, reason: str) -> None:
        self.put(reason)


@pytest.fixture
def ends() -> Ends:
    return Ends()


def test_a_rank_that_falls_silent_ends_the_process(ends: Ends) -> None:
    store = HashStore()
    other = Watch(store, OTHER, 2, 0.5, ends)
    watch = Watch(store, OWN, 2, 0.5, ends)
    watch.start()
    other.start()
    with pytest.raises(queue.Empty):
        ends.get(timeout=1)
    other.stop()
    reason = ends.get(timeout=30)
    assert re.fullmatch(r"rank 1 \(there, process 11\) has not been heard of for \d s, last in .* step 7", reason)
    watch.stop()


def test_an_error_that_another_rank_reports_ends_the_process(ends: Ends) -> None:
    store = HashStore()
    watches = [Watch(store, OWN, 2, 5, ends), Watch(store, OTHER, 2, 5, ends)]
    watches[1].own = Beat(1, "there", 11, step=7, failure="KeyError: 'zh'")
    watches[1].ending = True  # the other one ends it
    for watch in watches:
        watch.start()
    assert ends.get(timeout=30) == "rank 1 (there, process 11) stopped in optimizer step 7: KeyError: 'zh'"
    for watch in watches:
        watch.stop()
    assert ends.empty()


def test_a_rank_that_failed_stays_until_the_others_have_heard(ends: Ends) -> None:
    store = HashStore()
    failed, other = Watch(store, replace(OTHER, failure="KeyError"), 2, 5, ends), Watch(store, OWN, 2, 5, ends)
    failed.ending = True
    failed.start()
    with ThreadPoolExecutor() as threads:
        staying = threads.submit(failed.stay, None)
        with pytest.raises(TimeoutError):
            staying.result(timeout=2)
        other.start()
        staying.result(timeout=5)
    assert ends.get(timeout=10) == "rank 1 (there, process 11) stopped in optimizer step 7: KeyError"
    other.stop()


def test_a_child_that_failed_stays_until_its_parent_has_ended(monkeypatch: pytest.MonkeyPatch, ends: Ends) -> None:
    failed = Watch(HashStore(), replace(OTHER, failure="KeyError"), 1, 5, ends)
    failed.ending = True
    failed.start()
    failed.stop()
    monkeypatch.setattr("lightning_mixcn.callbacks.rank_watch._STAY_SECONDS", 1.5)
    begin = time.monotonic()
    failed.stay(os.getppid())
    assert time.monotonic() - begin > 1
    begin = time.monotonic()
    failed.stay(os.getppid() + 1)
    assert time.monotonic() - begin < 0.5


def test_a_store_that_is_gone_ends_the_process(ends: Ends) -> None:
    host = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=2))
    client = TCPStore("127.0.0.1", host.port, wait_for_workers=False, timeout=timedelta(seconds=2))
    watch = Watch(client, OWN, 1, 0.5, ends)
    watch.start()
    with pytest.raises(queue.Empty):
        ends.get(timeout=1)
    del host
    assert "the store in which all ranks met" in ends.get(timeout=30)
    watch.stop()


def test_one_rank_alone_is_left_alone(module: PretrainModule, trainer: Callable[..., Trainer]) -> None:
    watch = RankWatch()
    trainer(callbacks=[watch]).fit(module, FixedBatches([random_batch([9])] * 2))
    assert watch._watch is None


def test_a_bad_timeout_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`timeout_seconds=0`: expected more than 0 seconds"):
        RankWatch(timeout_seconds=0)


@pytest.mark.multiprocess
@pytest.mark.parametrize(("number", "dead"), [(signal.SIGKILL, 0), (signal.SIGKILL, 1), (signal.SIGSTOP, 1)])
def test_the_other_rank_ends_and_names_it(
    number: int, dead: int, forked_fits: Any, fit_config: Path, tmp_path: Path
) -> None:
    content = json.loads(fit_config.read_text())
    content["trainer"] |= {"devices": 2, "strategy": "ddp", "max_steps": 100_000}
    content["trainer"]["callbacks"].append({"class_path": "RankWatch", "init_args": {"timeout_seconds": 4}})
    config = tmp_path / "fit.yaml"
    config.write_text(json.dumps(content))
    forked_fits.start(tmp_path, ["fit", "--config", str(config), "--trainer.default_root_dir", "run"], ranks=2)
    forked_fits.wait_for(tmp_path / "run" / "checkpoints", "step=*.ckpt")
    processes = forked_fits.processes()
    os.kill(processes[dead], number)
    while not ended(processes[1 - dead]):
        time.sleep(0.05)
    if number == signal.SIGSTOP:
        os.kill(processes[dead], signal.SIGKILL)
    codes = forked_fits.wait()
    log = forked_fits.log.read_text()
    assert codes[1 - dead] == 1, log[-4000:]
    assert re.search(rf"RankWatch: rank {dead} \(.*, process {processes[dead]}\) has not been heard of for", log), log
    assert f"; rank {1 - dead} (" in log
    assert "Start all ranks again with --ckpt_path last" in log


def ended(process: int) -> bool:
    """Whether a process is gone, or a zombie: its parent waits for the other rank first."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.fixture
def ranks() -> list[Heartbeats]:
    store = HashStore()
    return [Heartbeats(store, 3, interval_seconds=5) for _ in range(3)]


def beat(rank: int, number: int, **changes: Any) -> Beat:
    return Beat(rank, f"node{rank}", 1000 + rank, number=number, **changes)


def test_a_rank_lives_while_its_beat_changes(ranks: list[Heartbeats]) -> None:
    for number in range(10):
        for rank, heartbeats in enumerate(ranks):
            heartbeats.exchange(beat(rank, number))
    assert ranks[0].silent(4) is None
    assert ranks[0].failed() is None


def test_a_silent_rank_is_named(ranks: list[Heartbeats]) -> None:
    for rank in (2, 1, 0):
        ranks[rank].exchange(beat(rank, 1, step=12))
    for number in range(2, 15):
        for rank in (1, 0):
            ranks[rank].exchange(beat(rank, number))
    assert ranks[0].silent(64) == (
        "rank 2 (node2, process 1002) has not been heard of for 65 s, last in optimizer step 12"
    )
    assert ranks[0].silent(65) is None


def test_a_rank_that_never_spoke_is_named(ranks: list[Heartbeats]) -> None:
    for number in range(14):
        ranks[0].exchange(beat(0, number))
    assert ranks[0].silent(60) == "rank 1 was never heard of in 70 s"


def test_a_rank_that_fails_says_why(ranks: list[Heartbeats]) -> None:
    told = "rank 1 (node1, process 1001) stopped in optimizer step 3: OutOfMemoryError: no memory"
    ranks[0].exchange_failure(beat(0, 1))
    assert ranks[0].failed() is None
    ranks[1].exchange_failure(beat(1, 1, step=3, failure="OutOfMemoryError: no memory"))
    ranks[0].exchange_failure(beat(0, 1))
    assert ranks[0].failed() == told
    assert not ranks[1].failure_is_known()  # rank 2 has not heard
    ranks[2].exchange_failure(beat(2, 1, failure="its own, a little later"))
    assert ranks[2].failed() is not None
    assert ranks[1].failure_is_known()
