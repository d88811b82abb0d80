import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_mixcn.text.corpus.store import (
    VERSION,
    OpenStore,
    RecordTally,
    StoreCounts,
    StoreWriter,
    read_store,
)

MADE_FROM = {"version": VERSION, "file": "x.jsonl"}


def write(folder: Path, texts: list[str], flush_every: int = 3) -> StoreCounts:
    folder.mkdir(exist_ok=True)
    with StoreWriter(folder) as writer:
        for record, text in enumerate(texts):
            writer.append(record * 10, text.encode())
            if record % flush_every == 0:
                writer.flush()
        return writer.finish(MADE_FROM, RecordTally(2, ["first", "second"], empty_records=3, columns={"a"}))


@given(texts=st.lists(st.text(st.characters(codec="utf-8"))), flush_every=st.integers(1, 5))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, texts: list[str], flush_every: int) -> None:
    folder = tmp_path_factory.mktemp("store")
    counts = write(folder, texts, flush_every)
    assert read_store(folder) == (MADE_FROM, counts)
    assert (counts.documents, counts.num_bytes) == (len(texts), sum(len(text.encode()) for text in texts))
    assert (counts.bad_records, counts.bad_places) == (2, ("first", "second"))
    assert (counts.empty_records, counts.columns) == (3, ("a",))
    store = OpenStore(str(folder), counts)
    assert [store.text(index) for index in range(len(texts))] == texts
    assert [store.record(index) for index in range(len(texts))] == [record * 10 for record in range(len(texts))]
    assert len(store.digests(0, len(texts))) == len(texts)
    ends = np.cumsum([0, *(len(text.encode()) for text in texts)]).tolist()
    assert [store.span(index) for index in range(len(texts))] == list(pairwise(ends))


def test_flushing_does_not_change_the_fingerprint(tmp_path: Path) -> None:
    fingerprints = {write(tmp_path / str(every), ["a", "b", "c", "d"], every).fingerprint for every in (1, 2, 9)}
    assert len(fingerprints) == 1
    assert write(tmp_path / "other", ["a", "b", "d", "c"]).fingerprint not in fingerprints


def test_unfinished_store_is_none(tmp_path: Path) -> None:
    with StoreWriter(tmp_path) as writer:
        writer.append(0, b"a")
        writer.flush()
    assert read_store(tmp_path) is None
    assert read_store(tmp_path / "nothing") is None


def test_another_version_is_none(tmp_path: Path) -> None:
    write(tmp_path, ["a"])
    content = json.loads((tmp_path / "store.json").read_text())
    (tmp_path / "store.json").write_text(json.dumps(content | {"version": 0}))
    assert read_store(tmp_path) is None


def test_a_store_that_is_cut_off_in_use(tmp_path: Path) -> None:
    store = OpenStore(str(tmp_path), write(tmp_path, ["abc"]))
    (tmp_path / "texts.bin").write_bytes(b"a")
    with pytest.raises(OSError, match=r"texts.bin` was cut off while it was in use. Start this process again"):
        store.text(0)
