"""Render chat templates in a process of their own, which the system ends when one takes too long or too much memory.

A template is a stranger's program: its sandbox keeps it from files, but not from loops without end, a text of
gigabytes, or a nesting that overflows the stack. Within the process that trains, nothing could stop a single call of
these. Run as a program, this file is the other process; it imports nothing of this package, so it starts in a second.
"""

import atexit
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CPU_SECONDS = 5.0
_MEMORY_BYTES = 1 << 29  # beyond what the process has when it begins
_MOST_CHARACTERS = 1 << 26  # of a text
_MOST_SAID = 300  # characters of what the process said last


class RenderingFailed(Exception):  # noqa: N818  # reads as what happened
    """A template raised, or its process was ended; the message says why."""


class RenderingProcess:
    """A process that renders templates, started when it is first needed, and again after it was ended."""

    def __init__(self) -> None:
        """Start nothing yet."""
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def render(
        self, source: str, messages: Sequence[Mapping[str, str]], variables: Mapping[str, Any], *, prompt: bool
    ) -> str:
        """Render a template as transformers does.

        Args:
            source: Template in Jinja.
            messages: Roles and contents.
            variables: Further names that the template sees, such as special tokens.
            prompt: True to end with the template's generation prompt.

        Raises:
            RenderingFailed: The template raised, or took more than `CPU_SECONDS` or the memory that it has.
        """
        request = {
            "source": source,
            "messages": messages,
            "variables": variables,
            "prompt": prompt,
            "seconds": CPU_SECONDS,
        }
        with self._lock:
            process = self._running()
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write(json.dumps(request).encode() + b"\n")
                process.stdin.flush()
                line = process.stdout.readline()
            except BrokenPipeError:
                line = b""
            except BaseException:  # a signal: its answer would be taken for the next one's
                self.close()
                raise
            if not line:
                raise RenderingFailed(self._ended(process))
        answer: dict[str, str] = json.loads(line)
        if "error" in answer:
            raise RenderingFailed(answer["error"])
        return answer["text"]

    def close(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self.close()
            # In a session of its own, so that Ctrl-C at the terminal is not for it; it ends with this one's pipe.
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(Path(__file__).resolve())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                start_new_session=True,
            )
        return self._process

    def _ended(self, process: subprocess.Popen[bytes]) -> str:
        code = process.wait()
        assert process.stderr is not None
        said = process.stderr.read().decode(errors="replace").split("\n")
        self.close()
        if code == -signal.SIGPROF:
            return f"it took more than {CPU_SECONDS:g} seconds. Does it loop without end?"
        last = next((f": {line.strip()[:_MOST_SAID]}" for line in reversed(said) if line.strip()), "")
        return f"it ended the process that rendered it (exit code {code}{last}). Is it nested too deeply, or too large?"


_processes: dict[int, RenderingProcess] = {}


def rendering_process() -> RenderingProcess:
    """Get the one of this process; a forked one, such as a loader's worker, has its own."""
    return _processes.setdefault(os.getpid(), RenderingProcess())


@atexit.register
def _close() -> None:
    rendering_process().close()


def _limit_memory() -> None:
    statistics = Path("/proc/self/statm")
    if statistics.is_file():  # macOS neither says nor limits it
        limit = int(statistics.read_text().split()[0]) * resource.getpagesize() + _MEMORY_BYTES
        _, most = resource.getrlimit(resource.RLIMIT_AS)  # of `ulimit -v`, which cannot be raised
        limit = limit if most == resource.RLIM_INFINITY else min(limit, most)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _answer(request: Mapping[str, Any], render: Any) -> dict[str, str]:
    signal.setitimer(signal.ITIMER_PROF, request["seconds"])  # unhandled, it ends the process even within a single call
    try:
        (text,), _ = render(
            conversations=[request["messages"]],
            chat_template=request["source"],
            add_generation_prompt=request["prompt"],
            **request["variables"],
        )
        if len(text) > _MOST_CHARACTERS:
            return {"error": f"it writes {len(text):,} characters, more than {_MOST_CHARACTERS:,}"}
        return {"text": text}
    except Exception as error:
        return {"error": str(error)[:10_000] or type(error).__name__}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _serve() -> None:
    os.set_blocking(2, False)  # nobody reads it before the process ends, and a pipe has 64 kB

    from transformers.utils.chat_template_utils import render_jinja_template

    _limit_memory()
    for line in sys.stdin.buffer:
        sys.stdout.buffer.write(json.dumps(_answer(json.loads(line), render_jinja_template)).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    _serve()
