"""`mixcn chat`: whole conversations against stock transformers, commands, and what goes wrong."""

import io
import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from bitsandbytes.functional import has_avx512bf16
from peft import LoraConfig

import lightning_mixcn.cli.conversation
from lightning_mixcn.cli import main
from lightning_mixcn.masking import visible
from lightning_mixcn.model import (
    MoePeftModel,
    find_model,
    load_found,
    load_mixtral,
)
from lightning_mixcn.model.inference.generation import prepare_for_generation
from lightning_mixcn.testing import save_tiny_mixtral
from lightning_mixcn.text import Turn, load_template, load_tokenizer
from tests.model.trained_values import draw_trained

EXACT = ["--quantization=none", "--dtype=float32", "--device=cpu"]
GREEDY = [*EXACT, "--temperature=0", "--repetition_penalty=1.0", "--max_new_tokens=6"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_mixtral(tmp_path_factory.mktemp("chat") / "base", initializer_range=0.3)


def save_adapter(base: Path, folder: Path, *, train_embeddings: bool = False) -> Path:
    lora = LoraConfig(r=2, target_modules="all-linear")
    model = load_mixtral(base, quantization="none", dtype="float32", lora=lora, train_embeddings=train_embeddings)
    assert isinstance(model, MoePeftModel)
    draw_trained(model, 0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(base, tmp_path_factory.mktemp("chat") / "adapter")


def pipe(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


class Terminal(io.StringIO):
    """Standard input that is a terminal; what is typed comes through `input`."""

    def isatty(self) -> bool:
        return True


def type_in(monkeypatch: pytest.MonkeyPatch, *lines: str | type[BaseException]) -> None:
    typed: Iterator[str | type[BaseException]] = iter([*lines, EOFError])

    def typed_line(prompt: str = "") -> str:
        line = next(typed)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("builtins.input", typed_line)


def expected_answers(
    model: Any, base: Path, *questions: str, system: str | None = None, tokens: int = 6, template: str = "mixtral"
) -> list[str]:
    """Greedy answers of transformers' `generate`, which runs the whole conversation anew for each question."""
    tokenizer = load_tokenizer(base)
    turns, answers = [] if system is None else [Turn("system", system)], []
    for question in questions:
        turns.append(Turn("user", question))
        ids = load_template(template, tokenizer).encode_prompt(turns, tokenizer)
        row = torch.tensor([ids])
        generated = model.generate(
            row, attention_mask=torch.ones_like(row), max_new_tokens=tokens, do_sample=False, pad_token_id=0
        )
        answers.append(tokenizer.decode(generated[0, len(ids) :].tolist()).lstrip())
        turns.append(Turn("assistant", answers[-1].rstrip("\N{REPLACEMENT CHARACTER}")))
    assert all(answers)
    return answers


def stock(base: Path) -> Any:
    return transformers.MixtralForCausalLM.from_pretrained(base, dtype=torch.float32)


def printed(answers: list[str]) -> str:
    return "".join(f"{visible(answer).rstrip(chr(10))}\n" for answer in answers)


def test_a_piped_conversation(base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pipe(monkeypatch, "Hello", "", "你好吗？", "  /odd question")
    assert main(["chat", str(base), *GREEDY]) == 0
    output = capsys.readouterr()
    assert output.out == printed(expected_answers(stock(base), base, "Hello", "你好吗？", "/odd question"))
    assert output.err == ""


def test_every_piped_line_is_a_question(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["/etc is what?", "/help", "/quit", "/reset", "/system Be kind.", "/a/b", "x"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\ufeff" + "\r\n \n".join(asked)))  # no newline at the end
    assert main(["chat", str(base), *GREEDY, "--max_new_tokens=3"]) == 0
    output = capsys.readouterr()
    assert output.out == printed(expected_answers(stock(base), base, *asked, tokens=3))
    assert output.err == ""


@pytest.mark.parametrize("piped", ["", "\n", " \r\n\n", "\ufeff"])
def test_nothing_piped_is_nothing_answered(
    piped: str, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(piped))
    assert main(["chat", str(base), *GREEDY]) == 0
    assert capsys.readouterr() == ("", "")


def test_reset_and_system(base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    type_in(monkeypatch, "a", "/reset", "a", "/system Be kind.", "b", "/reset", "a", "/system", "b", "/quit", "never")
    assert main(["chat", str(base), "--system=Be short.", *GREEDY]) == 0
    output, model = capsys.readouterr(), stock(base)
    short = expected_answers(model, base, "a", system="Be short.")
    tokenizer = load_tokenizer(base)
    kind = expected_answers(model, base, "a", system="Be kind.")
    assert output.out.startswith(printed(short * 2))
    assert len(output.out) > len(printed(short * 2 + kind))
    for turns in (
        [Turn("system", "Be kind."), Turn("user", "a"), Turn("assistant", short[0]), Turn("user", "b")],
        [Turn("user", "a"), Turn("assistant", kind[0]), Turn("user", "b")],
    ):
        ids = load_template(None, tokenizer).encode_prompt(turns, tokenizer)
        generated = model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert f"{visible(tokenizer.decode(generated[0, len(ids) :].tolist()).lstrip())}\n" in output.out
    said = [line.removeprefix("> ") for line in output.err.splitlines()]
    assert [line for line in said[1:] if line and "tokens/s" not in line] == [
        "The conversation is forgotten.",
        "The system prompt is set.",
        "The conversation is forgotten.",
        "The system prompt is removed.",
    ]


def test_base_switches_the_adapter(
    base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    adapted = expected_answers(load_found(find_model(str(adapter)), quantization="none", dtype="float32"), base, "a")
    plain = expected_answers(stock(base), base, "a")
    assert adapted != plain
    type_in(monkeypatch, "a", "/reset", "/base", "a", "/reset", "/base", "a")
    assert main(["chat", str(adapter), *GREEDY]) == 0
    output = capsys.readouterr()
    assert output.out == printed([*adapted, *plain, *adapted])
    assert "The adapter is off: this is the base." in output.err
    assert "The adapter is on." in output.err


def test_what_has_no_base_to_switch_to(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    type_in(monkeypatch, "/base")
    assert main(["chat", str(base), *GREEDY]) == 0
    assert "There is no base to switch to: the model has no adapter." in capsys.readouterr().err
    whole = save_adapter(base, tmp_path / "adapter", train_embeddings=True)
    type_in(monkeypatch, "/base")
    assert main(["chat", str(whole), *GREEDY]) == 0
    assert "the adapter also trained model.embed_tokens and lm_head. Chat with" in capsys.readouterr().err


def test_a_seed_repeats_a_conversation(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = []
    for seed in (1, 1, 2):
        pipe(monkeypatch, "a", "b")
        assert main(["chat", str(base), *EXACT, "--temperature=2", f"--seed={seed}", "--max_new_tokens=8"]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != answers[2]


def test_four_bits_and_a_template_of_ones_own(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    template = tmp_path / "own.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}")
    pipe(monkeypatch, "a", "b")
    assert main(["chat", str(base), f"--template={template}", *GREEDY, "--quantization=nf4"]) == 0
    model = load_mixtral(base, dtype="float32")
    assert capsys.readouterr().out == printed(expected_answers(model, base, "a", "b", template=str(template)))


@pytest.mark.skipif(not has_avx512bf16(), reason="bitsandbytes has its kernel for CPUs with AVX-512 and bfloat16 alone")
def test_four_bits_on_a_cpu_go_through_the_kernel_of_few_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_tiny_mixtral(tmp_path, hidden_size=64, intermediate_size=128)
    held = []
    monkeypatch.setattr(
        lightning_mixcn.cli.conversation,
        "prepare_for_generation",
        lambda model: held.append(prepare_for_generation(model)),
    )
    pipe(monkeypatch, "Hello?")
    assert main(["chat", str(base), "--device=cpu", "--max_new_tokens=3"]) == 0
    assert held[0] > 0


def test_no_half_characters(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (ids,) = load_tokenizer(base).encode_batch([" 你好😀!"])
    pieces: list[str] = []
    monkeypatch.setattr(lightning_mixcn.cli.conversation, "stream_tokens", lambda *args, **kwargs: iter(ids))
    monkeypatch.setattr(lightning_mixcn.cli.conversation, "_write", pieces.append)
    pipe(monkeypatch, "a")
    assert main(["chat", str(base), *GREEDY]) == 0
    assert pieces == ["你", "好", "😀", "!", "\n"]


def test_newlines_at_an_answers_end_are_not_printed(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (ids,) = load_tokenizer(base).encode_batch(["\na\n\nb\n\n"])
    monkeypatch.setattr(lightning_mixcn.cli.conversation, "stream_tokens", lambda *args, **kwargs: iter(ids))
    pipe(monkeypatch, "x", "y")
    assert main(["chat", str(base), *GREEDY]) == 0
    assert capsys.readouterr().out == "a\n\nb\n" * 2  # nor are blanks before it


def test_a_model_does_not_command_the_terminal(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (ids,) = load_tokenizer(base).encode_batch(["\x1b]0;x\x07a\x1b[2J\tb"])
    monkeypatch.setattr(lightning_mixcn.cli.conversation, "stream_tokens", lambda *args, **kwargs: iter(ids))
    pipe(monkeypatch, "x")
    assert main(["chat", str(base), *GREEDY]) == 0
    assert capsys.readouterr().out == "�]0;x�a�[2J\tb\n"


def test_a_person_at_a_terminal(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    type_in(monkeypatch, "a", "/nonsense", "/help", KeyboardInterrupt, "a" * 600, "b")
    assert main(["chat", str(base), *GREEDY]) == 0
    output = capsys.readouterr()
    assert output.out == printed(expected_answers(stock(base), base, "a", "b"))  # the conversation went on
    for said in (
        "/help lists the commands",
        "(6 tokens, ",
        "/nonsense is no command. With a blank before it, it is sent as text. The commands are\n/reset  ",
        "/system TEXT   set the system prompt",
        "(Ctrl-D or /quit ends)",
        "tokens, but the model's context has room for 512 with the answer. Shorten it. /reset forgets",
    ):
        assert said in output.err
    assert "> " in output.err  # standard output is no terminal here


def test_control_c_stops_an_answer_only(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(*args: Any, **kwargs: Any) -> Iterator[int]:
        asked.append(args[1])
        yield from ids
        if len(asked) < 3:
            raise KeyboardInterrupt

    asked: list[list[int]] = []
    tokenizer = load_tokenizer(base)
    (ids,) = tokenizer.encode_batch(["yes"])
    monkeypatch.setattr(lightning_mixcn.cli.conversation, "stream_tokens", answer)
    type_in(monkeypatch, "a", "b", "c")
    assert main(["chat", str(base), *GREEDY]) == 0
    output = capsys.readouterr()
    assert output.out == "yes\nyes\nyes\n"
    assert output.err.count("stopped") == 2
    assert tokenizer.decode(asked[2]) == "[INST] a [/INST] yes[INST] b [/INST] yes[INST] c [/INST]"
    pipe(monkeypatch, "a")
    asked.clear()
    assert main(["chat", str(base), *GREEDY]) == 130
    assert "SIGINT ended the command" in capsys.readouterr().err


def test_an_answer_stopped_before_it_began_leaves_no_turn(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[int]] = []

    def nothing(*args: Any, **kwargs: Any) -> Iterator[int]:
        asked.append(args[1])
        if asked:
            raise KeyboardInterrupt
        yield 0

    monkeypatch.setattr(lightning_mixcn.cli.conversation, "stream_tokens", nothing)
    type_in(monkeypatch, "a", "a")
    assert main(["chat", str(base), *GREEDY]) == 0
    assert asked[0] == asked[1]


def test_what_is_pasted_together_is_one_question(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    type_in(monkeypatch, "/system Be kind.\n/reset\nThe first line,\n/and the second\n\n", "/help\n/quit", "never")
    assert main(["chat", str(base), *GREEDY]) == 0
    output = capsys.readouterr()
    question = "The first line,\n/and the second"
    assert output.out == printed(expected_answers(stock(base), base, question, system="Be kind."))
    assert [word for word in ("is set", "is forgotten", "/reset  ") if word not in output.err] == []


def test_a_terminal_gives_pasted_lines_at_once() -> None:
    master, slave = pty.openpty()
    command = [sys.executable, "-c", "import sys; from lightning_mixcn.cli.conversation import _typed_lines\n"
               "for block in _typed_lines(): print(repr(block), flush=True)"]  # fmt: skip
    with subprocess.Popen(command, stdin=slave, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        os.close(slave)
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stderr.read(1) == ">"
        os.write(master, b"one\ntwo\n")
        assert process.stdout.readline() == "'one\\ntwo'\n"
        os.write(master, b"three\n")
        assert process.stdout.readline() == "'three'\n"
        os.write(master, b"\x04")
        assert process.wait(60) == 0
    os.close(master)


def test_a_character_that_is_cut_is_not_kept(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[list[int]] = []
    tokenizer = load_tokenizer(base)
    (ids,) = tokenizer.encode_batch([" 你好"])

    def answer(*args: Any, **kwargs: Any) -> Iterator[int]:
        asked.append(args[1])
        return iter(ids[:-1])

    monkeypatch.setattr(lightning_mixcn.cli.conversation, "stream_tokens", answer)
    pipe(monkeypatch, "a", "b")
    assert main(["chat", str(base), *GREEDY]) == 0
    assert tokenizer.decode(asked[1]) == "[INST] a [/INST] 你[INST] b [/INST]"


def test_json_lines(base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pipe(monkeypatch, '"Hello"', "", '{"question": "你好\\n吗？", "id": 7}', '{"question": "Hello", "reset": true}')
    assert main(["chat", str(base), "--json", *GREEDY]) == 0
    output = capsys.readouterr()
    answers = expected_answers(stock(base), base, "Hello", "你好\n吗？")
    told = {"tokens": 6, "finish": "length"}
    assert list(map(json.loads, output.out.splitlines())) == [
        {"question": "Hello", "answer": answers[0], **told},
        {"question": "你好\n吗？", "id": 7, "answer": answers[1], **told},
        {"question": "Hello", "reset": True, "answer": answers[0], **told},
    ]
    assert output.err == ""


def test_json_lines_say_that_an_answer_ended_and_hold_every_character(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "\x1b[2J\x9b1m\n\nb"
    (ids,) = load_tokenizer(base).encode_batch([said])
    monkeypatch.setattr(lightning_mixcn.cli.conversation, "stream_tokens", lambda *args, **kwargs: iter(ids))
    pipe(monkeypatch, '"x"')
    assert main(["chat", str(base), "--json", *EXACT]) == 0
    output = capsys.readouterr().out
    assert json.loads(output) == {"question": "x", "answer": said, "tokens": len(ids), "finish": "stop"}
    assert output == f"{visible(output)}"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("Hello", "is no JSON (Expecting value"),
        ("[1]", 'expected a question as a JSON string, or as an object such as {"question": "…"}, got [1]'),
        ('{"text": "x"}', "expected a question as a JSON string"),
        ('{"question": " "}', "expected a question as a JSON string"),
        ('{"question": "x", "reset": 1}', "`reset`: expected true or false, got 1"),
        ("[" * 100_000, "is no JSON"),
    ],
)
def test_what_is_no_question_in_json(
    line: str, message: str, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe(monkeypatch, '"x"', line)
    assert main(["chat", str(base), "--json", *GREEDY]) == 2
    output = capsys.readouterr()
    assert output.out.count("\n") == 1  # the first one was answered
    assert "mixcn: error: line 2 of standard input" in output.err
    assert message in output.err
    assert output.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "'nowhere' is not there"),
        (["BASE", "--temperature=-1"], "`temperature=-1.0`: expected at least 0 (0 for the likeliest token"),
        (["BASE", "--top_p=0"], "`top_p=0.0`: expected more than 0"),
        (["BASE", "--template=chatml"], "`template='chatml'` is not there. Expected mixtral, tokenizer, or a Jinja"),
        (["BASE", "--template=tokenizer"], "has no chat template. Use `template=mixtral`"),
        (["BASE", "--quantization=int3"], "`quantization='int3'` is not known"),
        (["BASE", "--warmth=1"], "--warmth"),
        (["BASE", "--device=abacus"], "`device='abacus'` is not known. Expected cpu"),
        ([], "the following arguments are required: src; see mixcn chat --help"),
        (
            ["BASE", *GREEDY],
            "line 1 of standard input: the prompt has 616 tokens, but the model's context has room for 512",
        ),
    ],
)
def test_bad_input(
    arguments: list[str],
    message: str,
    base: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pipe(monkeypatch, "a" * 600)
    assert main(["chat", *(str(base) if part == "BASE" else part for part in arguments)]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("mixcn: error: ")
    assert message in output.err
    assert output.err.count("\n") == 1


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_what_is_piped_must_be_utf_8(
    errors: str, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("你好\n".encode("gb18030")), "utf-8", errors))
    assert main(["chat", str(base), *GREEDY]) == 2
    assert "standard input is not UTF-8" in capsys.readouterr().err
