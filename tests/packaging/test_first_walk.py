"""A newcomer's first walk with the installed wheel: each command is the one that the step before it printed."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.packaging.wheel import install_wheel

DOCUMENTS = 1000


class Newcomer:
    """Types only what was printed; sees standard output and error as one."""

    def __init__(self, mixcn: Path, folder: Path) -> None:
        self.folder, self.mixcn = folder, str(mixcn)
        self.environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self.seen = ""

    def start(self, command: str) -> subprocess.Popen[str]:
        program, *arguments = shlex.split(command)
        assert program == "mixcn"
        return subprocess.Popen(
            [self.mixcn, *arguments], cwd=self.folder, env=self.environment, text=True, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def type(self, command: str, said: str = "") -> str:
        with self.start(command) as process:
            self.seen, _ = process.communicate(said)
        assert process.returncode == 0, self.seen
        return self.seen

    def interrupt(self, command: str, when: str) -> None:
        """Press Ctrl-C as soon as the words are there."""
        self.seen = ""
        with self.start(command) as process:
            assert process.stdout is not None
            while when not in self.seen:
                character = process.stdout.read(1)
                assert character, self.seen
                self.seen += character
            process.send_signal(signal.SIGINT)
            self.seen += process.stdout.read()
        assert process.returncode == 130, self.seen

    def printed(self, pattern: str) -> str:
        """Return the command that was printed after some words."""
        found = re.search(pattern + r"\s*(mixcn .+)", self.seen)
        assert found is not None, self.seen
        return found[1].strip()


@pytest.mark.slow
def test_from_an_empty_folder_to_an_export(tiny_base: Path, tmp_path: Path) -> None:
    person = Newcomer(install_wheel(tmp_path / "made"), tmp_path / "empty")
    person.folder.mkdir()
    shutil.copytree(tiny_base, person.folder / "base")
    with (person.folder / "zh.jsonl").open("w", encoding="utf-8") as file:
        for number in range(DOCUMENTS):
            file.write(json.dumps({"text": f"今天是第{number}天,天气很好。"}, ensure_ascii=False) + "\n")
    person.type("mixcn init --base base --text zh=zh.jsonl --gpu cpu --out first.yaml")
    person.interrupt(person.printed(r"Start the run:"), "step=2/")
    person.type(person.printed(r"Go on with:"))
    said = {name: person.printed(name) for name in ("talk", "merge", "report")}
    assert person.type(said["talk"], "你好\n")
    person.type(said["report"])
    person.type(said["merge"])
    assert (person.folder / "OUT" / "config.json").is_file()
