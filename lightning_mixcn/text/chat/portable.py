"""The chat template of a run as Jinja text, with which other tools lay conversations out as the run did.

transformers, vLLM and llama.cpp render the whole conversation and encode the text in one piece; `mixtral` encodes turn
by turn. Whether that gives the same ids depends on where a tokenizer puts blanks, so the text is chosen by trying.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING

from .jinja import JinjaTemplate
from .templates import load_template
from .turns import ChatTemplate, Turn

if TYPE_CHECKING:
    from lightning_mixcn.tokenizer.tokenizer import TextTokenizer

# <bos>: BOS, if the tokenizer puts it before a text; <begin>: after BOS or EOS; <open>, <close>: inside the brackets;
# <answer>: before an answer.
_INST = """\
{%- if messages[0]['role'] == 'system' -%}\
{%- set system = messages[0]['content'] + '\\n\\n' if messages[0]['content'] else '' -%}\
{%- set spoken = messages[1:] -%}\
{%- else -%}{%- set system = '' -%}{%- set spoken = messages -%}{%- endif -%}\
<bos>\
{%- for message in spoken -%}\
{%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}\
{{- raise_exception('After the optional system message, roles must alternate user/assistant/user/assistant/...') -}}\
{%- endif -%}\
{%- if message['role'] == 'user' -%}\
{{- '<begin>[INST]<open>' + (system if <with system> else '') + message['content'] + '<close>[/INST]' -}}\
{%- else -%}\
{{- ('<answer>' + message['content']<strip> if message['content']<strip> else '') + eos_token -}}\
{%- endif -%}\
{%- endfor -%}"""
# What is tried, Mixtral's own format (V1) first. Later ones have tags of their own, no blanks around them, the system's
# text with the last question, and no blanks after an answer.
_CHOICES = {
    "<with system>": ("loop.first", "loop.index0 == (spoken|length - 1) // 2 * 2"),
    "<strip>": ("", ".rstrip(' ')"),
    "<begin>": ("", " "),
    "<open>": (" ", ""),
    "<close>": (" ", ""),
    "<answer>": (" ", ""),
}


def _spoken(*contents: str, system: str | None = None) -> tuple[Turn, ...]:
    turns = [Turn(("user", "assistant")[place % 2], content) for place, content in enumerate(contents)]
    return tuple(turns if system is None else [Turn("system", system), *turns])


_PROBES = (
    _spoken("Hello, world!", "Well, hello."),
    _spoken("你好，世界！", "今天天气不错。", "English?", "Yes: 3.14", "q"),
    _spoken("q", "a", "q", "a", system="Be brief."),
    _spoken("  two leading", "  two  inside \n", "\n\nlines\r\n", "\ttab ", system=" s "),
    _spoken("q", "", "q", "...", "q", system=""),
    _spoken("q", "two blanks behind  ", "q", "  ", "q", "a", system="Be brief."),
    _spoken("x = [1]\n    return x  # [", "] /INST", " ", "<0x41>▁😀"),
)


def portable_source(template: ChatTemplate, tokenizer: TextTokenizer) -> str | None:
    """Write a chat template as Jinja that transformers turns into the template's own ids.

    Contents that spell a control token are the exception: here they stay letters, in transformers they do not.

    Args:
        template: Chat template.
        tokenizer: Tokenizer that it is used with.

    Returns:
        Jinja text; ``None`` if there is none that gives the same ids, as for a template of a subclass's own making.
    """
    if isinstance(template, JinjaTemplate):
        return template.source
    inst = _INST.replace("<bos>", "{{- bos_token -}}" if tokenizer.begin_ids else "")
    for choice in product(*_CHOICES.values()):
        source = inst
        for name, text in zip(_CHOICES, choice, strict=True):
            source = source.replace(name, text)
        if all(_same_ids(source, probe, template, tokenizer) for probe in _PROBES):
            return source
    return None


def template_of_model(template: str | None, tokenizer: TextTokenizer) -> ChatTemplate:
    """Find the chat template to talk to a model with.

    Args:
        template: As in `load_template`; ``None`` is the one in the tokenizer's folder, which a run's adapter and its
            exports carry, and `mixtral` where there is none.
        tokenizer: Tokenizer of the model.

    Raises:
        ValueError: The template cannot be used.
        FileNotFoundError: There is no such file.
    """
    if template is None:
        template = "tokenizer" if tokenizer.hf.chat_template else "mixtral"
    return load_template(template, tokenizer)


def _same_ids(source: str, turns: Sequence[Turn], template: ChatTemplate, tokenizer: TextTokenizer) -> bool:
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    try:
        if turns[-1].role == "user":
            expected = template.encode_prompt(turns, tokenizer)
        else:
            expected = [index for segment in template.encode(turns, tokenizer) for index in segment.text_ids]
    except ValueError:  # it refuses such a conversation, so it is no format of this kind
        return False
    got = tokenizer.hf.apply_chat_template(
        messages,
        chat_template=source,
        add_generation_prompt=turns[-1].role == "user",
        tokenize=True,
        return_dict=False,
    )
    return got == expected
