"""Define a conversation's turns, and what a chat template does with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, get_args

from lightning_mixcn.errors import UserError

if TYPE_CHECKING:
    from lightning_mixcn.tokenizer.tokenizer import TextTokenizer


Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = get_args(Role)


@dataclass(frozen=True, slots=True)
class Turn:
    """Words of one party of a conversation.

    Args:
        role: ``system``, ``user`` or ``assistant``.
        content: Text; may be empty.
        learned: True if it is learned from in case it is an answer.
    """

    role: str
    content: str
    learned: bool = True


@dataclass(frozen=True, slots=True)
class TurnTokens:
    """Consecutive tokens of one turn, all labels or none.

    Args:
        text_ids: Token ids, control tokens included.
        answer: True for the assistant's tokens, the end token included: the loss is over them, unless the turn is not
            learned.
        turn: Index of the turn; where a template joins two turns, of the later one.
    """

    text_ids: list[int]
    answer: bool
    turn: int


class ChatTemplate(Protocol):
    """How a model's conversations are written. Contents are text: a control token spelled in one stays letters."""

    def encode(self, turns: Sequence[Turn], tokenizer: TextTokenizer) -> list[TurnTokens]:
        """Encode a whole conversation.

        Args:
            turns: See `check_turns`.
            tokenizer: Tokenizer of the model.

        Returns:
            Segments, in the order of the row; the answers end as the model is to end them.
        """

    def encode_prompt(self, turns: Sequence[Turn], tokenizer: TextTokenizer) -> list[int]:
        """Encode a conversation up to where the assistant is to write.

        Args:
            turns: See `check_turns`; the last one is the user's.
            tokenizer: Tokenizer of the model.
        """

    def stop_ids(self, tokenizer: TextTokenizer) -> frozenset[int]:
        """Return the tokens that end an answer."""

    def check_conversation(self, turns: Sequence[Turn], tokenizer: TextTokenizer) -> None:
        """Raise the ValueError that `encode` would raise, without encoding."""


def check_turns(turns: Sequence[Turn]) -> None:
    """Raise unless it is a conversation: perhaps a system turn, then user and assistant by turns.

    Args:
        turns: Turns to check.

    Raises:
        ValueError: The turns are none; the message says which turn is wrong, and how.
    """
    for number, turn in enumerate(turns):
        if turn.role not in ROLES:
            raise UserError(f"turn {number} has the role {turn.role!r}. Expected one of {', '.join(ROLES)}")
        if turn.role == "system" and number > 0:
            raise UserError(f"turn {number} is the system's. Put the system turn first, and only one")
    spoken = [(number, turn.role) for number, turn in enumerate(turns) if turn.role != "system"]
    if not spoken:
        raise UserError("the conversation is empty. Expected at least one turn of the user")
    for place, (number, role) in enumerate(spoken):
        if role == ROLES[1 + place % 2]:
            continue
        if place == 0:
            raise UserError("the assistant speaks first. Put a user turn before it, or remove it")
        raise UserError(f"turns {number - 1} and {number} are both the {role}'s. Join them, or remove one")


def check_prompt(turns: Sequence[Turn]) -> None:
    """Raise unless the conversation waits for an answer.

    Args:
        turns: Turns to check.

    Raises:
        ValueError: The turns are no conversation, or the last turn is the assistant's.
    """
    check_turns(turns)
    if turns[-1].role != "user":
        raise UserError("the last turn is the assistant's, so there is nothing to answer. End with a user turn")
