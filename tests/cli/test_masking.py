import io
import logging
import sys
import time
from pathlib import Path

import pytest
import yaml
from jsonargparse import Namespace

from lightning_mixcn import cli
from lightning_mixcn.cli.settings import mask_settings, refuse_masks
from lightning_mixcn.errors import UserError
from lightning_mixcn.masking import MASK, mask_secrets, visible, without_secrets
from lightning_mixcn.text import Source, parse_sources

SECRET = "S3cr3t.Value-1"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"http://user:{SECRET}@h/x.jsonl", f"http://{MASK}@h/x.jsonl"),
        (f"https://{SECRET}@h/x", f"https://{MASK}@h/x"),
        (f"s3://KEY:{SECRET}@b/a-?.jsonl", f"s3://{MASK}@b/a-?.jsonl"),
        (f"zip://a.jsonl::https://u:{SECRET}@h/x.zip", f"zip://a.jsonl::https://{MASK}@h/x.zip"),
        (f"ftp://u:p@{SECRET}@h/x", f"ftp://{MASK}@h/x"),
        (f"https://h/x?X-Amz-Signature={SECRET}&b=,(c)", f"https://h/x?{MASK}"),
        (f"'https://h/x?{SECRET}' and 'y'", f"'https://h/x?{MASK}' and 'y'"),
        (f"https://h/x#access_token={SECRET}", f"https://h/x?{MASK}"),
        (f"路径s3://b/x?sig={SECRET}", f"路径s3://b/x?{MASK}"),
        (f"abfs://c@account/x?sig={SECRET}", f"abfs://c@account/x?{MASK}"),
        (f"GET /x?token={SECRET}&n=1", f"GET /x?token={MASK}&n=1"),
        (f"api_key: {SECRET}\nn: 1", f"api_key: {MASK}\nn: 1"),
        (f"{{'aws_secret_access_key': '{SECRET}', 'n': 1}}", f"{{'aws_secret_access_key': '{MASK}', 'n': 1}}"),
        ("hf_" + "a" * 34 + " is no token", f"{MASK} is no token"),
    ],
)
def test_secrets_are_masked(text: str, expected: str) -> None:
    assert mask_secrets(text) == expected
    assert mask_secrets(expected) == expected


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/zh/part-?.jsonl.gz", "hf://datasets/owner/name@main/x.parquet", "abfs://container@account/x",
        "a@b.c", "memory://x/?/lang=zh/*", "the token: '</s>'", "`text_key='body'`: expected a key",
        "api_key: null",
        "/data/a?b=c", "`max_new_tokens=3` and eos_token='</s>'",
    ],
)  # fmt: skip
def test_what_is_no_secret_stays(text: str) -> None:
    assert mask_secrets(text) == text


def test_a_long_word_takes_no_time() -> None:
    started = time.monotonic()
    assert mask_secrets("a" * 200_000) == "a" * 200_000  # 100 s where each letter is tried as a URL's first
    assert time.monotonic() - started < 5


def test_secrets_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SERVICE_TOKEN", SECRET)
    monkeypatch.setenv("SSH_KEY", "/mnt/key")
    assert mask_secrets(f"driver says: {SECRET}; /mnt/key") == f"driver says: {MASK}; /mnt/key"


def test_settings_are_masked_by_key_and_by_value() -> None:
    settings = {
        "path": [f"https://h/x?{SECRET}", Path("/a")],
        "logger": {"api_key": SECRET, "text_key": "body"},
        "n": 1,
    }
    expected = {"path": [f"https://h/x?{MASK}", Path("/a")], "logger": {"api_key": MASK, "text_key": "body"}, "n": 1}
    assert without_secrets(settings) == expected
    space = Namespace(data=Namespace(path=f"https://h/x?{SECRET}"), logger=[{"password": SECRET}])
    refuse_masks(space)
    mask_settings(space)
    assert (space.data.path, space.logger) == (f"https://h/x?{MASK}", [{"password": MASK}])
    with pytest.raises(UserError, match=r"^`path='https://h/x\?<masked>'` is masked: configurations that a run writes"):
        refuse_masks(space)


def test_a_masked_source_is_no_source() -> None:
    with pytest.raises(
        UserError, match=r"^`sources\[0\]\.path='https://h/x\?<masked>'` is masked.* Give the whole URL"
    ):
        parse_sources([Source("zh", f"https://h/x?{MASK}")], "sources", Source)


def test_errors_logs_and_tracebacks_are_masked(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    name = f"https://u:{SECRET}@h/\x1b[31m.yaml"
    assert cli.main(["fit", "--config", name]) == 2
    assert cli.main([name]) == 2
    handler = cli._StderrHandler()
    handler.emit(logging.LogRecord("a", logging.INFO, "f", 1, f"read https://h/x?{SECRET}\x07", (), None))
    try:
        raise KeyError(f"https://u:{SECRET}@h/x")
    except KeyError:
        kind, error, trace = sys.exc_info()
        assert kind is not None
        assert error is not None
        cli._show_traceback(kind, error, trace)
    shown = capsys.readouterr().err
    assert SECRET not in shown
    assert shown.count(MASK) >= 4
    assert not {"\x1b", "\x07"} & set(shown)


def test_what_a_terminal_would_obey_is_not_shown() -> None:
    assert visible("a\x1b]0;x\x07\r\n\tb\x9b2J\x7f\x00中") == "a�]0;x�\n\tb�2J��中"


def test_a_masked_configuration_is_yaml() -> None:
    text = yaml.safe_dump(without_secrets({"path": f"https://h/x?{SECRET}"}))
    assert yaml.safe_load(io.StringIO(text)) == {"path": f"https://h/x?{MASK}"}
