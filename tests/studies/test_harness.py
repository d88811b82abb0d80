"""Our model in the harness's hands, on one rank and on two."""

from pathlib import Path

import pytest
import torch

from lightning_mixcn.model import load_moe
from lightning_mixcn.testing import run_distributed, save_tiny_model
from lightning_mixcn.text import load_tokenizer
from tests.studies.benchmark_data import HARNESS_WARNINGS, harness

pytestmark = pytest.mark.filterwarnings(HARNESS_WARNINGS)


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen3_moe"])
def test_likelihoods_are_the_model_s_own(family: str, tmp_path: Path) -> None:
    harness()
    from tests.studies.benchmarks.harness_ranks import REQUESTS, answers_of

    base = save_tiny_model(tmp_path / "base", family)
    likelihoods, continuations, _ = answers_of(str(base), sharded=False)
    model = load_moe(base, quantization="nf4", dtype="float32").eval()
    tokenizer = load_tokenizer(base)
    for (context, continuation), (likelihood, _), text in zip(REQUESTS, likelihoods, continuations, strict=True):
        # The harness puts BOS where the tokenizer puts it.
        prompt, ids = (
            [*tokenizer.begin_ids, *tokenizer.encode_batch([written])[0]]
            for written in (context, context + continuation)
        )
        labels = torch.tensor([[-100] * len(prompt) + ids[len(prompt) :]])
        with torch.no_grad():
            nll = model(input_ids=torch.tensor([ids]), labels=labels).nll.sum()
            made = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert likelihood == pytest.approx(-float(nll), rel=1e-5)
        expected = tokenizer.decode(made[0, len(prompt) :].tolist())
        assert text == expected.split("#")[0]


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    "sharded", [pytest.param(False, id="whole", marks=pytest.mark.slow), pytest.param(True, id="fsdp2")]
)
def test_two_ranks_give_what_one_gives(tiny_base: Path, sharded: bool) -> None:
    harness()
    from tests.studies.benchmarks.harness_ranks import answers_of

    likelihoods, continuations, forwards = answers_of(str(tiny_base), sharded=False)
    for found in run_distributed(answers_of, 2, str(tiny_base), sharded):
        assert [value for value, _ in found[0]] == pytest.approx([value for value, _ in likelihoods], rel=1e-4)
        assert [greedy for _, greedy in found[0]] == [greedy for _, greedy in likelihoods]
        assert found[1] == continuations
        assert found[2] == forwards
