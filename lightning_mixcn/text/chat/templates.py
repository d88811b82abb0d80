"""Conversations as token ids: which tokens are the answers, and what a model is given to answer.

The same template serves training and chat. Mixtral's, ``<s>[INST] question [/INST] answer</s>``, gives the ids of
mistral_common's tokenizer for the vocabulary's version (Mixtral-8x7B has V1, Mixtral-8x22B-Instruct V3); others are
written in Jinja (`jinja.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_mixcn.errors import MissingFileError, UserError, one_line

if TYPE_CHECKING:
    from lightning_mixcn.tokenizer.tokenizer import TextTokenizer
from .turns import ChatTemplate, Turn, TurnTokens, check_prompt, check_turns


@dataclass(frozen=True)
class MixtralTemplate:
    """``<s>[INST] question [/INST] answer</s>[INST] … [/INST] …</s>``, ids as mistral_common's V1 tokenizer.

    The system's text goes in front of the first question, two newlines between. ``[INST]`` and ``[/INST]`` are no
    control tokens in Mixtral's vocabulary but letters, for everybody; the only control tokens are BOS and EOS. A
    tokenizer that puts no BOS before a text puts none here.
    """

    def encode(self, turns: Sequence[Turn], tokenizer: TextTokenizer) -> list[TurnTokens]:
        """Encode a whole conversation: BOS, questions, and answers with EOS."""
        check_turns(turns)
        blank = "" if _begins_with_blank(tokenizer) else " "
        system = turns[0].content if turns[0].role == "system" else ""
        spoken = [(number, turn) for number, turn in enumerate(turns) if turn.role != "system"]
        texts: list[str] = []
        for _, turn in spoken:
            content = f"{system}\n\n{turn.content}" if system and not texts else turn.content
            if turn.role == "user":
                texts.append(f"[INST] {content} [/INST]")
            else:
                texts.append(blank + content if content else "")
        segments: list[TurnTokens] = []
        for (number, turn), ids in zip(spoken, tokenizer.encode_batch(texts), strict=True):
            answer = turn.role == "assistant"
            begin = () if segments else tokenizer.begin_ids
            segments.append(TurnTokens([*begin, *ids, *([tokenizer.eos_id] if answer else [])], answer, number))
        return segments

    def encode_prompt(self, turns: Sequence[Turn], tokenizer: TextTokenizer) -> list[int]:
        """Encode a conversation up to ``[/INST]``; the answer's blank is the model's to write."""
        check_prompt(turns)
        return [index for segment in self.encode(turns, tokenizer) for index in segment.text_ids]

    def stop_ids(self, tokenizer: TextTokenizer) -> frozenset[int]:
        """Return EOS alone."""
        return frozenset([tokenizer.eos_id])

    def check_conversation(self, turns: Sequence[Turn], tokenizer: TextTokenizer) -> None:
        """Raise unless it is a conversation."""
        check_turns(turns)


@dataclass(frozen=True)
class MixtralControlTemplate(MixtralTemplate):
    """``<s>[INST] question[/INST] answer</s>`` with control tokens as tags, ids as mistral_common's V2 and V3.

    Mixtral-8x22B-Instruct has V3; without tools the two are the same. The system's text goes in front of the *last*
    question, two newlines between, and blanks at the end of an answer are left out.
    """

    def encode(self, turns: Sequence[Turn], tokenizer: TextTokenizer) -> list[TurnTokens]:
        """Encode a whole conversation: BOS, questions between tags, and answers with EOS."""
        check_turns(turns)
        begin, end = (tokenizer.added_tokens[tag][0] for tag in _TAGS)
        system = turns[0].content if turns[0].role == "system" else ""
        spoken = [(number, turn) for number, turn in enumerate(turns) if turn.role != "system"]
        last_question = max(number for number, turn in spoken if turn.role == "user")
        texts = [
            turn.content.rstrip(" ")
            if turn.role == "assistant"
            else (f"{system}\n\n{turn.content}" if system and number == last_question else turn.content)
            for number, turn in spoken
        ]
        segments: list[TurnTokens] = []
        for (number, turn), ids in zip(spoken, tokenizer.encode_batch(texts), strict=True):
            answer = turn.role == "assistant"
            written = [*ids, tokenizer.eos_id] if answer else [begin, *ids, end]
            segments.append(TurnTokens(written if segments else [*tokenizer.begin_ids, *written], answer, number))
        return segments


def load_template(template: str | None, tokenizer: TextTokenizer) -> ChatTemplate:
    """Find the chat template that a person names.

    Args:
        template: ``mixtral``, which ``None`` is too; ``tokenizer``: the one in the tokenizer's folder
            (``tokenizer_config.json`` or ``chat_template.jinja``); or a Jinja file.
        tokenizer: Tokenizer of the model.

    Raises:
        ValueError: The tokenizer has no template, or the template cannot be used: nothing that is learned would end an
            answer, or Mistral's format of this vocabulary is not known.
        FileNotFoundError: There is no such file.
    """
    if template is None or template == "mixtral":
        return _mixtral_template(tokenizer)
    from .jinja import JinjaTemplate

    if template == "tokenizer":
        if not tokenizer.hf.chat_template:
            raise UserError(
                f"`template='tokenizer'`, but the tokenizer of `{tokenizer.path}` has no chat template. Use "
                "`template=mixtral`, or give a Jinja file"
            )
        found = JinjaTemplate(tokenizer.hf.get_chat_template(), name=f"chat template of {tokenizer.path}")
    elif Path(template).is_file():
        try:
            found = JinjaTemplate(Path(template).read_text(encoding="utf-8"), name=template)
        except UnicodeDecodeError as error:
            raise UserError(f"`template={template!r}` is not UTF-8: {one_line(error)}. Convert the file") from error
    else:
        raise MissingFileError(f"`template={template!r}` is not there. Expected mixtral, tokenizer, or a Jinja file")
    found.check(tokenizer)  # one that cannot be used says so now
    return found


# Mistral's tags, which are letters in V1 and control tokens since V2.
_TAGS = ("[INST]", "[/INST]")


def _mixtral_template(tokenizer: TextTokenizer) -> ChatTemplate:
    """Choose the version of Mistral's format that a vocabulary was made for."""
    added = tokenizer.added_tokens
    tags = [tag for tag in _TAGS if tag in added]
    if not tags:
        return MixtralTemplate()
    reason = ""
    if len(tags) < len(_TAGS) or not all(added[tag][1] for tag in tags):
        reason = "only one of [INST] and [/INST] is a token, or one of them is not special"
    elif "[SYSTEM_PROMPT]" in added:
        reason = "it has [SYSTEM_PROMPT], as Mistral's formats of version 7 and later"
    if reason:
        raise UserError(
            f"`template=mixtral` writes versions 1 to 3 of Mistral's format, and the vocabulary of `{tokenizer.path}` "
            f"is of none of them: {reason}. Use `template=tokenizer`, or give a Jinja file"
        )
    return MixtralControlTemplate()


def _begins_with_blank(tokenizer: TextTokenizer) -> bool:
    """Tell whether a blank comes before every text, as of SentencePiece's dummy prefix, so that `▁Well` follows."""
    (ids,) = tokenizer.encode_batch(["a"])
    return tokenizer.decode([*ids, *ids]) == "a a"
