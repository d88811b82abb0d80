"""A file in which a resumed run repeats and loses nothing."""

from pathlib import Path

import pytest

from lightning_mixcn.callbacks.expert_load.report import ExpertLoadFile, Row

HEADER = "step,stage,source,position_from,layer,expert,tokens"


def row(step: int, stage: str = "train", source: str = "zh", tokens: int = 7) -> Row:
    return Row(step, stage, source, 0, 1, 2, tokens)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A run of five steps that logs every other, validates every third, and was killed while it wrote."""
    path = tmp_path / "run" / "experts.csv"
    file = ExpertLoadFile(path)
    file.start(0, 0)
    for step, stage in ((2, "train"), (3, "val"), (4, "train")):
        file.append([row(step, stage), row(step, stage, "en")])
    with path.open("a", encoding="utf-8") as unfinished:
        unfinished.write("5,train,z")
    return path


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def test_columns(path: Path) -> None:
    assert lines(path)[:3] == [HEADER, "2,train,zh,0,1,2,7", "2,train,en,0,1,2,7"]


def steps(path: Path) -> list[tuple[str, ...]]:
    return [tuple(line.split(",")[:3]) for line in lines(path)[1:]]


def test_a_new_run_starts_anew(path: Path) -> None:
    ExpertLoadFile(path).start(0, 0)
    assert lines(path) == [HEADER]


@pytest.mark.parametrize(
    ("step", "logged_at", "kept"),
    [(2, 2, "2"), (3, 2, "23"), (4, 4, "234"), (4, 2, "23"), (5, 4, "234")],
)
def test_going_on(step: int, logged_at: int, kept: str, path: Path) -> None:
    ExpertLoadFile(path).start(step, logged_at)
    assert [at for at, _, source in steps(path) if source == "zh"] == list(kept)
    assert len(steps(path)) == 2 * len(kept)


def test_a_validation_that_is_repeated_replaces_its_lines(path: Path) -> None:
    file = ExpertLoadFile(path)
    file.start(3, 2)
    file.append([row(3, "val", tokens=8)])
    file.append([row(6, "val")])
    assert lines(path)[3:] == ["3,val,zh,0,1,2,8", "6,val,zh,0,1,2,7"]


def test_a_name_with_a_comma_is_quoted(path: Path) -> None:
    ExpertLoadFile(path).append([row(6, source='a, "b"')])
    assert lines(path)[-1].endswith('6,train,"a, ""b""",0,1,2,7')
