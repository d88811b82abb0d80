"""KL to the base: against a dense computation in float64, under every way to train, and what it costs."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.func import functional_call

from lightning_mixcn import PretrainModule
from lightning_mixcn.model import head
from lightning_mixcn.model.causal_lm import base_of
from lightning_mixcn.model.experts.observe import observe_routing
from lightning_mixcn.model.kl_to_base import KLToBase
from lightning_mixcn.modules import InstructModule
from lightning_mixcn.testing import FixedBatches, random_batch, run_distributed
from tests.modules import strategy_run

Make = Callable[..., Any]
GIVEN: KLToBase = {"sources": ["en"], "coefficient": 0.7}


def uneven() -> list[dict[str, Tensor]]:
    """Three micro-batches: rows of zh and en in turn, zh alone with its sources by row, and short ones."""
    made = [random_batch(lengths, seed=s, sources=2) for s, lengths in enumerate([[24, 17, 9], [5], [2, 24]])]
    made[1]["source_ids"] = torch.zeros(1, dtype=torch.int16)
    return made


class Passes(Callback):
    """Counts the decoder's passes: rows of each, and whether gradients are kept."""

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.rows: list[tuple[int, bool]] = []
        self.start = {name: value.clone() for name, value in pl_module.state_dict().items()}
        self.logged: dict[str, float] = {}
        self.routed: list[int] = []
        base_of(pl_module.model).model.register_forward_pre_hook(self._count)
        observe_routing(pl_module.model, lambda layer, logits, *_: self.routed.append(len(logits)))

    def _count(self, _module: Any, inputs: tuple[Any, ...]) -> None:
        self.rows.append((len(inputs[0]), torch.is_grad_enabled()))

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.logged = {name: float(value) for name, value in trainer.logged_metrics.items()}


@pytest.fixture
def fit(tiny_base: Path, lora: Make, trainer: Make) -> Make:
    def make(kind: Any = PretrainModule, batches: Any = None, steps: int = 1, **changes: Any) -> tuple[Any, Passes]:
        settings: dict[str, Any] = {
            "quantization": "none", "dtype": "float32", "router_aux_loss_coef": 0.0, "kl_to_base": GIVEN,
            "lora": lora(init_lora_weights=False, target_modules=["q_proj", "v_proj"]),
            "optimizer": partial(torch.optim.SGD, lr=1.0),
            "lr_scheduler": partial(torch.optim.lr_scheduler.ConstantLR, factor=1.0),
        }  # fmt: skip
        batches, passes = batches or uneven(), Passes()
        run = trainer(
            max_steps=steps, max_epochs=steps, accumulate_grad_batches=len(batches), callbacks=[passes],
            num_sanity_val_steps=0, log_every_n_steps=1,
        )  # fmt: skip
        module = kind(str(tiny_base), **(settings | changes))
        run.fit(module, FixedBatches(batches, ["zh", "en"]))
        return module, passes

    return make


def dense(base: Path, start: dict[str, Tensor], coefficient: float) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return loss, KL per compared token, and the loss's gradients, of transformers' model in float64."""
    stock: Any = transformers.MixtralForCausalLM.from_pretrained(
        base, dtype=torch.float64, experts_implementation="eager"
    ).eval()
    factors = {name: value.double().requires_grad_() for name, value in start.items()}
    weights = {}
    for name in factors:
        if "lora_A" in name:
            place = name.removeprefix("model.base_model.model.").partition(".lora_A")[0]
            b = factors[name.replace("lora_A", "lora_B")]
            weights[f"{place}.weight"] = stock.get_parameter(f"{place}.weight") + 2.0 * b @ factors[name]
    nats, kl, labels, compared = 0.0, torch.zeros((), dtype=torch.float64), 0, 0
    for batch in uneven():
        mask, ids = (batch["document_ids"] >= 0).long(), batch["input_ids"]
        log_q = functional_call(stock, weights, (ids, mask)).logits[:, :-1].log_softmax(-1)
        with torch.no_grad():
            log_p = stock(ids, mask).logits[:, :-1].log_softmax(-1)
        target = batch["labels"][:, 1:]
        scored = target != -100
        nats = nats - (log_q.gather(2, target.clamp_min(0)[..., None])[..., 0] * scored).sum()
        source = batch["source_ids"].view(len(ids), -1).expand_as(ids)[:, 1:]
        chosen = scored & (source == 1)
        kl = kl + ((log_p.exp() * (log_p - log_q)).sum(-1) * chosen).sum()
        labels, compared = labels + int(scored.sum()), compared + int(chosen.sum())
    loss = (nats + coefficient * kl) / labels
    return (
        loss.detach(),
        kl.detach() / compared,
        dict(zip(factors, torch.autograd.grad(loss, list(factors.values())), strict=True)),
    )


@pytest.mark.parametrize("mode", ["none", "selective", "full", "offload"])
def test_value_and_gradient_are_those_of_a_dense_computation(mode: str, fit: Make, tiny_base: Path) -> None:
    module, passes = fit(activation_checkpointing=mode)
    loss, kl, gradients = dense(tiny_base, passes.start, 0.7)
    assert float(kl) > 0.01
    assert passes.logged["train/loss"] == pytest.approx(float(loss), rel=1e-5)
    assert passes.logged["train/kl_to_base_nats_per_token"] == pytest.approx(float(kl), rel=1e-4)
    without = dense(tiny_base, passes.start, 0.0)[2]
    for name, value in module.state_dict().items():
        update = passes.start[name] - value
        error, effect = (torch.linalg.norm(gradients[name] - other) for other in (update, without[name]))
        assert error < 1e-4 * torch.linalg.norm(gradients[name]), name
        assert effect > 100 * error, name


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "_CHUNK_LOGITS", {"cpu": 1})  # 64 positions of the loss, 16 of the divergence


@pytest.mark.parametrize("positions", [0, 1, 16, 53])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_chunks_of_the_head(positions: int, dtype: torch.dtype, tolerance: float, small_chunks: None) -> None:
    torch.manual_seed(0)
    layer = head.Head(32, 199, bias=False).requires_grad_(False)
    hidden, other = (torch.randn(positions, 32, dtype=dtype) for _ in range(2))
    hidden.requires_grad_()
    weights = torch.rand(positions)
    kl = layer(hidden, reference=other)
    assert kl.dtype == torch.float32
    (kl * weights).sum().backward()
    ours = hidden.detach().double().requires_grad_()
    matrix = layer.weight.to(dtype).double()
    log_q, log_p = ((states @ matrix.t()).log_softmax(-1) for states in (ours, other.double()))
    expected = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    (expected * weights.double()).sum().backward()
    torch.testing.assert_close(kl.double(), expected.detach(), rtol=tolerance, atol=tolerance)
    assert hidden.grad is not None
    assert ours.grad is not None
    torch.testing.assert_close(hidden.grad.double(), ours.grad, rtol=tolerance, atol=tolerance * 0.1)


def test_only_rows_of_the_sources_run_again_and_unobserved(fit: Make) -> None:
    _, passes = fit()
    # The second of three rows, none, and the second of two; the base's pass comes before the model's.
    assert passes.rows == [(1, False), (3, True), (1, True), (1, False), (2, True)]
    assert passes.routed == [3 * 24] * 2 + [24] * 2 + [2 * 24] * 2


@pytest.mark.parametrize("given", [None, {"sources": ["en"], "coefficient": 0.0}])
def test_a_coefficient_of_zero_costs_nothing(given: Any, fit: Make) -> None:
    _, passes = fit(kl_to_base=given)
    assert passes.rows == [(3, True), (1, True), (2, True)]
    assert "train/kl_to_base_nats_per_token" not in passes.logged


def test_dropout_and_the_auxiliary_loss_are_as_without(fit: Make, lora: Make) -> None:
    """A new adapter is the base: with dropout in the model's pass and none in the base's, and the same masks."""
    settings = {"router_aux_loss_coef": 0.02, "lora": lora(lora_dropout=0.5)}
    runs = [fit(kl_to_base=given, **settings) for given in (None, GIVEN)]
    (plain, without), (kept, given) = runs
    assert given.logged.pop("train/kl_to_base_nats_per_token") == pytest.approx(0.0, abs=1e-6)
    assert given.logged == pytest.approx(without.logged, rel=1e-6)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(kept.state_dict()[name], value, rtol=1e-4, atol=1e-6)
    assert all(module.training for module in kept.model.modules())


def test_conversations_weigh_it_as_they_weigh_their_loss(fit: Make) -> None:
    batches = [random_batch([9, 9], seed=3, sources=2), random_batch([9, 9], seed=4, sources=2)]
    ends = [fit(InstructModule, batches, loss_weighting=how) for how in ("token", "conversation")]
    (_, tokens), (_, conversations) = ends
    assert conversations.logged == pytest.approx(tokens.logged, rel=1e-5)
    assert tokens.logged["train/loss"] > tokens.logged["train/nll_nats_per_token"] + 0.001


@pytest.mark.multiprocess
def test_two_ranks_do_what_one_does(tmp_path: Path, tiny_base: Path) -> None:
    """Every third row is compared, so that often one rank has such rows and the other has none."""
    train: Any = partial(strategy_run.train, kl_to_base={"sources": ["en"], "coefficient": 5.0}, max_steps=3,
                         sources=("zh", "de", "en"))  # fmt: skip
    common = str(tiny_base), str(tmp_path / "out")
    (one,) = run_distributed(train, 1, ["one"], *common)
    names = ["ddp", "fsdp2"]
    two = run_distributed(train, 2, names, *common)
    expected = one["one"]
    for name in names:
        for found in (of_rank[name] for of_rank in two):
            assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
            assert found["experts"] in (None, expected["experts"])
            for factor, value in expected["adapter"].items():
                error = torch.linalg.norm(found["adapter"][factor] - value)
                assert error <= 1e-4 * torch.linalg.norm(value), factor


@pytest.mark.multiprocess
def test_resuming_on_another_number_of_ranks(tmp_path: Path, tiny_base: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"{row} " * (row % 17)}) for row in range(900)), encoding="utf-8")
    train: Any = partial(
        strategy_run.train, path=str(text), kl_to_base={"sources": ["zh"], "coefficient": 5.0}, max_steps=3
    )
    common, folder = (str(tiny_base), str(tmp_path / "out")), tmp_path / "checkpoints"
    (whole,) = run_distributed(train, 1, ["one"], *common)
    run_distributed(partial(train, max_steps=2, checkpoints=str(folder)), 2, ["fsdp2"], *common)
    (resumed,) = run_distributed(partial(train, ckpt_path=str(folder / "step=00000002.ckpt")), 1, ["fsdp2"], *common)
    assert resumed["fsdp2"]["losses"] == pytest.approx(whole["one"]["losses"][2:], rel=1e-5)
    for factor, value in whole["one"]["adapter"].items():
        error = torch.linalg.norm(resumed["fsdp2"]["adapter"][factor] - value)
        assert error <= 1e-4 * torch.linalg.norm(value), factor


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sources": [], "coefficient": 0.1}, r"kl_to_base\['sources'\]=\[\]`: expected the name of at least one"),
        ({"sources": ["en"], "coefficient": -1.0}, r"\['coefficient'\]=-1\.0`: expected at least 0"),
        ({"sources": ["en"], "coefficient": float("nan")}, r"\['coefficient'\]=nan`: expected a finite number"),
        ({"sources": ["en"]}, "`kl_to_base=.*: expected a mapping of sources, coefficient"),
        ({"sources": ["en"], "coefficient": 0.1, "weight": 1}, "expected a mapping of sources, coefficient"),
        (0.1, "`kl_to_base=0.1`: expected a mapping of sources, coefficient"),
    ],
)
def test_values_are_checked_before_anything_is_loaded(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PretrainModule("nowhere", kl_to_base=given)


def test_trained_embeddings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`train_embeddings: true` trains the base's own.*Leave one of them out"):
        PretrainModule("nowhere", kl_to_base=GIVEN, train_embeddings=True)


def test_a_source_that_is_not_there_is_refused(fit: Make) -> None:
    with pytest.raises(
        ValueError, match=r"sources\[0\]='eng'` is no source \(did you mean 'en'\?\)\. The data have zh, en"
    ):
        fit(kl_to_base={"sources": ["eng"], "coefficient": 0.1})
