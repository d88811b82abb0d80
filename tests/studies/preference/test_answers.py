"""Answers against stock transformers, and one by one as all together."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lightning_mixcn.model import load_found
from lightning_mixcn.model.inference.sampling import Sampling
from lightning_mixcn.studies.preference.answers import AnsweringModel
from lightning_mixcn.testing import save_tiny_mixtral
from lightning_mixcn.text import Turn, load_tokenizer

QUESTIONS = [[Turn("user", "你好")], [Turn("system", "Be short."), Turn("user", "Hello?")], [Turn("user", "Hello!")]]
GREEDY = Sampling(temperature=0, repetition_penalty=1.0, max_new_tokens=8)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_mixtral(tmp_path_factory.mktemp("answers") / "base", initializer_range=0.3)


@pytest.fixture(scope="module")
def model(base: Path) -> Any:
    return load_found(AnsweringModel(str(base), [], "mixtral").found, quantization="none", dtype="float32")


def test_greedy_answers_are_those_of_transformers(base: Path, model: Any) -> None:
    answering, tokenizer = AnsweringModel(str(base), QUESTIONS, "mixtral"), load_tokenizer(base)
    stock: Any = transformers.MixtralForCausalLM.from_pretrained(base, dtype=torch.float32)
    asked = ["[INST] 你好 [/INST]", "[INST] Be short.\n\nHello? [/INST]", "[INST] Hello! [/INST]"]
    for number, text in enumerate(asked):
        ids = [tokenizer.bos_id, *tokenizer.encode_batch([text])[0]]
        (row,) = stock.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False, pad_token_id=2)
        new = row[len(ids) :].tolist()
        ended = new[-1] == tokenizer.eos_id
        answer = answering.answer(model, number, GREEDY, seed=0)
        assert answer.text == tokenizer.decode(new).strip()
        assert (answer.tokens, answer.ended) == (len(new) - ended, ended)


def test_an_answer_is_the_seed_s_and_the_question_s(base: Path, model: Any) -> None:
    answering, sampling = AnsweringModel(str(base), QUESTIONS, "mixtral"), Sampling(temperature=1.0, max_new_tokens=12)
    first = [answering.answer(model, number, sampling, seed=3) for number in range(3)]
    assert [answering.answer(model, number, sampling, seed=3) for number in (2, 1, 0)] == first[::-1]
    assert answering.answer(model, 0, sampling, seed=4) != first[0]


def test_what_the_prompts_are_made_of_is_in_their_hash(base: Path) -> None:
    one = AnsweringModel(str(base), QUESTIONS, "mixtral").prompts_sha256
    assert AnsweringModel(str(base), QUESTIONS, "mixtral").prompts_sha256 == one
    assert AnsweringModel(str(base), QUESTIONS[::-1], "mixtral").prompts_sha256 != one


def test_a_question_without_room_is_named_before_any_weight_is_read(base: Path) -> None:
    with pytest.raises(ValueError, match=r"question 2 has \d+ tokens for .* room for 512"):
        AnsweringModel(str(base), [QUESTIONS[0], [Turn("user", "x" * 600)]], "mixtral")


@pytest.mark.gpu
def test_on_a_gpu_an_answer_is_the_seed_s(base: Path) -> None:
    answering, sampling = AnsweringModel(str(base), QUESTIONS, "mixtral"), Sampling(temperature=1.0, max_new_tokens=12)
    model = load_found(answering.found, dtype="float32", device="cuda")
    first = [answering.answer(model, number, sampling, seed=3) for number in range(3)]
    assert [answering.answer(model, number, sampling, seed=3) for number in (2, 1, 0)] == first[::-1]
