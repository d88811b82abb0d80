"""A run of preference optimisation: what is divided by what, what is told, and what it learns."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_mixcn.callbacks import AdapterAverage
from lightning_mixcn.data import PretrainDataModule
from lightning_mixcn.metrics import SourcePairs, pair_figures, pair_sums, score_pairs
from lightning_mixcn.modules import PreferenceModule, WarmupCosine
from lightning_mixcn.modules.preference.losses import WITHOUT_REFERENCE, LossSettings, PreferenceLoss
from lightning_mixcn.testing import save_tiny_mixtral
from lightning_mixcn.text import Source
from tests.modules.preference import preference_run
from tests.modules.preference.preference_run import pairs, train
from tests.text.pair_files import pair_records, verdict_records, write_records

LOSSES: tuple[PreferenceLoss, ...] = ("dpo", "ipo", "orpo", "simpo", "kto")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_mixtral(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_records(tmp_path_factory.mktemp("pairs") / "zh.jsonl", pair_records(60))


def made_batch() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return losses of a model and of a reference, and two rows: two pairs and padding, one pair of another source."""
    documents = [[0, 0, 0, 1, 1, 2, 2, 2, 3, 3, -1], [0, 0, 0, 0, 1, 1, 1, 1, 1, -1, -1]]
    labels = [[-9, -9, 1, -9, 1, -9, 1, 1, -9, 1, -9], [-9, 1, 1, 1, -9, -9, -9, 1, 1, -9, -9]]
    sides = [[1, 1, 1, -1, -1, 1, 1, 1, -1, -1, 0], [1, 1, 1, 1, -1, -1, -1, -1, -1, 0, 0]]
    batch = {"document_ids": torch.tensor(documents), "sides": torch.tensor(sides)}
    batch["labels"] = torch.where(torch.tensor(labels) > 0, 5, -100)
    batch["source_ids"] = torch.tensor([0, 1])[:, None].expand(2, 11).clone()
    generator = torch.Generator().manual_seed(0)
    nll, reference = torch.rand(2, 2, 11, generator=generator) * 3 * (batch["labels"] >= 0)
    return nll, reference, batch


def by_hand(nll: Tensor, batch: dict[str, Tensor]) -> list[tuple[tuple[float, int], tuple[float, int]]]:
    """Return log-probability and tokens of each pair's answers."""
    found = []
    for row in range(2):
        for first in range(0, int(batch["document_ids"][row].max()), 2):
            sides = []
            for document in (first, first + 1):
                own = (batch["document_ids"][row] == document) & (batch["labels"][row] >= 0)
                sides.append((-float(nll[row].double()[own].sum()), int(own.sum())))
            found.append((sides[0], sides[1]))
    return found


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def smooth(margin: float) -> float:
    return -0.9 * math.log(sigmoid(margin)) - 0.1 * math.log(sigmoid(-margin))


def loss_by_hand(loss: str, pair: Any, reference: Any, *, good: bool, gap: float) -> float:
    """Write the papers' formulas for one pair, of numbers; β 0.4, smoothing 0.1 where there is one, γ 0.3, weight 2."""
    (chosen, chosen_tokens), (rejected, rejected_tokens) = pair
    ratio, other = chosen - reference[0][0], rejected - reference[1][0]
    mean, other_mean = chosen / chosen_tokens, rejected / rejected_tokens
    odds, other_odds = (math.exp(each) / (1 - math.exp(each)) for each in (mean, other_mean))
    formulas: dict[str, float] = {
        "dpo": smooth(0.4 * (ratio - other)),
        "ipo": (ratio / chosen_tokens - other / rejected_tokens - 1 / 0.8) ** 2,
        "simpo": smooth(0.4 * (mean - other_mean) - 0.3),
        "orpo": -mean - 0.4 * math.log(sigmoid(math.log(odds / other_odds))),
        "kto": 1 - sigmoid(0.4 * (ratio - gap)) if good else 2 * (1 - sigmoid(0.4 * (gap - ratio))),
    }
    return formulas[loss]


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_is_its_papers_formula(loss: PreferenceLoss) -> None:
    nll, reference, batch = made_batch()
    if loss == "kto":
        batch["sides"] = torch.where(batch["document_ids"] % 2 == 1, 0, batch["sides"])
        batch["sides"][1] = -batch["sides"][1]
    scores = score_pairs(nll, reference, batch)
    assert int(scores.is_pair.sum()) == 3
    smoothing = 0.1 if loss in ("dpo", "simpo") else 0.0
    settings = LossSettings(loss, 0.4, smoothing, margin=0.3, undesirable_weight=2.0)
    found = settings(scores, torch.tensor(0.7))[scores.is_pair]
    expected = [
        loss_by_hand(loss, pair, other, good=number < 2, gap=0.7)
        for number, (pair, other) in enumerate(zip(by_hand(nll, batch), by_hand(reference, batch), strict=True))
    ]
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


def test_figures_are_those_of_the_pairs() -> None:
    nll, reference, batch = made_batch()
    scores = score_pairs(nll, reference, batch)
    rewards = LossSettings("dpo", 0.4).rewards(scores)
    losses = LossSettings("dpo", 0.4)(scores, torch.zeros(()))
    hand, other = by_hand(nll, batch), by_hand(reference, batch)
    reward = [[0.4 * (pair[s][0] - ref[s][0]) for s in (0, 1)] for pair, ref in zip(hand, other, strict=True)]
    figures = pair_figures(pair_sums(scores, losses, rewards, torch.zeros(())))
    assert figures["accuracy"] == pytest.approx(sum(one > two for one, two in reward) / 3)
    assert figures["reward_margin"] == pytest.approx(sum(one - two for one, two in reward) / 3)
    assert figures["nll_chosen_nats_per_token"] == pytest.approx(
        -sum(pair[0][0] for pair in hand) / sum(pair[0][1] for pair in hand)
    )
    assert figures["answer_tokens_rejected"] == pytest.approx(sum(pair[1][1] for pair in hand) / 3)
    assert figures["pairs"] == 3
    leads = [pair[0][0] / pair[0][1] - pair[1][0] / pair[1][1] for pair in hand]
    assert figures["accuracy_by_likelihood"] == pytest.approx(sum(lead > 0 for lead in leads) / 3)
    assert figures["likelihood_margin_nats_per_token"] == pytest.approx(sum(leads) / 3)
    metric = SourcePairs(3)
    metric.update(scores, losses, rewards, torch.zeros(()))
    found = metric.compute()
    assert found.keys() == {0, 1}
    assert found[1]["reward_chosen"] == pytest.approx(reward[2][0])
    assert found[0]["preference_loss"] == pytest.approx(float(losses[scores.is_pair][:2].mean()))


def test_the_divergence_is_schulmans_k2_of_each_answers_tokens() -> None:
    """In float64, of the answers with a verdict alone; one batch or several, of other lengths, give the same."""
    nll, reference, batch = made_batch()
    batch["sides"] = torch.where((batch["document_ids"] == 1) & (batch["source_ids"] == 0), 0, batch["sides"])
    settings = LossSettings("dpo", 0.4)

    def figures(rows: list[slice], losses: Tensor | None) -> dict[int, dict[str, float]]:
        metric = SourcePairs(2)
        for row in rows:
            part = {name: tensor[row] for name, tensor in batch.items()}
            scores = score_pairs(nll[row], None if losses is None else losses[row], part)
            values = settings(scores, torch.zeros(())), settings.rewards(scores), torch.zeros(())
            metric.update(scores, *values)
        return metric.compute()

    found = figures([slice(0, 2)], reference)
    for side, name in ((1, "kl_chosen_nats_per_token"), (-1, "kl_rejected_nats_per_token")):
        for source in (0, 1):
            own = (batch["sides"] == side) & (batch["labels"] >= 0) & (batch["source_ids"] == source)
            ratios = [a - b for a, b in zip(nll[own].double().tolist(), reference[own].double().tolist(), strict=True)]
            expected = sum(ratio * ratio / 2 for ratio in ratios) / len(ratios)
            assert found[source][name] == pytest.approx(expected, rel=1e-6)
    apart = figures([slice(0, 1), slice(1, 2)], reference)
    assert apart == {source: pytest.approx(values, rel=1e-12) for source, values in found.items()}
    without = figures([slice(0, 2)], None)[0]
    assert not [name for name in without if name.startswith("kl_")]
    assert without.keys() == {name for name in found[0] if not name.startswith("kl_")}


def test_a_step_is_the_mean_over_its_pairs(base: str, file: str, tmp_path: Path) -> None:
    """Micro-batches have different numbers of pairs, and their losses are summed before they are divided."""
    module = preference_run.module(base, loss="simpo", router_aux_loss_coef=0.0)
    module.configure_model()
    data = pairs(base, file)
    data.setup("fit")
    rows, total, count = data.train_dataloader(), 0.0, 0
    assert module.model is not None
    for _, batch in zip(range(preference_run.ROWS), rows, strict=False):
        with torch.no_grad():
            loss, number = module.compute_loss(module.with_reference(batch), module(batch))
        total, count = total + float(loss), count + int(number)
    step = train(base, file, str(tmp_path), max_steps=1, loss="simpo", router_aux_loss_coef=0.0)["steps"][0]
    assert step["train/loss"] == pytest.approx(total / count, rel=1e-5)
    assert step["train/preference_loss"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_what_is_told(loss: PreferenceLoss, base: str, file: str, tmp_path: Path) -> None:
    records = write_records(tmp_path / "kto.jsonl", verdict_records(60)) if loss == "kto" else file
    end = train(base, records, str(tmp_path / "run"), loss=loss, max_steps=2)["end"]
    names = {"accuracy", "preference_loss", "reward_chosen", "reward_rejected", "reward_margin", "answer_tokens_chosen"}
    assert {f"train/{name}" for name in names} < end.keys()
    divergences = [end.get(f"train/kl_{side}_nats_per_token") for side in ("chosen", "rejected")]
    assert all(value is not None and value > 0 for value in divergences) == (loss not in WITHOUT_REFERENCE)
    if loss == "kto":  # the few held out have one verdict
        names = {"accuracy", "preference_loss"}
        assert "train/accuracy_by_likelihood" not in end  # the second answer belongs to another prompt
    else:
        names |= {"accuracy_by_likelihood", "likelihood_margin_nats_per_token"}
    assert {f"val/zh/{name}" for name in (*names, "bits_per_byte", "nll_nats_per_token")} < end.keys()
    assert all(math.isfinite(value) for value in end.values())


def test_validation_is_of_chosen_answers(base: str, file: str, tmp_path: Path) -> None:
    """So is that of the average, which is here the last step's values."""
    average = AdapterAverage(decay=None, start=2)
    figures = train(base, file, str(tmp_path), max_steps=2, callback=average)["end"]
    assert figures["val_average/zh/nll_nats_per_token"] == pytest.approx(figures["val/zh/nll_nats_per_token"], rel=1e-5)
    assert figures["val/zh/nll_nats_per_token"] == pytest.approx(figures["val/zh/nll_chosen_nats_per_token"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_64_pairs_are_learned_by_heart(loss: PreferenceLoss, base: str, tmp_path: Path) -> None:
    """What is better depends on the prompt, so that the pair must be learned and not a letter."""
    kinds = "甲乙丙" if loss == "kto" else "甲乙"  # of three, a mismatched answer is neither the good nor the bad one
    pairs_of = [(f"{n}?", kinds[n % len(kinds)] * 2, kinds[(n - 1) % len(kinds)] * 2) for n in range(64)]
    records: list[dict[str, Any]] = [
        {"prompt": prompt, "chosen": good, "rejected": bad} for prompt, good, bad in pairs_of
    ]
    if loss == "kto":
        records = [
            {"prompt": prompt, "completion": answer, "label": answer == good}
            for prompt, good, bad in pairs_of
            for answer in (good, bad)
        ]
    path = write_records(tmp_path / "pairs.jsonl", records)
    settings: dict[str, Any] = {"loss": loss, "router_aux_loss_coef": 0.0, "train_embeddings": True}
    steps = 150
    if loss == "kto":  # its gradient, of one answer beside a moving mean, is noisier
        steps, settings["lr_scheduler"] = 600, WarmupCosine
    module, run = preference_run.module(base, **settings), preference_run.Steps()
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, logger=False, enable_progress_bar=False, callbacks=[run],
        enable_model_summary=False, enable_checkpointing=False, default_root_dir=tmp_path, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module, pairs(base, path, micro_batch_size=4, val_fraction=0.0))
    last = run.figures[-10:]
    assert all(step["train/accuracy"] == 1.0 for step in last)
    margins = [sum(step["train/reward_margin"] for step in part) / 10 for part in (run.figures[40:50], last)]
    assert 0 < margins[0] < margins[1]


def test_what_does_not_fit_together_is_refused(base: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`label_smoothing=0.1`: `loss: ipo` has none. Leave it out, or use dpo"):
        PreferenceModule(base, loss="ipo", label_smoothing=0.1)
    with pytest.raises(ValueError, match=r"`loss='ppo'`: expected one of dpo, ipo, orpo, simpo, kto"):
        PreferenceModule(base, loss="ppo")  # type: ignore[arg-type]  # what a person may type
    with pytest.raises(ValueError, match=r"`beta=0`: expected more than 0"):
        PreferenceModule(base, beta=0)
    (tmp_path / "zh.txt").write_text("一个很长的文本。" * 50)
    data = PretrainDataModule(
        [Source("zh", str(tmp_path / "zh.txt"))], tokenizer=base, sequence_length=48, num_workers=0, val_fraction=0.0
    )
    trainer = Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, limit_val_batches=0,
    )  # fmt: skip
    with pytest.raises(ValueError, match="needs pairs of answers, got the data module PretrainDataModule"):
        trainer.fit(preference_run.module(base), data)
