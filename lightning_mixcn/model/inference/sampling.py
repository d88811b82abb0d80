"""Settings for choosing the tokens of an answer. Imports no torch: it is part of the help of commands."""

from dataclasses import dataclass
from typing import Annotated

from lightning_mixcn.arguments import Between, NewTokens, check_arguments


@dataclass(frozen=True)
class Sampling:
    """Choice of the next token, and length of an answer; the defaults are those of Chinese-Mixtral's inference.

    Args:
        temperature: Logits are divided by it; 0 takes the likeliest token.
        top_k: Choose among this many likeliest tokens; 0 for all.
        top_p: Choose among the likeliest tokens that together have this probability; 1 for all.
        repetition_penalty: Makes tokens of the prompt and the answer less likely if more than 1, which is none
            (Keskar et al., 2019).
        max_new_tokens: Most tokens of an answer.

    Raises:
        ValueError: one of them is out of its range.
    """

    temperature: Annotated[float, Between(0, 100, "(0 for the likeliest token)")] = 0.2
    top_k: Annotated[int, Between(0, 10**9, "(0 for all tokens)")] = 40
    top_p: Annotated[float, Between(0, 1, "(1 for all tokens)", excluded=(0,))] = 0.9
    repetition_penalty: Annotated[float, Between(0, 100, "(1 is none)", excluded=(0,))] = 1.1
    max_new_tokens: NewTokens = 400

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_arguments(Sampling, vars(self))
