"""Small files of strangers: read as they are, or refused in one line that names the file."""

from pathlib import Path

import pytest

from lightning_mixcn.errors import UserError
from lightning_mixcn.files import json_object
from lightning_mixcn.files.json_object import read_object
from lightning_mixcn.files.schema import TEXT, each, first_fault, mapping_of, real, record, whole


def test_an_object_is_read_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": [1, 2.5, null, true, "\\ud83d\\ude00"]}')
    assert read_object(tmp_path / "a.json") == {"a": [1, 2.5, None, True, "😀"]}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b"[1]", "holds a JSON list, expected an object"),
        (b"null", "holds a JSON NoneType, expected an object"),
        (b'{"a": NaN}', "it holds NaN"),
        (b'{"a": -Infinity}', "it holds -Infinity"),
        (b'{"a": 1, "b": 2, "a": 1}', "the key 'a' is there twice"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"a": ' + b"[" * 80 + b"]" * 80 + b"}", "nested more than 64 levels deep"),
        (b'{"a": "\xff"}', "can't decode byte"),
        (b'{"a": "\\ud800"}', "surrogates not allowed"),
        (b'{"a": ' + b"9" * 5000 + b"}", "Exceeds the limit"),
    ],
)
def test_anything_else_is_one_line(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.json'.*{reason}") as raised:
        read_object(tmp_path / "a.json")
    assert "\n" not in str(raised.value)


def test_what_would_not_fit_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_object, "LARGEST_JSON_BYTES", 10)
    (tmp_path / "a.json").write_text('{"a": "long"}')
    with pytest.raises(UserError, match=r"a\.json' has 13 bytes, expected at most 10"):
        read_object(tmp_path / "a.json")
    with pytest.raises(FileNotFoundError, match=r"b\.json' is not there"):
        read_object(tmp_path / "b.json")


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        ({"n": 1, "x": 0.5, "names": ["a"], "map": {"a": 1}}, None),
        ({"n": True, "x": 0.5}, "n is true, expected a whole number of 1 to 3"),
        ({"n": 10**5000, "x": 0.5}, "n is a whole number of 16,610 bits, expected a whole number of 1 to 3"),
        ({"n": 1, "x": float("nan")}, "x is nan, expected a finite number of 0 to 1"),
        ({"n": 1, "x": 10**400}, "x is a whole number of 1,329 bits, expected a finite number of 0 to 1"),
        ({"n": 1}, "x is missing"),
        ({"n": 1, "x": 0, "names": "abc"}, "names is 'abc', expected a list"),
        ({"n": 1, "x": 0, "names": ["a", {}]}, "names[1] is a mapping of 0 entries, expected text"),
        ({"n": 1, "x": 0, "map": {3: 1}}, "a key of map is 3, expected text"),
        ({"n": 1, "x": 0, "map": {"a": 4}}, "map['a'] is 4, expected a whole number of 1 to 3"),
        ([1, 2], "it is a list of 2 entries, expected a mapping"),
    ],
)
def test_a_structure_names_the_first_fault(value: object, fault: str | None) -> None:
    number = whole(1, 3)
    check = record({"n": number, "x": real(0, 1)}, {"names": each(TEXT), "map": mapping_of(TEXT, number)})
    assert first_fault(value, check) == fault
