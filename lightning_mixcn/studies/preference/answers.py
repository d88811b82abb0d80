"""The answers of one model to all questions, each of them the same whatever was answered before."""

import hashlib
import json
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from lightning_mixcn.errors import UserError
from lightning_mixcn.model.checkpoints.reading import model_config
from lightning_mixcn.model.find import find_model
from lightning_mixcn.model.inference.generation import PrefixCache, stream_tokens
from lightning_mixcn.model.inference.sampling import Sampling
from lightning_mixcn.text import Turn, load_tokenizer, template_of_model
from lightning_mixcn.tokenizer.files import generation_end_ids
from lightning_mixcn.tokenizer.tokenizer import stream_text


class Answer(NamedTuple):
    """What a model wrote.

    Args:
        text: Without blanks around it.
        tokens: Number of tokens, without the one that ends an answer.
        ended: True if the model ended it itself.
    """

    text: str
    tokens: int
    ended: bool


class AnsweringModel:
    """A model's questions in its own tokens; the weights come later.

    Args:
        src: Model folder or hub id, 4-bit folder, run folder, or adapter folder.
        questions: Turns of each question.
        template: As in `template_of_model`.

    Attributes:
        src: The same.
        found: Places of its parts.

    Raises:
        ValueError: the template cannot be used, or a question leaves no room in the model's context.
        FileNotFoundError: no such model or template.
    """

    def __init__(self, src: str, questions: Sequence[Sequence[Turn]], template: str | None) -> None:
        """Encode the questions."""
        self.src, self.found = src, find_model(src)
        self._tokenizer = load_tokenizer(self.found.tokenizer)
        laid_out = template_of_model(template, self._tokenizer)
        self._prompts = [laid_out.encode_prompt(turns, self._tokenizer) for turns in questions]
        ends = generation_end_ids(self.found.tokenizer, self.found.base.path)
        self._stop_ids = laid_out.stop_ids(self._tokenizer) | ends
        self._context = model_config(self.found.base).max_position_embeddings
        for number, prompt in enumerate(self._prompts, 1):
            if len(prompt) >= self._context:
                raise UserError(
                    f"question {number} has {len(prompt)} tokens for {src!r}, whose context has room for "
                    f"{self._context} with the answer. Shorten it, or leave it out"
                )

    @property
    def prompts_sha256(self) -> str:
        """Of what the model is given: it changes with the questions, the tokenizer and the template."""
        content = json.dumps([self._prompts, sorted(self._stop_ids)])
        return hashlib.sha256(content.encode()).hexdigest()

    def answer(self, model: nn.Module, question: int, sampling: Sampling, seed: int) -> Answer:
        """Answer one question.

        Args:
            model: This model, of `load_found`.
            question: Its number, from 0.
            sampling: Choice of tokens.
            seed: Seed of the random numbers, together with the question's number.
        """
        prompt = self._prompts[question]
        digest = hashlib.sha256(f"{seed} {question}".encode()).digest()
        generator = torch.Generator(next(model.parameters()).device).manual_seed(int.from_bytes(digest[:7], "big"))
        # A cache of its own: keys that another question has left would be rounded otherwise.
        tokens = list(
            stream_tokens(model, prompt, PrefixCache(), sampling, stop_ids=self._stop_ids, generator=generator)
        )
        room = min(sampling.max_new_tokens, self._context - len(prompt))
        return Answer("".join(stream_text(tokens, self._tokenizer.decode)).strip(), len(tokens), len(tokens) < room)
