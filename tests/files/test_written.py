from pathlib import Path

import pytest

from lightning_mixcn.files.written import in_units, say_written


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_700, "1 MB"), (1_234_567_890, "1.23 GB"), (5e15, "5e+03 TB")],
)
def test_units(size: float, text: str) -> None:
    assert in_units(size) == text


def test_a_folder_and_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "inside").mkdir()
    for name in ("one", "inside/two"):
        (tmp_path / name).write_bytes(bytes(600))
    say_written(tmp_path, "two files.")
    say_written(tmp_path / "one", "one file.")
    assert capsys.readouterr().out == f"{tmp_path} (1.2 kB): two files.\n{tmp_path / 'one'} (600 B): one file.\n"
