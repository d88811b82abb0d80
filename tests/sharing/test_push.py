"""``mixcn push``: what is refused before anything is sent, and what a hub on this machine gets."""

import base64
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from lightning_mixcn.cli import main

# The run's own figures have the names of its sources, which no font of this machine may have.
pytestmark = pytest.mark.filterwarnings("ignore:No font of this machine has")


class Hub(ThreadingHTTPServer):
    """As much of the hub as one commit needs.

    Attributes:
        calls: Methods and paths that were asked for.
        repositories: Visibility by name.
        files: Content of the commits by path.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.calls: list[str] = []
        self.repositories: dict[str, bool] = {}
        self.files: dict[str, bytes] = {}
        self.refuses = False


class _Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.calls.append(f"POST {self.path}")
        if self.server.refuses or self.headers.get("Authorization") != "Bearer hf_of_the_test":
            self._send(403, {"error": "You don't have the rights"})
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if name in self.server.repositories:
                url = f"{constants.ENDPOINT}/{name}"
                self._send(409, {"error": "You already created this model repo", "url": url})
            else:
                self.server.repositories[name] = bool(asked.get("private")) or asked.get("visibility") == "private"
                self._send(200, {"url": f"{constants.ENDPOINT}/{name}"})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
            self._send(200, {"files": modes})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"{constants.ENDPOINT}/{next(iter(self.server.repositories))}/commit/{'1' * 40}"
            self._send(200, {"commitUrl": url, "commitOid": "1" * 40, "success": True})
        else:
            self._send(200, {})

    def do_GET(self) -> None:
        self.server.calls.append(f"GET {self.path}")
        name = re.sub(r"^/api/models/|/revision/.*$", "", self.path)
        if name in self.server.repositories:
            self._send(200, {"id": name, "private": self.server.repositories[name], "sha": "0" * 40, "siblings": []})
        else:
            self._send(404, {"error": "Repository not found"})

    def _send(self, code: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Keep silent."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_test")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def copy(whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of the run that may be changed, in the working folder."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(whole_run, "run", symlinks=True))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_of_a_run_its_adapter_is_sent(hub: Hub, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = contents(copy / "adapter")
    (copy / "adapter" / ".notes").write_text("mine", encoding="utf-8")
    assert main(["push", "run", "me/zh", "--private"]) == 0
    assert hub.files == expected
    assert hub.repositories == {"me/zh": True}
    assert hub.files["README.md"].startswith(b"---\n")
    *files, last = capsys.readouterr().out.splitlines()
    assert sorted(line.split()[-1] for line in files) == sorted(expected)
    assert re.fullmatch(rf"{len(expected)} files, [\d.]+ \w?B: {constants.ENDPOINT}/me/zh", last)
    assert main(["push", "run", "me/zh", "--private"]) == 0  # a further commit
    assert len([call for call in hub.calls if "/commit/" in call]) == 2


def test_an_export_is_sent_whole(hub: Hub, copy: Path) -> None:
    assert main(["export", "run", "merged"]) == 0
    assert main(["push", "merged", "me/zh"]) == 0
    assert hub.files == contents(Path("merged"))
    assert hub.repositories == {"me/zh": False}


def test_what_would_be_sent_is_listed_without_a_token(
    hub: Hub, copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lightning_mixcn.sharing.upload.get_token", lambda: None)
    assert main(["push", "run", "me/zh", "--dry_run"]) == 0
    *files, last = capsys.readouterr().out.splitlines()
    assert len(files) == len(contents(copy / "adapter"))
    assert last.endswith("Nothing was sent")
    assert not hub.calls
    settings = json.loads((copy / "adapter/adapter_config.json").read_text(encoding="utf-8"))
    settings["base_model_name_or_path"] = str(copy.resolve())
    (copy / "adapter/adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    assert main(["push", "run", "me/zh", "--dry_run"]) == 0
    assert f"names the base by a folder of this machine, {str(copy.resolve())!r}" in capsys.readouterr().err


def pickled(name: str) -> Callable[[Path], object]:
    return lambda root: torch.save({"a": torch.zeros(1)}, root / "adapter" / name)


def removed(name: str) -> Callable[[Path], object]:
    return lambda root: (root / "adapter" / name).unlink()


def truncated(root: Path) -> None:
    file = root / "adapter/adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])


def without_adapter(root: Path) -> None:
    shutil.rmtree(root / "adapter")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (removed("README.md"), "has no model card, README.md"),
        (removed("adapter_model.safetensors"), "holds no adapter_model.safetensors"),
        (truncated, "adapter_model.safetensors"),
        (pickled("optimizer.pt"), "optimizer.pt' may be a pickle"),
        (pickled("notes.json"), "notes.json' may be a pickle"),  # by its first bytes
        (without_adapter, "`src='run'` is neither a run with adapter/ nor an export"),
        (shutil.rmtree, "`src='run'` is not there"),
    ],
)
def test_what_is_not_whole_is_refused(
    change: Callable[[Path], object], message: str, hub: Hub, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(copy)
    assert refusal(["push", "run", "me/zh"], capsys).count(message) == 1
    assert not hub.calls


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mixcn: error:")]
    return line


@pytest.mark.parametrize("name", ["zh", "me/zh/1", "me/", "me/z h", "me/zh.git", "https://hub/me/zh"])
def test_a_name_has_an_owner(name: str, hub: Hub, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"`name={name!r}`" in (line := refusal(["push", "run", name], capsys))
    assert "Give owner/name, such as me/mixtral-zh" in line
    assert not hub.calls


def test_nothing_private_goes_to_a_public_repository(hub: Hub, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.repositories["me/zh"] = False
    assert "'me/zh' is there already, and public" in refusal(["push", "run", "me/zh", "--private"], capsys)
    assert not hub.files


def test_what_the_hub_refuses_is_one_line(hub: Hub, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.refuses = True
    assert "the hub refuses 'me/zh': " in (line := refusal(["push", "run", "me/zh"], capsys))
    assert "hf_of_the_test" not in line


def test_without_a_token_or_a_network(
    hub: Hub, copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nothing listens
    assert "http://127.0.0.1:9 cannot be reached" in refusal(["push", "run", "me/zh"], capsys)
    monkeypatch.setattr("lightning_mixcn.sharing.upload.get_token", lambda: None)
    assert "Log in with `hf auth login`" in refusal(["push", "run", "me/zh"], capsys)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "`HF_HUB_OFFLINE` is set" in refusal(["push", "run", "me/zh"], capsys)
