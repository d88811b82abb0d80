"""Every strategy, by real processes, against one process: the same losses, adapters and frozen base.

Over gloo on CPUs, and over NCCL where there are GPUs.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_mixcn.testing import run_distributed, save_tiny_mixtral, save_tiny_model
from tests.modules import strategy_run

pytestmark = pytest.mark.multiprocess
STORIES = Path(__file__).parents[3] / "shared/data/models/stories260K-mixtral-4e"
RUNS = {1: ["one"], 2: ["ddp", "fsdp", "plain"], 4: ["fsdp2", "hsdp"]}


def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    wide = save_tiny_mixtral(
        tmp_path_factory.mktemp("wide"), hidden_size=128, intermediate_size=192, num_local_experts=8, head_dim=32
    )
    return {"wide": str(wide), "stories": str(STORIES)}


@pytest.fixture(scope="module", params=[("wide", 8), pytest.param(("stories", 20), marks=pytest.mark.slow)])
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Return the results of every rank by strategy and number of ranks."""
    kind, steps = request.param
    if kind == "stories" and not STORIES.is_dir():
        pytest.skip("needs the shared model stories260K-mixtral-4e")
    base, found = bases(tmp_path_factory)[kind], {}
    train = partial(strategy_run.train, max_steps=steps)
    for ranks, names in RUNS.items():
        of_ranks = run_distributed(train, ranks, names, base, str(tmp_path_factory.mktemp("runs")))
        for name in names:
            found[f"{name} {ranks}"] = [of_rank[name] for of_rank in of_ranks]
    return found


OTHERS = [f"{name} {ranks}" for ranks, names in RUNS.items() for name in names if ranks > 1]


@pytest.mark.parametrize("name", OTHERS)
def test_ranks_train_as_one_does(runs: dict[str, list[dict[str, Any]]], name: str) -> None:
    (one,), ranks = runs["one 1"], runs[name]
    assert len(one["losses"]) >= 8
    for rank in ranks:
        check_equal(rank, one)


def check_equal(rank: dict[str, Any], one: dict[str, Any]) -> None:
    """Compare the results of a rank with those of one process."""
    assert rank["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert rank["base"] == one["base"]
    assert rank["adapter"].keys() == one["adapter"].keys()
    for key, expected in one["adapter"].items():
        error = torch.linalg.norm(rank["adapter"][key] - expected)
        assert error <= 1e-4 * torch.linalg.norm(expected), key


@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe"])
def test_another_family_trains_sharded_as_whole(family: str, tmp_path: Path) -> None:
    """With more experts than a rank's tokens reach, eight a token."""
    sizes = {"num_experts": 24, "num_experts_per_tok": 8, "hidden_size": 64}
    base, train = str(save_tiny_model(tmp_path / "base", family, **sizes)), partial(strategy_run.train, max_steps=3)
    (one,) = run_distributed(train, 1, ["one"], base, str(tmp_path))
    for ranks in (2, 4):
        for of_rank in run_distributed(train, ranks, ["fsdp2"], base, str(tmp_path / str(ranks))):
            check_equal(of_rank["fsdp2"], one["one"])


@pytest.mark.parametrize("name", OTHERS)
def test_tokens_of_all_ranks_are_counted(runs: dict[str, list[dict[str, Any]]], name: str) -> None:
    assert runs[name][0]["experts"] == runs["one 1"][0]["experts"]
    assert runs[name][0]["experts"].count("\n") > 1


def test_some_expert_is_unreached_on_some_rank(runs: dict[str, list[dict[str, Any]]]) -> None:
    of_ranks = [rank["reached"] for rank in runs["fsdp2 4"]]
    everywhere = [set.intersection(*layer) for layer in zip(*of_ranks, strict=True)]
    anywhere = [set.union(*layer) for layer in zip(*of_ranks, strict=True)]
    assert everywhere != anywhere


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a file of documents of many lengths."""
    lines = [json.dumps({"text": f"{number} " * (number % 17)}) for number in range(900)]
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


# Quick ones are test_a_strategy_resumes_what_another_saved and test_learning_rates.py's.
@pytest.mark.slow
def test_resuming_on_other_numbers_of_ranks(tmp_path: Path, tiny_base: Path, text: str) -> None:
    """Saved on 4 ranks, resumed on 2, on 1 and on 4 again: the losses, and so the rows, of the uninterrupted run."""
    common: tuple[Any, ...] = (str(tiny_base), str(tmp_path))

    def losses(ranks: int, max_steps: int, ckpt_path: str | None, checkpoints: str | None) -> list[float]:
        train = partial(
            strategy_run.train, path=text, max_steps=max_steps, ckpt_path=ckpt_path, checkpoints=checkpoints
        )
        found: list[float] = run_distributed(train, ranks, ["fsdp2"], *common)[0]["fsdp2"]["losses"]
        return found

    expected, parts, folder = losses(1, 8, None, None), list[float](), tmp_path / "checkpoints"
    for ranks, until in ((4, 2), (2, 4), (1, 6), (4, 8)):
        newest = str(folder / f"step={until - 2:08d}.ckpt") if until > 2 else None
        parts += losses(ranks, until, newest, str(folder))
    assert len(parts) == 8
    assert parts == pytest.approx(expected, rel=1e-5)


@pytest.fixture(scope="module")
def whole_losses(tiny_base: Path, text: str, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Return the losses of an uninterrupted run."""
    train = partial(strategy_run.train, path=text)
    (whole,) = run_distributed(train, 1, ["one"], str(tiny_base), str(tmp_path_factory.mktemp("whole")))
    losses: list[float] = whole["one"]["losses"]
    return losses


@pytest.mark.parametrize("checkpoint", ["fsdp2", "ddp", "one file"])
def test_a_strategy_resumes_what_another_saved(
    tmp_path: Path, tiny_base: Path, text: str, whole_losses: list[float], checkpoint: str
) -> None:
    """A folder of shares is for FSDP2 alone; one file is for every strategy."""
    common: tuple[Any, ...] = (str(tiny_base), str(tmp_path))
    folder = str(tmp_path / "checkpoints")
    train = partial(strategy_run.train, path=text)
    run_distributed(partial(train, max_steps=4, checkpoints=folder), 2, [checkpoint], *common)
    resume = partial(train, ckpt_path=f"{folder}/step=00000004.ckpt")
    readers = ["fsdp2"] if checkpoint == "fsdp2" else ["ddp", "fsdp2"]
    (resumed, _) = run_distributed(resume, 2, readers, *common)
    for name in readers:
        assert resumed[name]["losses"] == pytest.approx(whole_losses[4:], rel=1e-5), name


def test_each_rank_holds_its_share_of_the_bytes(tmp_path: Path) -> None:
    """Every quantised weight has 64 superblocks or more; loading on ranks gives the bits that one rank gives."""
    sizes = {"hidden_size": 1024, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 8}
    base = str(save_tiny_mixtral(tmp_path / "base", head_dim=128, **sizes))
    (((one,)),) = run_distributed(strategy_run.shares, 1, base, [(1,)])
    for ranks, meshes in ((2, [(2,)]), (4, [(4,), (2, 2)])):
        for of_rank in run_distributed(strategy_run.shares, ranks, base, meshes):
            for mesh, found in zip(meshes, of_rank, strict=True):
                assert found["bytes"] == pytest.approx(one["bytes"] / mesh[-1], rel=0.03)
                assert found["base"] == one["base"]
                assert found["adapter"] == one["adapter"]


# gloo shows on a CPU that the bodies of the following tests are right.
ONE_RANK = [pytest.param("gloo", marks=pytest.mark.slow), pytest.param("nccl", marks=pytest.mark.gpu)]
TWO_RANKS = [pytest.param("gloo", marks=pytest.mark.slow), pytest.param("nccl", marks=pytest.mark.multigpu)]


def train(backend: Any, ranks: int, name: str, base: Path, out: Path, **changes: Any) -> list[dict[str, Any]]:
    """Return each rank's results."""
    run = partial(strategy_run.train, **changes)
    found = run_distributed(run, ranks, [name], str(base), str(out / f"{name} {ranks}"), backend=backend)
    return [of_rank[name] for of_rank in found]


def compare(rank: dict[str, Any], one: dict[str, Any]) -> None:
    """Compare up to float32, whose sums have no fixed order on a GPU, over a few steps of AdamW."""
    assert rank["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert rank["base"] == one["base"]
    assert rank["adapter"].keys() == one["adapter"].keys()
    for key, expected in one["adapter"].items():
        assert torch.linalg.norm(rank["adapter"][key] - expected) <= 1e-2 * torch.linalg.norm(expected), key


@pytest.mark.parametrize("backend", ONE_RANK)
def test_fsdp2_with_one_gpu(backend: str, tiny_base: Path, tmp_path: Path) -> None:
    (one,), (alone,) = (train(backend, 1, name, tiny_base, tmp_path, max_steps=4) for name in ("one", "fsdp2"))
    compare(alone, one)


@pytest.mark.parametrize("backend", TWO_RANKS)
@pytest.mark.parametrize("name", ["ddp", "fsdp2", "hsdp", "plain"])
def test_gpus_train_as_one_does(name: str, backend: str, tiny_base: Path, tmp_path: Path) -> None:
    (one,) = train(backend, 1, "one", tiny_base, tmp_path, max_steps=4)
    for rank in train(backend, 2, name, tiny_base, tmp_path, max_steps=4):
        compare(rank, one)


@pytest.mark.parametrize("backend", TWO_RANKS)
def test_resuming_on_another_number_of_gpus(backend: str, tiny_base: Path, tmp_path: Path) -> None:
    """Saved on 2 ranks, resumed on 1: the losses, and so the rows, of the uninterrupted run."""
    lines = [json.dumps({"text": f"{number} " * (number % 17)}) for number in range(900)]
    text, folder, losses = tmp_path / "text.jsonl", str(tmp_path / "checkpoints"), list[float]()
    text.write_text("\n".join(lines), encoding="utf-8")
    (whole,) = train(backend, 1, "one", tiny_base, tmp_path, max_steps=4, path=str(text))
    for ranks, until, newest in ((2, 2, None), (1, 4, f"{folder}/step=00000002.ckpt")):
        changes = {"max_steps": until, "ckpt_path": newest, "checkpoints": folder, "path": str(text)}
        losses += train(backend, ranks, "fsdp2", tiny_base, tmp_path, **changes)[0]["losses"]
    assert losses == pytest.approx(whole["losses"], rel=1e-4)
