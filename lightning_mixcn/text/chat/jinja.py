"""Chat templates written in Jinja, as tokenizers on the hub carry them, without their injection points.

transformers writes contents into the template and then reads special tokens out of the whole text, so a user can forge
them. Here the template is rendered with placeholders that nobody can guess, and special tokens are read only out of the
text that the template itself wrote. For contents that spell none, the ids are those of ``apply_chat_template``.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import groupby
from typing import TYPE_CHECKING

from lightning_mixcn.errors import UserError, one_line

from .rendering import RenderingFailed, rendering_process
from .turns import (
    Turn,
    TurnTokens,
    check_prompt,
    check_turns,
)

if TYPE_CHECKING:
    from lightning_mixcn.tokenizer.tokenizer import TextTokenizer


@dataclass(frozen=True)
class JinjaTemplate:
    """A Jinja chat template; the token with which it ends an answer belongs to the answer.

    Args:
        source: The template; it sees what transformers' templates see.
        name: Its name in errors; not part of its identity.
    """

    source: str
    name: str = field(default="template", repr=False, compare=False)

    def encode(self, turns: Sequence[Turn], tokenizer: TextTokenizer) -> list[TurnTokens]:
        """Encode a whole conversation."""
        check_turns(turns)
        controls = _control_tokens(tokenizer)
        pieces = self._pieces(turns, tokenizer, controls, prompt=False)
        owners = [(index, *_owner([pieces[place] for place in places])) for index, places in controls.encode(pieces)]
        return [
            TurnTokens([index for index, _, _ in tokens], answer, turn)
            for (turn, answer), tokens in groupby(owners, key=lambda token: token[1:])
        ]

    def encode_prompt(self, turns: Sequence[Turn], tokenizer: TextTokenizer) -> list[int]:
        """Encode a conversation and the template's generation prompt."""
        check_prompt(turns)
        controls = _control_tokens(tokenizer)
        return [index for index, _ in controls.encode(self._pieces(turns, tokenizer, controls, prompt=True))]

    def stop_ids(self, tokenizer: TextTokenizer) -> frozenset[int]:
        """Return EOS, and the special tokens that the template writes after an answer."""
        return _stop_ids(self, tokenizer)

    def check_conversation(self, turns: Sequence[Turn], tokenizer: TextTokenizer) -> None:
        """Raise unless it is a conversation that the template writes."""
        check_turns(turns)
        self._pieces(turns, tokenizer, _control_tokens(tokenizer), prompt=False)

    def check(self, tokenizer: TextTokenizer) -> None:
        """Raise unless the template can be used, and every answer ends with a token that is learned and ends a chat.

        Args:
            tokenizer: The model's.

        Raises:
            ValueError: It names the template and what it writes after an answer.
        """
        self.encode_prompt(_EXCHANGE[:1], tokenizer)
        stop_ids = self.stop_ids(tokenizer)
        for turns, segments in _probe(self, tokenizer):
            last = {segment.turn: segment.text_ids[-1] for segment in segments if segment.answer}
            for turn, index in last.items():
                if index not in stop_ids:
                    raise UserError(self._endless(turns, turn, tokenizer))

    def _endless(self, turns: Sequence[Turn], turn: int, tokenizer: TextTokenizer) -> str:
        """Say what is written after an answer, and what to do."""
        pieces = self._pieces(turns, tokenizer, _control_tokens(tokenizer), prompt=False)
        place = next(place for place, piece in enumerate(pieces) if piece.answer and piece.turn == turn)
        after = pieces[place + 1].text[:20]
        end = f"ends an answer with {after!r}, which begins with no special token" if after else "ends no answer"
        eos = tokenizer.decode([tokenizer.eos_id], skip_special_tokens=False)
        return (
            f"`{self.name}` {end} of the tokenizer of `{tokenizer.path}`: no end would be learned, and chat would "
            f"never stop. Use a template that writes {eos!r} after every answer, such as `template=mixtral`, or a "
            "tokenizer in which the end is a special token"
        )

    def _pieces(
        self, turns: Sequence[Turn], tokenizer: TextTokenizer, controls: _ControlTokens, *, prompt: bool
    ) -> list[_Piece]:
        """Render the turns, and take the text apart."""
        nonce = secrets.token_hex(16)
        stand_ins = []
        for number, turn in enumerate(turns):
            # Blanks around a content stay outside, since many templates strip them.
            before, _, after = _stripped(turn.content)
            stand_ins.append(replace(turn, content=f"{before}{nonce}:{number:06d};{after}"))
        parts = re.split(rf"{nonce}:(\d{{6}});", self._render(stand_ins, tokenizer, prompt))
        places = [int(place) for place in parts[1::2]]
        self._check_places(turns, places)
        pieces = _assemble(turns, parts[::2], places, controls)
        # Also refuses a template that looks into contents, for one that it would have changed.
        if "".join(piece.text for piece in pieces) != self._render(turns, tokenizer, prompt):
            raise UserError(
                f"`{self.name}` does not write the contents of this conversation as they are, so what is a control "
                "token and what is text cannot be told. Use a template that does, or change the contents"
            )
        return pieces

    def _render(self, turns: Sequence[Turn], tokenizer: TextTokenizer, prompt: bool) -> str:
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        try:
            special = tokenizer.hf.special_tokens_map
            text = rendering_process().render(self.source, messages, special, prompt=prompt)
            text.encode()  # the tokenizer takes no half of a surrogate pair
        except (RenderingFailed, UnicodeEncodeError) as error:
            raise UserError(f"`{self.name}` cannot be used for this conversation: {one_line(error)}") from error
        return text

    def _check_places(self, turns: Sequence[Turn], places: list[int]) -> None:
        for number, turn in enumerate(turns):
            times = places.count(number)
            if times == 0 or (times > 1 and turn.role == "assistant"):
                raise UserError(
                    f"`{self.name}` writes turn {number}, the {turn.role}'s, {times} times. Use a template that writes "
                    "every turn, and answers once"
                )


@dataclass(frozen=True, slots=True)
class _Piece:
    """Part of a rendered conversation: a content, or what the template wrote between contents.

    Args:
        text: Its characters.
        turn: Index of the turn that it belongs to.
        is_content: True if special tokens in it are only letters.
        answer: True if it is the assistant's content or ends it.
    """

    text: str
    turn: int
    is_content: bool
    answer: bool


def _stripped(content: str) -> tuple[str, str, str]:
    """Split a content into its leading blanks, the text, and its trailing blanks."""
    rest = content.lstrip()
    core = rest.rstrip()
    return content[: len(content) - len(rest)], core, rest[len(core) :]


def _assemble(turns: Sequence[Turn], between: list[str], places: list[int], controls: _ControlTokens) -> list[_Piece]:
    """Put the contents in their places, with those blanks around them that the template kept.

    Args:
        turns: The conversation.
        between: Texts that the template wrote before, between and after the contents; one more than ``places``.
        places: The turn whose content follows each of these, but the last.
        controls: Tells the special token that ends a turn.
    """
    pieces: list[_Piece] = []
    follows = ""  # blanks of the content before, if the template kept them
    for text, place, following in zip(between, [*places, places[-1]], [*places, None], strict=True):
        written = text.removeprefix(follows)
        if follows and written != text:
            pieces[-1] = replace(pieces[-1], text=pieces[-1].text + follows)
        if pieces and (end := controls.match_end(written)):
            pieces.append(_Piece(end, pieces[-1].turn, is_content=False, answer=pieces[-1].answer))
            written = written.removeprefix(end)
        if following is None:
            return [*pieces, _Piece(written, place, is_content=False, answer=False)]
        before, core, follows = _stripped(turns[place].content)
        kept = before if before and written.endswith(before) else ""
        pieces.append(_Piece(written.removesuffix(kept), place, is_content=False, answer=False))
        pieces.append(_Piece(kept + core, place, is_content=True, answer=turns[place].role == "assistant"))
    raise AssertionError("the text after the last content ends the loop")


def _owner(pieces: Sequence[_Piece]) -> tuple[int, bool]:
    """Return the turn of a token, and whether it is learned: it reaches into an answer, and into no other content.

    Args:
        pieces: Those that the token has characters of.
    """
    contents = [piece for piece in pieces if piece.is_content]
    answer = any(piece.answer for piece in pieces) and all(piece.answer for piece in contents)
    return (contents or pieces)[-1].turn, answer


class _ControlTokens:
    """Special tokens where a template writes them, and only there.

    A copy of the tokenizer reads each special token by a second name that nobody can guess; the tokenizer's own rules,
    where text begins with a blank among them, hold as ever.

    Args:
        tokenizer: The model's.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        from tokenizers import AddedToken, Tokenizer

        self._backend = Tokenizer.from_str(tokenizer.hf.backend_tokenizer.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True  # by their own names, they are letters
        self._names: dict[str, str] = {}
        self._ids: dict[int, int] = {}  # of the second name: of the first
        nonce = secrets.token_hex(16)
        for index, token in self._backend.get_added_tokens_decoder().items():
            if token.special:
                second = f"{nonce}:{index:09d};"
                self._names[token.content] = second
                self._backend.add_tokens(
                    [AddedToken(second, normalized=False, special=False, lstrip=token.lstrip, rstrip=token.rstrip)]
                )
                second_id = self._backend.token_to_id(second)
                assert second_id is not None, "it was added"
                self._ids[second_id] = int(index)
        self.ids = frozenset(self._ids.values())
        longest_first = sorted(self._names, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)))
        self._end = re.compile(rf"\s*(?:{self._pattern.pattern})")

    def match_end(self, text: str) -> str:
        """Find the special token at the beginning of ``text``, blanks before it included; empty if there is none."""
        found = self._end.match(text)
        return found[0] if found else ""

    def encode(self, pieces: Sequence[_Piece]) -> list[tuple[int, range]]:
        """Encode a conversation.

        Args:
            pieces: Its parts in order.

        Returns:
            Token ids, each with the indices of the pieces that it has characters of.
        """
        texts = [
            piece.text if piece.is_content else self._pattern.sub(lambda found: self._names[found[0]], piece.text)
            for piece in pieces
        ]
        piece_of = [place for place, text in enumerate(texts) for _ in text]
        encoding = self._backend.encode("".join(texts), add_special_tokens=False)
        tokens, reached, covered = [], 0, range(0)
        for index, (_, stop) in zip(encoding.ids, encoding.offsets, strict=True):
            if stop > reached:  # else it is a further byte of a character that the token before has
                covered = range(piece_of[reached], piece_of[stop - 1] + 1)
                reached = stop
            tokens.append((self._ids.get(index, index), covered))
        return tokens


@lru_cache(maxsize=4)
def _control_tokens(tokenizer: TextTokenizer) -> _ControlTokens:
    return _ControlTokens(tokenizer)


_EXCHANGE: tuple[Turn, ...] = (Turn("user", "?"), Turn("assistant", "!"))


def _probe(template: JinjaTemplate, tokenizer: TextTokenizer) -> list[tuple[tuple[Turn, ...], list[TurnTokens]]]:
    """Encode conversations of one exchange and of two, if the template takes two."""
    probes = [(_EXCHANGE, template.encode(_EXCHANGE, tokenizer))]
    with suppress(ValueError):  # a longer conversation is then a bad record
        probes.append((_EXCHANGE * 2, template.encode(_EXCHANGE * 2, tokenizer)))
    return probes


@lru_cache(maxsize=4)
def _stop_ids(template: JinjaTemplate, tokenizer: TextTokenizer) -> frozenset[int]:
    last = {
        (len(turns), segment.turn): segment.text_ids[-1]
        for turns, segments in _probe(template, tokenizer)
        for segment in segments
        if segment.answer
    }
    return frozenset([tokenizer.eos_id, *_control_tokens(tokenizer).ids.intersection(last.values())])
