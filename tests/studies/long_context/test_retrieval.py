"""Retrieval: what the prompts look like, that greedy decoding agrees, and the two ends of the scale."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_mixcn.model import load_mixtral
from lightning_mixcn.studies.long_context.retrieval import RETRIEVAL_TASKS, Prompt, evaluate_retrieval, make_prompt
from lightning_mixcn.text import TextTokenizer, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> TextTokenizer:
    return load_tokenizer(tiny_base)


@pytest.mark.parametrize("name", RETRIEVAL_TASKS)
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_a_prompt_has_its_statement_at_its_depth(name: str, depth: float, tokenizer: TextTokenizer) -> None:
    prompt = make_prompt(name, tokenizer, 2000, depth, seed=1)
    assert 1850 < len(prompt.ids) <= 2000  # less than a sentence is missing
    text, answer = (tokenizer.decode(ids.tolist()) for ids in (prompt.ids, prompt.ids[-prompt.answer_tokens :]))
    task = RETRIEVAL_TASKS[name]
    assert text.endswith(answer)
    fact = answer.strip()
    topic = next((topic for topic, found in task.facts.items() if found == fact), "")
    statement = task.statement.format(topic=topic, answer=fact)
    assert text.count(statement) == 1
    place = text.index(statement)
    if depth == 0:
        assert place == 0
    elif depth == 1:
        assert text[:place].endswith(task.filler)
        assert text[place:].count(task.filler[0]) == 0
    else:
        assert 0.35 < place / len(text) < 0.6


def test_the_same_seed_hides_the_same_fact(tokenizer: TextTokenizer) -> None:
    def answer(length: int, depth: float, seed: int) -> list[int]:
        prompt = make_prompt("passkey_zh", tokenizer, length, depth, seed=seed)
        return prompt.ids[-prompt.answer_tokens :].tolist()

    assert answer(500, 0.0, 3) == answer(900, 0.7, 3)
    assert len({tuple(answer(500, 0.0, seed)) for seed in range(5)}) == 5


def test_a_length_without_room_says_what_it_takes(tokenizer: TextTokenizer) -> None:
    with pytest.raises(ValueError, match=r"of 64 tokens has no room for 'needle_en'\. Give at least 2\d\d"):
        make_prompt("needle_en", tokenizer, 64, 0.0, seed=0)


ASKED: dict[str, Any] = {
    "tasks": ["passkey_en", "needle_zh"], "lengths": [240, 300], "depths": [0.0, 1.0], "prompts": 2, "chunk": 100,
}  # fmt: skip


def test_a_random_model_finds_nothing(tokenizer: TextTokenizer, tiny_base: Path) -> None:
    """Chance is one of 272 for each of an answer's bytes."""
    model = load_mixtral(tiny_base, quantization="none", dtype="float32")
    result = evaluate_retrieval(model, tokenizer, **ASKED)
    assert (result.lengths, result.out_of_memory) == ([240, 300], [])
    assert set(result.accuracy) == {"passkey_en", "needle_zh"}
    assert all(share_DL.shape == (2, 2) and not share_DL.any() for share_DL in result.accuracy.values())


def test_a_model_that_knows_the_answers_finds_all_and_greedy_decoding_agrees(
    tokenizer: TextTokenizer, tiny_base: Path
) -> None:
    """Overfitted to the prompts of one task; the other's stay unknown."""
    model: Any = load_mixtral(tiny_base, quantization="none", dtype="float32", train_embeddings=True)
    prompts = [
        make_prompt("passkey_en", tokenizer, length, depth, seed=seed)
        for length in (240, 300)
        for depth in (0.0, 1.0)
        for seed in (0, 1)
    ]
    overfit(model, prompts)
    result = evaluate_retrieval(model, tokenizer, **ASKED)
    assert bool((result.accuracy["passkey_en"] == 1.0).all())
    assert not result.accuracy["needle_zh"].any()
    for prompt in prompts:
        asked, answer = prompt.ids[: -prompt.answer_tokens], prompt.ids[-prompt.answer_tokens :]
        written = model.generate(input_ids=asked[None], max_new_tokens=prompt.answer_tokens, do_sample=False)
        assert torch.equal(written[0, len(asked) :], answer)


def overfit(model: Any, prompts: list[Prompt]) -> None:
    """Train everything that float32 holds, on the answers alone."""
    ids_BS = nn.utils.rnn.pad_sequence([prompt.ids for prompt in prompts], batch_first=True)
    labels_BS = torch.full_like(ids_BS, -100)
    for labels_S, (ids, answer) in zip(labels_BS, prompts, strict=True):
        labels_S[len(ids) - answer : len(ids)] = ids[-answer:]
    parameters = [parameter.requires_grad_() for parameter in model.parameters() if parameter.is_floating_point()]
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    for _ in range(200):
        loss_BS = model(input_ids=ids_BS, labels=labels_BS).nll
        if loss_BS.max() < math.log(2):  # then each answer's token is the most likely one
            return
        optimizer.zero_grad()
        loss_BS.sum().backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    raise AssertionError("the tiny model did not learn eight answers")
