from pathlib import Path

import pytest
import yaml

from lightning_mixcn.errors import UserError
from lightning_mixcn.files.configuration import check_yaml, read_configuration

BOMB = "\n".join(["a0: &a0 [lol, lol]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9))])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a: 1\nb: {a: 1}\nc: [{a: 1}, {a: 2}]",
        "x: &x {a: 1}\ny: &y {b: 1}\nz: {<<: *x, c: 3}\nw: [*x, *y, *x]",
        "text: |\n  a: 1\n  a: 2",
        "---\na: 1\n...\n",
    ],
)
def test_a_configuration_passes(text: str) -> None:
    check_yaml(text, "--config x.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trainer: {a: 1}\nb: 2\ntrainer: {c: 1}", "line 3: the key 'trainer' is there twice, and only one"),
        ("a:\n  b: 1\n  'b': 2", "line 3: the key 'b' is there twice"),
        ("a: [{x: 1, y: 2, x: 3}]", "line 1: the key 'x' is there twice"),
        ("1: a\n'1': b", "line 2: the key '1' is there twice"),
        ("a: " + "[" * 3000 + "]" * 3000, "line 1: values are nested more than 64 deep"),
        ("a: &a [*a]", "line 1: the alias \\*a is inside of what it stands for"),
        ("a: &a {b: {c: *a}}", "line 1: the alias \\*a is inside"),
        (BOMB, "line 6: aliases make more than 200,000 values of it"),
        ("a: 1\n---\na: 1", "line 2: a second document begins, expected one"),
        ("a: [1", "`--config x.yaml` is not YAML: .*line 1"),
        ("\ta: 1", "`--config x.yaml` is not YAML: .*'\\\\t'"),
        ("a: *b", "`--config x.yaml`, line 1: the alias \\*b stands for nothing"),
    ],
)
def test_what_a_loader_would_take_or_fail_with(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        check_yaml(text, "--config x.yaml")
    assert "\n" not in str(raised.value)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_bytes("\ufeffname: 中文\r\n".encode())
    assert yaml.safe_load(read_configuration(file, "--config")) == {"name": "中文"}
    for content, place in (("a: z\xe9".encode("latin-1"), "byte 4 is 0xe9"), ("a: 1".encode("utf-16"), "byte 0 is 0x")):
        file.write_bytes(content)
        with pytest.raises(UserError, match=f"`--config` is not UTF-8 \\({place}"):
            read_configuration(file, "--config")
    with file.open("wb") as stream:
        stream.truncate(2**24 + 1)
    with pytest.raises(UserError, match="has 16,777,217 bytes, expected a configuration of at most 16,777,216"):
        read_configuration(file, "--config")
