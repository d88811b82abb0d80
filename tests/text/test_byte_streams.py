import random
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from lightning_mixcn.text.corpus.reading import read_chunks, split_lines


@given(st.lists(st.binary(max_size=5) | st.sampled_from([b"\n", b"a\r\nb", b"\n\n"])))
def test_lines_do_not_depend_on_the_pieces(chunks: list[bytes]) -> None:
    lines = b"".join(chunks).split(b"\n")
    if not lines[-1]:
        lines.pop()
    assert list(split_lines(chunks)) == list(enumerate(lines, start=1))


def test_chunks_are_of_bounded_size(tmp_path: Path) -> None:
    data = bytes(300_000_000)
    (tmp_path / "x.zst").write_bytes(zstandard.compress(data))
    assert (tmp_path / "x.zst").stat().st_size < 40_000
    (tmp_path / "x").write_bytes(random.Random(0).randbytes(3_000_000))
    assert max(len(chunk) for chunk in read_chunks(tmp_path / "x")) == 1 << 20
    assert sum(len(chunk) for chunk in read_chunks(tmp_path / "x.zst")) == len(data)


def test_what_the_file_system_says_is_no_damage(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        list(read_chunks(tmp_path))
