import errno
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing import active_children, get_context
from pathlib import Path

import fsspec
import pytest
import xxhash

from lightning_mixcn.text import Source, read_corpus
from lightning_mixcn.text.corpus import unpack as unpacking
from lightning_mixcn.text.corpus.sources import SourceFile
from lightning_mixcn.text.corpus.store import StoreWriter, TextStore
from lightning_mixcn.text.corpus.unpack import cache_folder, find_store, is_first_rank, unpack, unpack_all

# From Python 3.12 on, of any fork beside a thread; the pool forks on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

LINES = "".join(json.dumps({"text": f"document {number}"}) + "\n" for number in range(50))
TEXTS = [f"document {number}" for number in range(50)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MIXCN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "text"


@pytest.fixture
def file(tmp_path: Path) -> SourceFile:
    (tmp_path / "x.jsonl").write_text(LINES)
    return SourceFile(tmp_path / "x.jsonl", "jsonl", "text", "file")


@pytest.fixture
def no_reading(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    def read(*arguments: object) -> None:
        raise AssertionError("the source is read again")

    with monkeypatch.context() as patch:
        patch.setattr(unpacking, "iterate_documents", read)
        yield patch


def texts_of(store: TextStore) -> list[str]:
    return [store.open().text(index) for index in range(len(store))]


def folders(cache: Path) -> list[Path]:
    return [path for path in cache.iterdir() if path.is_dir()]


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == tmp_path / "cache" / "text"
    monkeypatch.delenv("MIXCN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "lightning_mixcn" / "text"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "lightning_mixcn" / "text"


def test_store_is_reused(file: SourceFile, cache: Path, request: pytest.FixtureRequest) -> None:
    assert find_store(file, "error") is None
    store = unpack(file, "error")
    assert texts_of(store) == TEXTS
    (folder,) = folders(cache)
    assert sorted(path.name for path in folder.iterdir()) == [
        "digests.bin", "offsets.bin", "records.bin", "store.json", "texts.bin",
    ]  # fmt: skip
    request.getfixturevalue("no_reading")
    assert unpack(file, "error") == find_store(file, "error") == store


def test_settings_have_stores_of_their_own(file: SourceFile, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "a", "zh": "b"}\n')
    stores = [
        unpack(SourceFile(tmp_path / "x.jsonl", "jsonl", "text", "file"), "error"),
        unpack(SourceFile(tmp_path / "x.jsonl", "jsonl", "text", "file"), "skip"),
        unpack(SourceFile(tmp_path / "x.jsonl", "jsonl", "zh", "file"), "error"),
        unpack(SourceFile(tmp_path / "x.jsonl", "text", "text", "file"), "error"),
    ]
    assert len({store.folder for store in stores}) == 4
    assert [texts_of(store)[0] for store in stores] == ["a", "a", "b", '{"text": "a", "zh": "b"}\n']


def test_changed_file_is_unpacked_again(file: SourceFile, cache: Path, tmp_path: Path) -> None:
    for _ in range(3):  # of the same size, and within a moment
        for text in ("first", "other"):
            (tmp_path / "x.jsonl").write_text(f'{{"text": "{text}"}}\n')
            assert texts_of(unpack(file, "error")) == [text]
    assert len(folders(cache)) == 1


def test_store_that_was_replaced_is_told(file: SourceFile, tmp_path: Path) -> None:
    old = unpack(file, "error")
    (tmp_path / "x.jsonl").write_text('{"text": "new"}\n')
    unpack(file, "error")
    with pytest.raises(FileNotFoundError, match=r"are gone, or their source was changed.*Start this process again"):
        old.open()


@pytest.mark.parametrize("name", ["texts.bin", "offsets.bin", "digests.bin", "records.bin", "store.json"])
@pytest.mark.parametrize("damage", ["cut", "missing", "longer"])
def test_damaged_store_is_made_again(name: str, damage: str, file: SourceFile, cache: Path) -> None:
    unpack(file, "error")
    (folder,) = folders(cache)
    data = (folder / name).read_bytes()
    (folder / name).unlink()
    if damage != "missing":
        (folder / name).write_bytes(data[: len(data) // 2] if damage == "cut" else data + b"xxxxxxxx")
    assert find_store(file, "error") is None
    assert texts_of(unpack(file, "error")) == TEXTS
    assert folders(cache) == [folder]


@pytest.mark.parametrize("name", ["texts.bin", "offsets.bin", "digests.bin", "records.bin", "store.json"])
def test_store_that_was_altered_is_made_again(
    name: str, file: SourceFile, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = unpack(file, "error")
    (folder,) = folders(cache)
    data = (folder / name).read_bytes()
    altered = data.replace(b'"bad_records": 0', b'"bad_records": 7') if name.endswith(".json") else b"\x77" + data[1:]
    assert altered != data
    (folder / name).write_bytes(altered)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert find_store(file, "error") is not None, "the first process of a machine has looked before this one"
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert find_store(file, "error") is None
    assert caplog.messages == [
        f"The unpacked texts of `{file.path}` were altered in `{folder}`: they are unpacked again"
    ]
    assert unpack(file, "error") == store
    assert find_store(file, "error") == store


def test_a_secret_of_an_url_is_not_kept(cache: Path) -> None:
    url = "memory://user:Secret.1@host/x.jsonl"
    with fsspec.open(url, "w") as opened:
        opened.write(LINES + "{\n")
    store = unpack(SourceFile(url, "jsonl", "text", "file"), "skip")
    assert store.file == "memory://<masked>@host/x.jsonl"
    assert store.counts.bad_places[0].startswith("`memory://<masked>@host/x.jsonl` line 51 is not JSON")
    (folder,) = folders(cache)
    assert not [path for path in folder.iterdir() if b"Secret.1" in path.read_bytes()]
    assert find_store(SourceFile(url, "jsonl", "text", "file"), "skip") == store


def test_contents_are_compared_once(file: SourceFile, monkeypatch: pytest.MonkeyPatch) -> None:
    unpack(file, "error")
    assert find_store(file, "error") is not None
    monkeypatch.setattr(xxhash, "xxh3_128", lambda: pytest.fail("read again"))
    assert find_store(file, "error") is not None


@pytest.mark.parametrize("content", ["[]", "1", '{"counts": 1}', '{"counts": {"documents": 1}}', '{"counts": null}'])
def test_damaged_description(content: str, file: SourceFile, cache: Path) -> None:
    unpack(file, "error")
    (folder,) = folders(cache)
    (folder / "store.json").write_text(content)
    assert texts_of(unpack(file, "error")) == TEXTS


KILLED = """
import os, sys
from pathlib import Path
from lightning_mixcn.text.corpus import unpack as unpacking
from lightning_mixcn.text.corpus.sources import SourceFile
from lightning_mixcn.text.corpus.store import StoreWriter
StoreWriter.finish = lambda *arguments: (print(*os.listdir(sys.argv[2])), sys.stdout.flush(), os.kill(os.getpid(), 9))
unpacking.unpack(SourceFile(Path(sys.argv[1]), "jsonl", "text", "file"), "error")
"""


def test_killed_process_leaves_nothing_that_is_used(file: SourceFile, cache: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(file.path), str(cache)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    assert len(folders(cache)) == 1
    assert find_store(file, "error") is None
    assert texts_of(unpack(file, "error")) == TEXTS
    assert [path.name for path in folders(cache) if path.name.startswith(".")] == []


def test_damaged_source_leaves_nothing(file: SourceFile, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(LINES + "{")
    with pytest.raises(ValueError, match=r"x.jsonl` line 51 is not JSON"):
        unpack(file, "error")
    assert folders(cache) == []


def test_source_that_changes_meanwhile(file: SourceFile, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*arguments: object) -> Iterator[tuple[int, bytes]]:
        yield 1, b"old"
        with Path(file.path).open("a") as more:
            more.write("{}\n")

    monkeypatch.setattr(unpacking, "iterate_documents", read)
    with pytest.raises(ValueError, match=r"x.jsonl` was changed while it was read"):
        unpack(file, "error")
    assert folders(cache) == []


def test_cache_that_cannot_be_written(file: SourceFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "taken").touch()
    monkeypatch.setenv("MIXCN_CACHE", str(tmp_path / "taken"))
    message = r"cache folder `.*/taken/text` of unpacked texts cannot be written: Not a directory. Set .* MIXCN_CACHE"
    with pytest.raises(OSError, match=message):
        unpack(file, "error")


def test_read_only_cache_is_read(
    file: SourceFile, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Source("zh", str(file.path))
    read_corpus(source)
    monkeypatch.setattr(Path, "mkdir", lambda *arguments, **options: pytest.fail("a folder is made"))
    assert read_corpus(source).text(3) == TEXTS[3]


@pytest.mark.parametrize("method", ["flush", "finish"])
def test_full_disk(method: str, file: SourceFile, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(StoreWriter, method, fail)
    with pytest.raises(OSError, match=r"unpacked texts cannot be written: No space left.*MIXCN_CACHE") as caught:
        unpack(file, "error")
    assert caught.value.errno == errno.ENOSPC
    assert folders(cache) == []


TWICE = """
import fcntl, sys
from pathlib import Path
from lightning_mixcn.text.corpus import unpack as unpacking
from lightning_mixcn.text.corpus.sources import SourceFile
if sys.argv[3] == "without locks":
    def flock(*arguments):
        raise OSError
    fcntl.flock = flock
read = unpacking.iterate_documents
def count(*arguments):
    print("reads")
    yield from read(*arguments)
unpacking.iterate_documents = count
print("ready", flush=True)
sys.stdin.readline()
store = unpacking.unpack(SourceFile(Path(sys.argv[1]), "jsonl", "text", "file"), "error")
print(len(store), store.open().text(49_999))
"""


@pytest.mark.multiprocess
@pytest.mark.parametrize("locks", ["with locks", "without locks"])
def test_processes_at_once(locks: str, file: SourceFile, cache: Path) -> None:
    Path(file.path).write_text(LINES * 1000)
    command = [sys.executable, "-c", TWICE, str(file.path), str(cache), locks]
    processes = [subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(3)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 3
    assert {output.splitlines()[-1] for output in outputs} == {"50000 document 49"}
    assert locks == "without locks" or "".join(outputs).count("reads") == 1
    assert len(folders(cache)) == 1


MEMORY = """
import sys
from pathlib import Path
from lightning_mixcn.text import Source, read_corpus
def megabytes(name):
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1000
corpus = read_corpus(Source("zh", sys.argv[1]))
peak = megabytes("VmHWM")
total = sum(len(corpus.text(index)) for index in range(len(corpus)))
# What was mapped and read meanwhile the system takes back when it needs room.
print(total, peak, megabytes("RssAnon"))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is told apart on Linux only")
def test_memory_is_bounded(file: SourceFile, tmp_path: Path) -> None:
    line = json.dumps({"text": "x" * 1000}) + "\n"
    with (tmp_path / "x.jsonl").open("w") as out:
        for _ in range(200):
            out.write(line * 1000)
    command = [sys.executable, "-c", MEMORY, str(file.path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    total, peak, anonymous = map(float, done.stdout.split())
    assert total == 200_000_000
    assert (peak < 150, anonymous < 150) == (True, True), done.stdout


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[SourceFile]:
    monkeypatch.setattr(unpacking, "MIN_PARALLEL_BYTES", 0)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    for number in range(5):
        (tmp_path / f"{number}.jsonl").write_text(json.dumps({"text": f"text {number}"}) + "\n")
    return [SourceFile(tmp_path / f"{number}.jsonl", "jsonl", "text", "file") for number in range(5)]


@pytest.mark.multiprocess
def test_processes_give_the_same_stores(files: list[SourceFile], monkeypatch: pytest.MonkeyPatch) -> None:
    made = unpack_all(files, "error", "zh")
    assert [store.open().text(0) for store in made] == [f"text {number}" for number in range(5)]
    monkeypatch.setattr(unpacking, "unpack", lambda *arguments: pytest.fail("made again"))
    assert unpack_all(files, "error", "zh") == made


@pytest.mark.multiprocess
def test_a_daemon_starts_no_processes(files: list[SourceFile]) -> None:
    with get_context("fork").Pool(1) as pool:
        assert len(pool.apply(unpack_all, (files, "error", "zh"))) == 5


@pytest.mark.multiprocess
def test_errors_come_from_processes(files: list[SourceFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "3.jsonl").write_text("{\n")
    with pytest.raises(ValueError, match=r"3.jsonl` line 1 is not JSON: .*Mend the line"):
        unpack_all(files, "error", "zh")
    assert [store.counts.bad_records for store in unpack_all(files, "skip", "zh")] == [0, 0, 0, 1, 0]
    assert not [path.name for path in cache_folder().iterdir() if path.name.startswith(".")]
    (tmp_path / "taken").touch()
    monkeypatch.setenv("MIXCN_CACHE", str(tmp_path / "taken"))
    with pytest.raises(OSError, match=r"taken/text` of unpacked texts cannot be written: Not a directory"):
        unpack_all(files, "error", "zh")


@pytest.mark.multiprocess
def test_process_that_dies(files: list[SourceFile], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacking, "unpack", lambda *arguments: os._exit(7))
    message = r"^A process that unpacked `.*0\.jsonl` or `.*1\.jsonl` was killed\. The memory may be too small.*again$"
    with pytest.raises(ValueError, match=message):
        unpack_all(files, "error", "zh")
    assert not active_children()


ORPHANS = """
import os, sys, time
from pathlib import Path
from lightning_mixcn.text.corpus import unpack as unpacking
from lightning_mixcn.text.corpus.sources import SourceFile
unpacking.MIN_PARALLEL_BYTES = 0
os.cpu_count = lambda: 2
def sleep(*arguments):
    os.write(1, f"{os.getpid()}\\n".encode())  # at once: `print` may write the end of line apart
    time.sleep(60)
unpacking.unpack = sleep
unpacking.unpack_all([SourceFile(Path(path), "jsonl", "text", "file") for path in sys.argv[1:]], "error", "zh")
"""


def lives(process: int) -> bool:
    status = Path(f"/proc/{process}/stat")
    return status.exists() and ") Z " not in status.read_text()


@pytest.mark.multiprocess
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are listed there on Linux only")
def test_processes_end_with_a_killed_parent(files: list[SourceFile]) -> None:
    command = [sys.executable, "-c", ORPHANS, *(str(file.path) for file in files)]
    with subprocess.Popen(command, text=True, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        children = [int(parent.stdout.readline()) for _ in range(2)]
        parent.kill()
        deadline = time.monotonic() + 30
        while any(map(lives, children)):
            assert time.monotonic() < deadline
            time.sleep(0.1)


SCRIPT = """
import os, sys
print("script")
from lightning_mixcn.text import Source, read_corpus
from lightning_mixcn.text.corpus import unpack as unpacking
unpacking.MIN_PARALLEL_BYTES = 0
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
    monkeypatch.setattr(unpacking, "MIN_PARALLEL_BYTES", 1 << 40)
    for rank, shown in (("1", False), ("0", True)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert is_first_rank() == shown
        monkeypatch.setattr(sys, "stderr", terminal := Terminal())
        unpack_all(files[: 2 if shown else 1], "error", "zh")
        assert ("unpacking zh" in terminal.getvalue()) == shown
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    unpack_all(files[:2], "error", "zh")
    assert terminal.getvalue() == ""
