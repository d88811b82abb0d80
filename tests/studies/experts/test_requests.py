"""Log-likelihoods of choices without each expert, against stock transformers without the expert's weights."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_mixcn.model import load_mixtral, load_moe
from lightning_mixcn.studies.experts.disabling import MODES
from lightning_mixcn.studies.experts.requests import Request, RequestScores, request_rows
from lightning_mixcn.testing import save_tiny_model
from tests.studies.experts.stock_experts import stock_model, without_expert

LONGEST = 12


def requests() -> list[Request]:
    """Four letters behind one prompt, endings of several tokens, and a prompt that is too long."""
    draw = np.random.default_rng(0)

    def ids(count: int) -> list[int]:
        return [int(number) for number in draw.integers(3, 250, count)]

    prompt, other = ids(7), ids(5)
    letters = [(prompt, [letter]) for letter in ids(4)]
    return [
        *letters,
        (other, ids(3)),
        (other, ids(6)),
        (ids(20), ids(2)),
        (ids(1), ids(1)),
        (prompt[:6], [prompt[6], 9]),
    ]


def by_stock(model: Any, request: Request) -> float:
    """Score the continuation in the last tokens that the model can read."""
    context, continuation = request
    ids = torch.tensor([*context, *continuation][-(LONGEST + 1) :])
    with torch.no_grad():
        likelihoods = model(ids[None, :-1]).logits[0].double().log_softmax(-1)
    count = len(continuation)
    return float(likelihoods[-count:].gather(1, ids[-count:, None]).sum())


def test_rows_are_shared_and_cut() -> None:
    asked = requests()
    rows = request_rows(asked, LONGEST)
    assert [len(row.requests) for row in rows] == [5, 1, 1, 1, 1]
    assert max(len(row.ids) for row in rows) == LONGEST


@pytest.mark.parametrize(("family", "rows"), [("mixtral", 1), ("mixtral", 4), ("olmoe", 4), ("qwen3_moe", 4)])
def test_every_choice_is_as_in_the_whole_model(family: str, rows: int, tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path, family, initializer_range=0.25, num_hidden_layers=3)
    model = load_moe(base, quantization="none", dtype="float32").eval()
    stock, asked = stock_model(base), requests()
    scores = RequestScores(model, MODES, asked, LONGEST, rows)
    assert scores.prompts_cut == 1
    before = [by_stock(stock, request) for request in asked]
    seen = 0
    for number in range(len(scores)):
        evaluated = scores.evaluate(number)
        numbers = evaluated["request"]
        np.testing.assert_allclose(evaluated["scores"], [before[place] for place in numbers], atol=2e-5)
        for layer, part in scores.disable(number, evaluated, range(3)):
            for variant, found in enumerate(part["scores"]):
                changed = without_expert(stock, layer, variant % 4, MODES[variant // 4])
                np.testing.assert_allclose(found, [by_stock(changed, asked[place]) for place in numbers], atol=2e-5)
                seen += len(numbers)
    assert seen == len(asked) * 3 * 8


def test_a_likelihood_that_is_not_finite_is_an_error(routed_base: Path) -> None:
    model: Any = load_mixtral(routed_base, quantization="none", dtype="float32").eval()
    scores = RequestScores(model, ["zero"], requests(), LONGEST, 9)
    evaluated = scores.evaluate(0)
    model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="without an expert of layer 1 is not finite"):
        dict(scores.disable(0, evaluated, [1]))
    with pytest.raises(FloatingPointError, match="unchanged model is not finite"):
        scores.evaluate(0)
