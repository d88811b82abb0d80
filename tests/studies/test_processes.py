"""Several processes of one command: what rank 0 does is known to all, and its errors are everybody's."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_mixcn.studies.processes import is_first, joined_processes
from lightning_mixcn.testing import run_distributed


def meet(folder: str) -> dict[str, Any]:
    """Report what one of several ranks sees."""
    with joined_processes(torch.device("cpu")) as processes:
        first = processes.from_first(lambda: os.environ["RANK"])
        with processes.first_before_others():
            seen = len(list(Path(folder).iterdir()))
            Path(folder, str(processes.rank)).touch()

        def fail() -> None:
            raise FileExistsError("taken")

        try:
            processes.from_first(fail)
        except FileExistsError as error:
            return {
                "first": first,
                "seen": min(seen, 1),
                "error": str(error),
                "speaks": is_first(),
                "rank": processes.rank,
            }
    return {}


@pytest.mark.multiprocess
def test_two_processes(tmp_path: Path) -> None:
    found = run_distributed(meet, 2, str(tmp_path))
    assert found == [
        {"first": "0", "seen": rank, "error": "taken", "speaks": rank == 0, "rank": rank} for rank in range(2)
    ]


def test_one_process_needs_no_group() -> None:
    with joined_processes(torch.device("cpu")) as processes:
        assert (processes.rank, processes.count, processes.device) == (0, 1, torch.device("cpu"))
        assert processes.from_first(lambda: 3) == 3
    assert is_first()


def test_processes_that_nobody_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match=r"WORLD_SIZE=2 in the environment, but no RANK\. Start several processes"):
        joined_processes(torch.device("cpu")).__enter__()
