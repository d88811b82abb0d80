"""Every path with factors for some experts only, against dense float64 autograd in which the others' are zeros."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import Tensor

from lightning_mixcn.errors import UserError
from lightning_mixcn.model import build_moe
from lightning_mixcn.model.experts.loop import Dropout, ExpertFactors
from lightning_mixcn.model.experts.path import PATHS, choose_expert_path
from lightning_mixcn.model.inference.generation import prepare_for_generation
from lightning_mixcn.testing import tiny_config
from tests.model.experts.test_block import (
    BFLOAT16,
    FLOAT32,
    HIDDEN,
    NAMES,
    drawn_masks,
    keyed_masks,
    make_inputs,
    make_weights,
    needs_interpreter,
    reference,
    relative_error,
)

TOKENS, EXPERTS, TOP_K = 31, 6, 2
SLOTS = {1: 0, 4: 1}


def check(
    path: str, quantization: str, precision: tuple[torch.dtype, float], probability: float, device: str = "cpu"
) -> None:
    dtype, tolerance = precision
    torch.manual_seed(0)
    weights = make_weights(EXPERTS, quantization, dtype, device)
    inputs = make_inputs(TOKENS, EXPERTS, TOP_K, dtype, device)
    chosen = [value.detach()[list(SLOTS)].clone().requires_grad_() for value in inputs[2:]]
    index = torch.rand(TOKENS, EXPERTS, device=device).topk(TOP_K).indices
    dropout, upstream = Dropout(probability, seed=7), torch.randn(TOKENS, HIDDEN).to(device, dtype)
    y = PATHS[path](inputs[0], index, inputs[1], weights, dropout, *chosen, SLOTS)
    y.backward(upstream)
    exact = [value.detach().double() for value in inputs]
    for factor in exact[2:]:
        factor[[expert for expert in range(EXPERTS) if expert not in SLOTS]] = 0
    for value in exact:
        value.requires_grad_()
    masks = (keyed_masks if path == "fused" else drawn_masks)(dropout, TOKENS)
    expected = reference(exact, index, weights, masks, path == "loop" and dtype != torch.float32)
    expected.backward(upstream.double())
    assert relative_error(y, expected) <= tolerance, "output"
    for name, value, truth in zip(NAMES, [*inputs[:2], *chosen], exact, strict=True):
        assert value.grad is not None
        assert truth.grad is not None
        wanted = truth.grad if value.shape == truth.shape else truth.grad[list(SLOTS)]
        assert relative_error(value.grad, wanted) <= tolerance, name


@pytest.mark.parametrize("probability", [0.0, 0.3])
@pytest.mark.parametrize(
    ("path", "quantization", "precision"),
    [
        ("loop", "none", FLOAT32),
        ("loop", "nf4", BFLOAT16),
        ("fused", "nf4", FLOAT32),
        ("fused", "none", FLOAT32),
    ],
)
def test_gradients_equal_dense_float64(
    path: str, quantization: str, precision: tuple[torch.dtype, float], probability: float
) -> None:
    if path == "fused":
        needs_interpreter()
    check(path, quantization, precision, probability)


@pytest.mark.gpu
@pytest.mark.parametrize("path", ["loop", "fused"])
@pytest.mark.parametrize("probability", [0.0, 0.3])
def test_gradients_on_a_gpu(path: str, probability: float) -> None:
    check(path, "nf4", BFLOAT16, probability, "cuda")


@pytest.mark.parametrize("path", ["grouped", "decode"])
def test_a_path_of_all_experts_is_refused(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXCN_EXPERT_PATH", path)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr("lightning_mixcn.model.experts.path.has_triton", lambda: True)
    weights, inputs = make_weights(2, "none", torch.float32), make_inputs(3, 1, 1, torch.float32)
    x, b_gate = inputs[0], inputs[3]
    operands = x, torch.zeros(3, 1, dtype=torch.int64), weights
    with pytest.raises(UserError, match=f"`MIXCN_EXPERT_PATH={path}` cannot run here: .* `train_only` chooses some"):
        choose_expert_path(*operands, ExpertFactors(None, b_gate, None, None, None, {1: 0}))
    assert choose_expert_path(*operands, ExpertFactors(None, None, None, None, None, {0: 0, 1: 1})) == path


class CountedProducts(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts multiply-adds of the products that have LoRA's rank, a size that nothing else has."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.operations: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            left, right = args[-2:]
            if self.rank in (*left.shape, *right.shape):
                self.operations += left.shape[0] * left.shape[1] * right.shape[1]
        return func(*args, **(kwargs or {}))


def lora_operations(train_only: Any) -> int:
    """Return the multiply-adds of a layer's expert LoRA, forward and backward, each expert with as many rows."""
    rank = 7
    model: Any = build_moe(
        tiny_config("mixtral"), quantization="none", dtype="float32",
        lora=LoraConfig(r=rank, target_modules=["w2"]), train_only=train_only,
    )  # fmt: skip
    experts = model.get_base_model().model.layers[0].mlp.experts.train()
    x, index = torch.randn(16, 32, requires_grad=True), (torch.arange(32) % 4).view(16, 2)
    with CountedProducts(rank) as counted:
        experts(x, index, torch.full((16, 2), 0.5)).sum().backward()
    operations: int = counted.operations
    return operations


def test_rows_without_factors_take_no_products() -> None:
    assert lora_operations({"experts": [0, 3]}) * 2 == lora_operations(None) > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_kernel_for_few_rows(dtype: str) -> None:
    """Generation after `prepare_for_generation` gives what a block without its kernel gives."""
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules=["w1", "w2", "w3"])
    config = tiny_config("mixtral", hidden_size=64, intermediate_size=64)
    model: Any = build_moe(config, dtype=dtype, lora=lora, train_only={"experts": [1, 3]})
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.2)
    ids = torch.arange(3, 8)[None]
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
        if not prepare_for_generation(model):
            pytest.skip("this CPU has no bfloat16 instructions")
        assert relative_error(model(input_ids=ids).logits, expected.double()) < BFLOAT16[1]


def test_a_merged_stack_is_the_split_one() -> None:
    lora = LoraConfig(r=4, target_modules=["w1", "w2", "w3", "gate", "q_proj"])
    model: Any = build_moe(
        tiny_config("mixtral"), quantization="none", dtype="float32", lora=lora,
        train_only={"experts": {"1": [0, 3]}, "attention": False},
    )  # fmt: skip
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.2)
    ids: Tensor = torch.arange(3, 20)[None]
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
        merged = model.merge_and_unload()(input_ids=ids).logits
    torch.testing.assert_close(F.log_softmax(merged, -1), F.log_softmax(expected, -1), rtol=1e-4, atol=1e-4)
