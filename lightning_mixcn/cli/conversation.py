"""A conversation with a model, in the terminal or with a file of questions.

Answers go to standard output, everything else to standard error.
"""

import json
import select
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import closing, nullcontext, suppress
from typing import Any

import torch
from torch import nn

from lightning_mixcn.errors import UserError
from lightning_mixcn.masking import mask_secrets, visible
from lightning_mixcn.model import MoePeftModel
from lightning_mixcn.model.causal_lm import base_of
from lightning_mixcn.model.find import find_model
from lightning_mixcn.model.inference.generation import PrefixCache, prepare_for_generation, stream_tokens
from lightning_mixcn.model.inference.sampling import Sampling
from lightning_mixcn.model.options import ModelOptions
from lightning_mixcn.text import (
    ChatTemplate,
    TextTokenizer,
    Turn,
    load_tokenizer,
    template_of_model,
)
from lightning_mixcn.tokenizer.files import generation_end_ids
from lightning_mixcn.tokenizer.tokenizer import BROKEN, stream_text

_PROMPT = "> "
_HELP = """\
/reset         forget the conversation, keep the system prompt
/system TEXT   set the system prompt; without TEXT, remove it
/base          switch the adapter off, and on again
/help          these lines
/quit          leave, as Ctrl-D does; Ctrl-C stops an answer
A line that begins with a blank is never a command, nor is one with a second slash, such as a path.
Lines that are pasted together are one question, after those of them that are commands."""
_PASTED_SECONDS = 0.05  # that a terminal needs for the next line of what is pasted


def talk_with(
    src: str,
    system: str | None,
    template: str | None,
    sampling: Sampling,
    seed: int,
    options: ModelOptions,
    *,
    as_json: bool,
) -> None:
    """Load a model and answer what standard input says; arguments as in the command ``chat``."""
    found = find_model(src)
    tokenizer = load_tokenizer(found.tokenizer)
    laid_out = template_of_model(template, tokenizer)
    stop_ids = laid_out.stop_ids(tokenizer) | generation_end_ids(found.tokenizer, found.base.path)
    model = options.load(found)
    prepare_for_generation(model)
    generator = torch.Generator(options.torch_device()).manual_seed(seed)
    talk = Chat(model, tokenizer, laid_out, sampling, generator, stop_ids=stop_ids)
    talk.set_system(system or "")
    fixed = [name for adapter in found.adapters for name in adapter.saved]
    if fixed:
        talk.why_no_base = f"the adapter also trained {' and '.join(fixed)}. Chat with {found.base.name} itself"
    if as_json:
        answer_records(talk, _piped_lines())
        return
    interactive = sys.stdin.isatty()
    if interactive:
        _say(f"{src}. /help lists the commands, Ctrl-D ends.")
    converse(talk, _typed_lines() if interactive else _piped_lines(), interactive=interactive)


class Chat:
    """A conversation with a model.

    Args:
        model: In evaluation mode.
        tokenizer: The model's.
        template: Template of conversations.
        sampling: Choice of tokens.
        generator: Source of the random numbers, on the model's device.
        stop_ids: Tokens that end an answer; ``None`` takes the template's.

    Attributes:
        turns: Turns so far, the system prompt included.
        answer_tokens: Length of the last answer.
        room: Tokens that the last answer could have had.
        why_no_base: Why the adapter cannot be switched off; empty if it can.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: TextTokenizer,
        template: ChatTemplate,
        sampling: Sampling,
        generator: torch.Generator,
        stop_ids: frozenset[int] | None = None,
    ) -> None:
        self._stop_ids = template.stop_ids(tokenizer) if stop_ids is None else stop_ids
        self.turns: list[Turn] = []
        self.answer_tokens = self.room = 0
        self.why_no_base = "" if isinstance(model, MoePeftModel) else "the model has no adapter"
        self._model, self._tokenizer, self._template = model, tokenizer, template
        self._sampling, self._generator = sampling, generator
        self._cache, self._adapter_off = PrefixCache(), False

    def ask(self, question: str) -> Generator[str]:
        """Answer a question.

        Args:
            question: The user's next turn.

        Returns:
            The answer, piece by piece as it comes. When it is finished or closed, the conversation has both turns,
            however much of the answer there is; without any, it stays as it was.

        Raises:
            ValueError: the conversation with this question is longer than the model's context, or the template refuses
                it; the conversation stays as it was.
        """
        turns = [*self.turns, Turn("user", question)]
        ids = self._template.encode_prompt(turns, self._tokenizer)
        context = int(base_of(self._model).config.max_position_embeddings)
        self.room = min(self._sampling.max_new_tokens, context - len(ids))
        tokens = stream_tokens(
            self._model, ids, self._cache, self._sampling, stop_ids=self._stop_ids, generator=self._generator
        )
        return self._answer(turns, tokens)

    def _answer(self, turns: list[Turn], tokens: Iterator[int]) -> Generator[str]:
        answer, self.answer_tokens = "", 0
        model: Any = self._model
        try:
            with model.disable_adapter() if self._adapter_off else nullcontext():
                for piece in stream_text(self._counted(tokens), self._tokenizer.decode):
                    answer += piece
                    yield piece
        finally:  # Ctrl-C too
            answer = answer.rstrip(BROKEN)  # a character that was cut would be asked about as three others
            if answer:
                self.turns = [*turns, Turn("assistant", answer)]

    def _counted(self, tokens: Iterator[int]) -> Iterator[int]:
        for token in tokens:
            self.answer_tokens += 1
            yield token

    def reset(self) -> None:
        """Forget what was said, but the system prompt."""
        self.turns = [turn for turn in self.turns if turn.role == "system"]

    def set_system(self, text: str) -> None:
        """Change the system prompt of the conversation; empty removes it."""
        spoken = [turn for turn in self.turns if turn.role != "system"]
        self.turns = [Turn("system", text), *spoken] if text else spoken

    def switch_adapter(self) -> bool:
        """Switch the adapter off or on; whether it is on now."""
        assert not self.why_no_base, self.why_no_base
        self._adapter_off = not self._adapter_off
        self._cache.clear()  # it is of the other weights
        return not self._adapter_off


def converse(talk: Chat, blocks: Iterator[str], *, interactive: bool) -> None:
    """Answer questions, and obey a person's commands, until there are no more.

    Args:
        talk: The conversation.
        blocks: What the user says at a time, a line or several; empty ones are skipped.
        interactive: True if a person is there: lines that begin with a slash are commands, until one does not; what
            cannot be asked is said, not raised, Ctrl-C stops an answer only, and the speed of each answer is shown.

    Raises:
        ValueError: not interactive, and a question cannot be asked; the line is named.
    """
    for number, block in enumerate(blocks, 1):
        lines = block.split("\n")
        while interactive and lines and _is_command(lines[0]):
            word, _, rest = lines.pop(0).partition(" ")
            if word == "/quit":
                return
            _obey(talk, word, rest.strip())
        if question := "\n".join(lines).strip():
            try:
                answer = talk.ask(question)
            except ValueError as error:
                if not interactive:
                    raise UserError(f"line {number} of standard input: {error}") from error
                _say(f"{error}. /reset forgets the conversation.")
                continue
            start = time.perf_counter()
            finished = _show(answer, interactive)
            if interactive:
                speed = talk.answer_tokens / (time.perf_counter() - start)
                _say(f"({talk.answer_tokens} tokens, {speed:.1f} tokens/s{'' if finished else ', stopped'})")


def _is_command(line: str) -> bool:
    word = line.partition(" ")[0]
    return word.startswith("/") and word.count("/") == 1


def answer_records(talk: Chat, lines: Iterator[str]) -> None:
    """Answer questions in JSON Lines, each with a line of JSON, as soon as it is there.

    Args:
        talk: The conversation, which goes on from line to line.
        lines: Lines as in the command's ``json``; empty lines are skipped.

    Raises:
        ValueError: a line is no question, or cannot be asked; the line is named.
    """
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"line {number} of standard input"
            record = _question(line, where)
            if record.get("reset"):
                talk.reset()
            try:
                answer = "".join(talk.ask(record["question"]))
            except ValueError as error:
                raise UserError(f"{where}: {error}") from error
            finish = "stop" if talk.answer_tokens < talk.room else "length"
            answered = record | {"answer": answer, "tokens": talk.answer_tokens, "finish": finish}
            # Characters that a terminal obeys are written as JSON's escapes, so none is lost.
            text = json.dumps(answered, ensure_ascii=False)
            print("".join(char if char == visible(char) else f"\\u{ord(char):04x}" for char in text), flush=True)


def _question(line: str, where: str) -> dict[str, Any]:
    """Read a line of JSON as an object with a question."""
    expected = 'expected a question as a JSON string, or as an object such as {"question": "…"}'
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is no JSON ({error}): {expected}") from error
    record = {"question": content} if isinstance(content, str) else content
    if not isinstance(record, dict) or not isinstance(record.get("question"), str) or not record["question"].strip():
        raise UserError(f"{where}: {expected}, got {line.strip()[:80]}")
    if not isinstance(record.get("reset", False), bool):
        raise UserError(f"{where}: `reset`: expected true or false, got {record['reset']!r}")
    return record


def _show(answer: Generator[str], interactive: bool) -> bool:
    """Print an answer while it comes; whether it came to its end."""
    finished, held = True, ""
    try:
        with closing(answer):
            for piece in answer:
                # Newlines at the end are not printed: they would look like an empty answer to the next line of a pipe.
                text = held + piece
                shown = text.rstrip("\n")
                held = text[len(shown) :]
                if shown:
                    _write(shown)
    except KeyboardInterrupt:
        if not interactive:
            raise
        finished = False
    _write("\n")
    return finished


def _obey(talk: Chat, command: str, text: str) -> None:
    """Do what a command says."""
    if command == "/reset":
        talk.reset()
        _say("The conversation is forgotten.")
    elif command == "/system":
        talk.set_system(text)
        _say("The system prompt is set." if text else "The system prompt is removed.")
    elif command == "/base":
        if talk.why_no_base:
            _say(f"There is no base to switch to: {talk.why_no_base}.")
        else:
            _say(f"The adapter is {'on' if talk.switch_adapter() else 'off: this is the base'}.")
    elif command == "/help":
        _say(_HELP)
    else:
        _say(f"{command} is no command. With a blank before it, it is sent as text. The commands are\n{_HELP}")


def _typed_lines() -> Iterator[str]:
    """Yield what a person types or pastes at a terminal: a line, or those that come with it."""
    with suppress(ImportError):
        import readline  # noqa: F401  # gives `input` a history and keys to edit with
    while True:
        try:
            if sys.stdout.isatty():
                lines = [input(_PROMPT)]
            else:  # `input` would write its prompt among the answers
                _say(_PROMPT, end="")
                lines = [input()]
            while _more_is_pasted():
                lines.append(input())
            yield "\n".join(lines)
        except EOFError:
            _say("")
            return
        except KeyboardInterrupt:
            _say("\n(Ctrl-D or /quit ends)")


def _more_is_pasted() -> bool:
    """Tell whether the terminal has another line already; nobody types one so fast."""
    try:
        return bool(select.select([sys.stdin], [], [], _PASTED_SECONDS)[0])
    except (OSError, ValueError):  # Windows has it for sockets only, and some editors' terminals have no file
        return False


def _piped_lines() -> Iterator[str]:
    """Yield lines of standard input."""
    try:
        for number, line in enumerate(sys.stdin):
            line.encode()  # where the locale is not UTF-8, Python lets broken bytes through
            yield (line if number else line.removeprefix("\ufeff")).rstrip("\r\n")
    except UnicodeError as error:
        raise UserError(f"standard input is not UTF-8 ({error}). Convert it first") from error


def _write(text: str) -> None:
    print(visible(text), end="", flush=True)


def _say(text: str, end: str = "\n") -> None:
    print(mask_secrets(visible(text)), end=end, file=sys.stderr, flush=True)
