import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_mixcn.text.corpus import unpack as unpacking_processes
from lightning_mixcn.text.corpus.sources import SourceFile
from lightning_mixcn.text.corpus.unpack import is_first_rank, unpack_all


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[SourceFile]:
    monkeypatch.setattr(unpacking_processes, "MIN_PARALLEL_BYTES", 0)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    for number in range(5):
        (tmp_path / f"{number}.jsonl").write_text(json.dumps({"text": f"text {number}"}) + "\n")
    return [SourceFile(tmp_path / f"{number}.jsonl", "jsonl", "text", "file") for number in range(5)]


@pytest.mark.multiprocess
def test_processes_give_the_same_stores(files: list[SourceFile], monkeypatch: pytest.MonkeyPatch) -> None:
    made = unpack_all(files, "error", "zh")
    assert [store.open().text(0) for store in made] == [f"text {number}" for number in range(5)]
    monkeypatch.setattr(unpacking_processes, "_unpack_missing", lambda *arguments: pytest.fail("made again"))
    assert unpack_all(files, "error", "zh") == made


@pytest.mark.multiprocess
def test_errors_come_from_processes(files: list[SourceFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "3.jsonl").write_text("{\n")
    with pytest.raises(ValueError, match=r"3.jsonl` line 1 is not JSON: .*Mend the line"):
        unpack_all(files, "error", "zh")
    assert [store.counts.bad_records for store in unpack_all(files, "skip", "zh")] == [0, 0, 0, 1, 0]
    (tmp_path / "taken").touch()
    monkeypatch.setenv("MIXCN_CACHE", str(tmp_path / "taken"))
    with pytest.raises(OSError, match=r"taken/text` of unpacked texts cannot be written: Not a directory"):
        unpack_all(files, "error", "zh")


@pytest.mark.multiprocess
def test_process_that_dies(files: list[SourceFile], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacking_processes, "_PROGRAM", "import os; os._exit(7)")
    with pytest.raises(ValueError, match=r"The process that unpacked `.*\.jsonl` ended with 7. The file may"):
        unpack_all(files, "error", "zh")


SCRIPT = """
import os, sys
print("script")
from lightning_mixcn.text import Source, read_corpus, unpacking_processes
unpacking_processes.MIN_PARALLEL_BYTES = 0
os.cpu_count = lambda: 2
print(len(read_corpus(Source("zh", sys.argv[1]))))
"""


@pytest.mark.multiprocess
def test_script_without_a_guard(files: list[SourceFile], tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), f"{tmp_path}/*.jsonl"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("script\n5\n", "")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_on_the_first_rank_alone(files: list[SourceFile], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacking_processes, "MIN_PARALLEL_BYTES", 1 << 40)
    for rank, shown in (("1", False), ("0", True)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert is_first_rank() == shown
        monkeypatch.setattr(sys, "stderr", terminal := Terminal())
        unpack_all(files[: 2 if shown else 1], "error", "zh")
        assert ("unpacking zh" in terminal.getvalue()) == shown
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    unpack_all(files[:2], "error", "zh")
    assert terminal.getvalue() == ""
