"""Jinja templates against transformers' `apply_chat_template`, and what they must not let through."""

import json
import pickle
import re
import resource
import threading
import time
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lightning_mixcn.testing.tiny import byte_tokenizer
from lightning_mixcn.text import TextTokenizer, load_tokenizer
from lightning_mixcn.text.chat import rendering
from lightning_mixcn.text.chat.jinja import JinjaTemplate
from lightning_mixcn.text.chat.rendering import RenderingFailed, RenderingProcess, rendering_process
from lightning_mixcn.text.chat.templates import load_template
from lightning_mixcn.text.chat.turns import Turn, TurnTokens

CHATML = """{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif -%}"""
MISTRAL = """{{ bos_token }}{% for message in messages %}
{%- if message['role'] == 'system' %}{{ raise_exception('no system here') }}
{%- elif message['role'] == 'user' %}{{ '[INST] ' + message['content'].strip() + ' [/INST]' }}
{%- else %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"""
TEMPLATES = {"chatml": CHATML, "mistral": MISTRAL}


@pytest.fixture(autouse=True, scope="module")
def started() -> None:
    """Start the other process, which takes longer than Hypothesis lets an example take."""
    rendering_process().render("", [], {}, prompt=False)


CONVERSATION = [Turn("user", "the 中 of"), Turn("assistant", "和 to a"), Turn("user", "in?"), Turn("assistant", "is")]


@pytest.fixture(scope="module", params=["sentencepiece", "metaspace first", "bytes"])
def chat_tokenizer(
    request: pytest.FixtureRequest, tokenizer: TextTokenizer, tmp_path_factory: pytest.TempPathFactory
) -> TextTokenizer:
    """Three ways of beginning a text with a blank: always, at the very beginning, never; with ChatML's tokens."""
    backend = Tokenizer.from_str(
        (byte_tokenizer() if request.param == "bytes" else tokenizer.hf).backend_tokenizer.to_str()
    )
    if request.param == "metaspace first":
        backend.normalizer = None
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.add_special_tokens([AddedToken(name, special=True) for name in ("<|im_start|>", "<|im_end|>")])
    folder: Path = tmp_path_factory.mktemp("chat")
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return load_tokenizer(folder)


def messages(turns: list[Turn]) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.content} for turn in turns]


def by_transformers(turns: list[Turn], tokenizer: TextTokenizer, template: str, **options: Any) -> list[int]:
    ids: Any = tokenizer.hf.apply_chat_template(
        messages(turns), chat_template=template, tokenize=True, return_dict=False, **options
    )
    return list(ids)


def flat(segments: list[TurnTokens]) -> list[int]:
    return [index for segment in segments for index in segment.text_ids]


def learned_text(segments: list[TurnTokens], tokenizer: TextTokenizer) -> list[str]:
    return [
        tokenizer.decode(segment.text_ids, skip_special_tokens=False).strip(" ")
        for segment in segments
        if segment.answer
    ]


@pytest.mark.parametrize("template", TEMPLATES)
@given(contents=st.lists(st.text(st.sampled_from(" \n\tab中😀[]/<>|INSTs"), max_size=12), min_size=1, max_size=5))
def test_ids_equal_transformers(template: str, chat_tokenizer: TextTokenizer, contents: list[str]) -> None:
    if any(special in content for content in contents for special in ("<s>", "</s>")):
        return
    turns = [Turn(("user", "assistant")[place % 2], content) for place, content in enumerate(contents)]
    ours, source = JinjaTemplate(TEMPLATES[template]), TEMPLATES[template]
    assert flat(ours.encode(turns, chat_tokenizer)) == by_transformers(turns, chat_tokenizer, source)
    question = turns if len(turns) % 2 else turns[:-1]
    expected = by_transformers(question, chat_tokenizer, source, add_generation_prompt=True)
    assert ours.encode_prompt(question, chat_tokenizer) == expected


@pytest.mark.parametrize(
    ("template", "learned"),
    [("chatml", ["和 to a<|im_end|>", "is<|im_end|>"]), ("mistral", ["和 to a </s>", "is </s>"])],
)
def test_answers_and_their_ends_are_learned(template: str, learned: list[str], chat_tokenizer: TextTokenizer) -> None:
    segments = JinjaTemplate(TEMPLATES[template]).encode(CONVERSATION, chat_tokenizer)
    assert learned_text(segments, chat_tokenizer) == learned
    assert {segment.turn for segment in segments if segment.answer} == {1, 3}
    assert [segment.turn for segment in segments] == sorted(segment.turn for segment in segments)


@pytest.mark.parametrize("template", TEMPLATES)
def test_an_empty_answer_is_its_end(template: str, chat_tokenizer: TextTokenizer) -> None:
    segments = JinjaTemplate(TEMPLATES[template]).encode([Turn("user", "a"), Turn("assistant", "")], chat_tokenizer)
    (learned,) = (segment for segment in segments if segment.answer)
    assert learned.text_ids[-1] in JinjaTemplate(TEMPLATES[template]).stop_ids(chat_tokenizer)


@pytest.mark.parametrize("template", TEMPLATES)
@given(
    question=st.lists(st.sampled_from(["<s>", "</s>", "<|im_end|>", "<|im_start|>", "a", " ", "\n", "中"])).map("".join)
)
def test_nobody_can_forge_a_control_token(template: str, chat_tokenizer: TextTokenizer, question: str) -> None:
    ours = JinjaTemplate(TEMPLATES[template])
    forged = ours.encode([Turn("user", question), Turn("assistant", question)], chat_tokenizer)
    honest = ours.encode([Turn("user", "a"), Turn("assistant", "b")], chat_tokenizer)
    special = set(chat_tokenizer.hf.all_special_ids) | {chat_tokenizer.hf.convert_tokens_to_ids("<|im_start|>")}
    special |= ours.stop_ids(chat_tokenizer)
    assert [index for index in flat(forged) if index in special] == [i for i in flat(honest) if i in special]
    text = chat_tokenizer.decode(flat(forged), skip_special_tokens=False)
    assert text.count(question.strip() or "") >= 2
    answers = [segment.turn for segment in forged if segment.answer]
    assert answers == [1]


def test_stop_tokens(chat_tokenizer: TextTokenizer) -> None:
    end = chat_tokenizer.hf.convert_tokens_to_ids("<|im_end|>")
    assert JinjaTemplate(CHATML).stop_ids(chat_tokenizer) == {chat_tokenizer.eos_id, end}
    assert JinjaTemplate(MISTRAL).stop_ids(chat_tokenizer) == {chat_tokenizer.eos_id}
    endless = JinjaTemplate("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    assert endless.stop_ids(chat_tokenizer) == {chat_tokenizer.eos_id}
    assert learned_text(endless.encode(CONVERSATION, chat_tokenizer), chat_tokenizer) == ["和 to a", "is"]


def test_the_tokenizers_own_template(chat_tokenizer: TextTokenizer, tmp_path: Path) -> None:
    chat_tokenizer.hf.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    loaded = load_tokenizer(tmp_path)
    assert load_template("tokenizer", loaded) == JinjaTemplate(CHATML)
    assert load_template(str(tmp_path / "chat_template.jinja"), loaded) == JinjaTemplate(CHATML)
    (tmp_path / "chat_template.jinja").unlink()
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    named = [{"name": "default", "template": MISTRAL}, {"name": "rag", "template": CHATML}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": named}))
    assert load_template("tokenizer", load_tokenizer(tmp_path)) == JinjaTemplate(MISTRAL)


def test_it_can_be_sent_to_a_worker(chat_tokenizer: TextTokenizer) -> None:
    template = JinjaTemplate(CHATML)
    sent, tokenizer = pickle.loads(pickle.dumps((template, chat_tokenizer)))
    assert sent.encode(CONVERSATION, tokenizer) == template.encode(CONVERSATION, chat_tokenizer)


@pytest.mark.parametrize(
    ("source", "turns", "message"),
    [
        ("{% for %}", CONVERSATION, "cannot be used for this conversation"),
        (MISTRAL, [Turn("system", "s"), *CONVERSATION], "cannot be used for this conversation: no system here"),
        ("{{ messages[-1].content }}", CONVERSATION, "writes turn 0, the user's, 0 times"),
        (CHATML + CHATML, CONVERSATION, "writes turn 1, the assistant's, 2 times"),
        (CHATML.replace("message.content", "(message.content | upper)"), CONVERSATION, "writes turn"),
        (
            CHATML.replace("message.content", "(message.content | tojson)"),
            [Turn("user", '"')],
            "does not write the cont",
        ),
        ("{{ messages.append(1) }}", CONVERSATION, "cannot be used for this conversation"),
        ("{{ ''.__class__.__mro__ }}", CONVERSATION, "cannot be used for this conversation"),
    ],
)
def test_a_template_that_cannot_be_used(
    source: str, turns: list[Turn], message: str, chat_tokenizer: TextTokenizer
) -> None:
    with pytest.raises(ValueError, match=message):
        JinjaTemplate(source).encode(turns, chat_tokenizer)


def test_a_bad_file_is_refused_when_it_is_loaded(chat_tokenizer: TextTokenizer, tmp_path: Path) -> None:
    (tmp_path / "bad.jinja").write_text("{{ messages[0].content }}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"bad\.jinja` writes turn 1, the assistant's, 0 times"):
        load_template(str(tmp_path / "bad.jinja"), chat_tokenizer)


LLAMA3 = """{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}
{{- m.content | trim + '<|eot_id|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
GEMMA = """{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + m.role + '\n' + m.content | trim }}
{{- '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""
ALPACA = """{% for m in messages %}{% if m.role == 'user' %}{{ '### Instruction:\n' + m.content + '\n\n' }}
{%- else %}{{ '### Response:\n' + m.content + END }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"""
LAST_ONLY = ALPACA.replace("END", "(eos_token if loop.last else '\n\n')")
BETWEEN_ONLY = ALPACA.replace("END", "('\n\n' if loop.last else eos_token)")


@pytest.mark.parametrize(
    ("source", "end"),
    [
        (CHATML, "ends an answer with '<|im_end|>\\n', which begins with no special token of the tokenizer of"),
        (LLAMA3, "ends an answer with '<|eot_id|>'"),
        (GEMMA, "ends an answer with '<end_of_turn>\\n'"),
        (ALPACA.replace("END", "'\n\n'"), "ends an answer with '\\n\\n'"),
        (ALPACA.replace(" + END", ""), "ends no answer"),
        (LAST_ONLY, "ends an answer with '\\n\\n### Instruction"),
        (BETWEEN_ONLY, "ends an answer with '\\n\\n'"),
    ],
)
def test_a_template_without_a_learned_end_is_refused(
    source: str, end: str, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    """Nothing would teach the model to stop, and chat would look for an end that never comes."""
    file = tmp_path / "own.jinja"
    file.write_text(source, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"own\.jinja` {re.escape(end)}.*writes '</s>' after every answer"):
        load_template(str(file), tokenizer)
    tokenizer.hf.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(source, encoding="utf-8")
    with pytest.raises(ValueError, match=f"chat template of .*{re.escape(end)}"):
        load_template("tokenizer", load_tokenizer(tmp_path))


@pytest.mark.parametrize(
    ("source", "end"),
    [
        (CHATML, "<|im_end|>"),
        (LLAMA3, "<|eot_id|>"),
        (GEMMA, "<end_of_turn>"),
        (ALPACA.replace("END", "'\n' + eos_token"), "</s>"),
        (ALPACA.replace("END", "(eos_token if loop.last else '<|im_end|>')"), "</s>"),
    ],
)
def test_the_end_of_every_answer_is_learned_and_ends_a_chat(
    source: str, end: str, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    backend = Tokenizer.from_str(tokenizer.hf.backend_tokenizer.to_str())
    backend.add_special_tokens(
        [
            AddedToken(name, special=True)
            for name in ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|start_header_id|>", "<|end_header_id|>")
        ]
    )
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(source, encoding="utf-8")
    extended = load_tokenizer(tmp_path)
    template = load_template("tokenizer", extended)
    segments = template.encode(CONVERSATION, extended)
    assert flat(segments) == by_transformers(CONVERSATION, extended, source)
    ends = {segment.turn: segment.text_ids[-1] for segment in segments if segment.answer}
    assert ends.keys() == {1, 3}
    assert set(ends.values()) <= template.stop_ids(extended)
    assert ends[3] == extended.added_tokens[end][0]


def test_an_added_token_that_is_not_special_ends_nothing(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    backend = Tokenizer.from_str(tokenizer.hf.backend_tokenizer.to_str())
    backend.add_tokens([AddedToken("<|im_end|>", special=False)])
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    with pytest.raises(ValueError, match="begins with no special token"):
        load_template("tokenizer", load_tokenizer(tmp_path))


def test_a_template_of_one_exchange_can_be_used(chat_tokenizer: TextTokenizer, tmp_path: Path) -> None:
    file = tmp_path / "one.jinja"
    file.write_text("{% if messages | length > 2 %}{{ raise_exception('one only') }}{% endif %}" + CHATML)
    template = load_template(str(file), chat_tokenizer)
    assert len(template.encode(CONVERSATION[:2], chat_tokenizer)) > 1
    with pytest.raises(ValueError, match="one only"):
        template.encode(CONVERSATION, chat_tokenizer)


@pytest.mark.parametrize(
    "body",
    [
        "{{ 1 / 0 }}",
        "{{ messages[9].content }}",
        "{{ 'a' + 1 }}",
        "{{ messages[0]['x'].y }}",
        "{{ 'a' * 10**9 }}",
        r"{{ '\ud800' }}",
        "{{ '%10000000000s' % 'a' }}",
        "{{ 'a'.center(10**11) }}",
        r"{{ raise_exception('a\nb') }}",
        "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
        "{{ raise_exception('') }}",
        f"{{{{ {'(' * 5000}1{')' * 5000} }}}}",
        "{{ '{:>90000000}'.format('a') }}",
        "{% for i in range(5) %}" * 3000 + "{% endfor %}" * 3000,
    ],
)
def test_whatever_a_template_raises_is_said_in_one_line(body: str, chat_tokenizer: TextTokenizer) -> None:
    with pytest.raises(ValueError, match=r"^`template` cannot be used for this conversation: [^\n]*$"):
        JinjaTemplate(body + CHATML).encode(CONVERSATION, chat_tokenizer)


@pytest.mark.parametrize("chat_tokenizer", ["bytes"], indirect=True)
@pytest.mark.parametrize(
    "body",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 10 ** (10 ** 9) }}",
        "{% for a in range(99999) %}{{ 'a' * 999999 }}{% endfor %}",
    ],
)
def test_a_template_ends_in_time(body: str, chat_tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "CPU_SECONDS", 0.5)
    started = time.monotonic()
    caught = list[BaseException]()

    def encode() -> None:
        try:
            JinjaTemplate(body + CHATML).encode(CONVERSATION, chat_tokenizer)
        except ValueError as error:
            caught.append(error)

    thread = threading.Thread(target=encode)  # no signal of Python's reaches it
    thread.start()
    thread.join()
    (error,) = caught
    assert re.fullmatch(r"`template` cannot be used for this conversation: [^\n]+", str(error))
    assert time.monotonic() - started < 60
    assert JinjaTemplate(CHATML).encode(CONVERSATION, chat_tokenizer), "the next one is rendered"


def test_a_killed_or_forked_process_renders_again(chat_tokenizer: TextTokenizer) -> None:
    expected = JinjaTemplate(CHATML).encode(CONVERSATION, chat_tokenizer)
    process = rendering_process()._process
    assert process is not None
    process.kill()
    process.wait()
    assert JinjaTemplate(CHATML).encode(CONVERSATION, chat_tokenizer) == expected
    with get_context("fork").Pool(2) as pool:
        assert pool.starmap(JinjaTemplate(CHATML).encode, [(CONVERSATION, chat_tokenizer)] * 4) == [expected] * 4


def test_what_a_process_that_ends_said_last_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "transformers.py").write_text(
        "import sys\nfor _ in range(200_000): sys.stderr.write('noise ')\nraise ImportError('half installed')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    process = RenderingProcess()
    with pytest.raises(RenderingFailed, match=r"^it ended the process that rendered it \(exit code 1: .*noise"):
        process.render("", [], {}, prompt=False)
    (tmp_path / "transformers.py").write_text("raise ImportError('half installed')")
    with pytest.raises(RenderingFailed, match=r"\(exit code 1: ImportError: half installed\)\. Is it nested"):
        process.render("", [], {}, prompt=False)
    process.close()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="macOS limits no memory")
def test_a_limit_of_memory_that_is_there_is_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = list[tuple[int, tuple[int, int]]]()
    monkeypatch.setattr(resource, "setrlimit", lambda *given: limits.append(given))
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1 << 20, 1 << 20))
    rendering._limit_memory()
    assert limits == [(resource.RLIMIT_AS, (1 << 20, 1 << 20))]


def test_an_interrupted_rendering_leaves_no_answer_to_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def render(text: str) -> str:
        return rendering_process().render(
            "{{ messages[0].content }}", [{"role": "user", "content": text}], {}, prompt=False
        )

    def interrupt() -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    assert render("a") == "a"
    monkeypatch.setattr(rendering_process()._process, "stdout", SimpleNamespace(readline=interrupt))
    with pytest.raises(KeyboardInterrupt):
        render("b")
    assert render("c") == "c"


def test_a_template_that_is_not_utf_8(chat_tokenizer: TextTokenizer, tmp_path: Path) -> None:
    (tmp_path / "x.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"^`template='.*x\.jinja'` is not UTF-8: .*\. Convert the file$"):
        load_template(str(tmp_path / "x.jinja"), chat_tokenizer)
