"""Settings for choosing the tokens of an answer. Imports no torch: it is part of the help of commands."""

from dataclasses import dataclass

from lightning_mixcn.errors import UserError


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

    temperature: float = 0.2
    top_k: int = 40
    top_p: float = 0.9
    repetition_penalty: float = 1.1
    max_new_tokens: int = 400

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, fits, expected in (
            ("temperature", 0 <= self.temperature < float("inf"), "0 for the likeliest token, or more"),
            ("top_k", self.top_k >= 0, "0 for all tokens, or more"),
            ("top_p", 0 < self.top_p <= 1, "more than 0, at most 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "more than 0; 1 is none"),
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
        ):
            if not fits:
                raise UserError(f"`{name}={getattr(self, name)}`: expected {expected}")
