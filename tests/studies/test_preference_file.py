"""Sheets as CSV: what a spreadsheet gets, and what it gives back."""

import csv
import io
from pathlib import Path

import pytest

from lightning_mixcn.studies.preference.sheet import (
    COLUMNS,
    SheetRow,
    Verdict,
    printable,
    read_sheet,
    sheet_csv,
)

NASTY = ["=1+1", "+1", "-1 apples", "@SUM(A1)", "＝1", "\tx", "\nx", '"=1"', 'a,b;c\n"d"', "", "' =x", "你好"]


def test_a_spreadsheet_runs_nothing_and_reads_chinese() -> None:
    content = sheet_csv(SheetRow(f"p-{place}", text, text, text) for place, text in enumerate(NASTY))
    assert content.startswith(b"\xef\xbb\xbf")
    rows = list(csv.reader(io.StringIO(content.decode("utf-8-sig"), newline="")))
    assert rows[0] == list(COLUMNS)
    for text, row in zip(NASTY, rows[1:], strict=True):
        escaped = f"'{text}" if text[:1] in tuple("=+-@＝\t\n") else text
        assert row[1:] == [escaped] * 3 + [""]
        assert not any(cell.startswith(tuple("=+-@＝＋－＠\t\r\n")) for cell in row)


def test_control_characters_are_shown_as_broken() -> None:
    assert printable("a\x00b\x1bc\td\r\ne\rf") == "a\ufffdb\ufffdc\td\ne\nf"


SAVED = {
    "as it was": '\ufeff"item","question","verdict"\r\n"p-1","a\nb","left"\r\n"p-2","x",""\r\n',
    "german": "item;question;verdict\n p-1 ;a,b;LEFT \np-2;x;\n;;\n\n",
    "tabs": "Verdict\tItem\nleft\tp-1\n\tp-2\n",
    "chinese": 'item,question,verdict\np-1,"a\nb",左\np-2,x,\n',
}


@pytest.mark.parametrize("content", SAVED.values(), ids=SAVED)
def test_sheets_as_programs_save_them(tmp_path: Path, content: str) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(content.encode())
    assert read_sheet(file) == [Verdict(2, "p-1", "left"), Verdict(3, "p-2", "")]


def test_every_word(tmp_path: Path) -> None:
    words = ["left", "right", "tie", "左", "右", "平", "Tie"]
    lines = (f"p-{place},{word}\n" for place, word in enumerate(words))
    (tmp_path / "a.csv").write_text("item,verdict\n" + "".join(lines), encoding="utf-8")
    expected = ["left", "right", "tie", "left", "right", "tie", "tie"]
    assert [found.verdict for found in read_sheet(tmp_path / "a.csv")] == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "item,verdict\np-1,left\np-2,both\n",
            "row 3: the verdict 'both' is not known. Expected one of left, right, tie",
        ),
        ("item,verdict\np-1,left\np-1,left\n", "rows 2 and 3 are both of item 'p-1'"),
        ("item,verdict\n\np-1\n", "row 3 has 1 cells, the header 2"),
        ("item,answer\np-1,left\n", "row 1: expected one column 'verdict', got 'item, answer'"),
        ("", "row 1: expected one column 'item'"),
        ('item,verdict\n"p-1,left\n', "is no CSV"),
        ("item,verdict\np-1,左\n".encode("gbk"), 'is not UTF-8. Save it as "CSV UTF-8"'),
    ],
)
def test_what_is_refused(tmp_path: Path, content: str | bytes, message: str) -> None:
    file = tmp_path / "judge.csv"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=r"judge\.csv") as error:
        read_sheet(file)
    assert message in str(error.value)


def test_no_file() -> None:
    with pytest.raises(FileNotFoundError, match="is no file"):
        read_sheet("nowhere.csv")
