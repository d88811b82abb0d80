"""Generation on a GPU: bitsandbytes' product of a few rows with 4-bit weights, scales and factors made ready once.

On the CPU bitsandbytes computes the same operation by decoding the matrix, so that codes, scales and their places are
compared here, too.
"""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from lightning_mixcn.model import load_mixtral
from lightning_mixcn.model.inference import generation
from lightning_mixcn.model.inference.generation import PrefixCache, prepare_for_generation, stream_tokens
from lightning_mixcn.model.inference.sampling import Sampling
from lightning_mixcn.model.lora.attach import LoraFrozenLinear, lora_layers
from lightning_mixcn.model.nf4 import codec
from lightning_mixcn.model.nf4.storage import GEMV_ROWS, GemmStack, NF4Weight, few_rows_kernel
from lightning_mixcn.testing import save_tiny_mixtral

# Matrices that begin inside a superblock, and end inside one.
SHAPE = (3, 96, 192)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def weight_of(shape: tuple[int, int, int], device: str) -> NF4Weight:
    weight = NF4Weight(shape, device)
    weight.write(0, torch.randn(shape, generator=torch.Generator().manual_seed(0)).flatten())
    return weight


def rows(count: int, columns: int, device: str) -> Tensor:
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(count)).bfloat16().to(device)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    return save_tiny_mixtral(tmp_path_factory.mktemp("gemm"), initializer_range=0.3, **sizes)


def adapted(folder: Path, device: str = "cpu", dtype: str = "bfloat16") -> Any:
    """4 bits, with adapters that change what it says."""
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj", "w1", "w2", "w3"], init_lora_weights=False)
    torch.manual_seed(0)
    return load_mixtral(folder, lora=lora, dtype=dtype, device=device).eval()


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let CPUs take a GPU's way."""
    monkeypatch.setattr(generation, "few_rows_kernel", lambda _: GemmStack)


def stacks_of(model: Any) -> list[NF4Weight]:
    return [module for module in model.modules() if isinstance(module, NF4Weight)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("count", [1, 3, GEMV_ROWS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_as_exact_as_a_product_with_the_decoded_matrix(count: int, dtype: torch.dtype, device: str) -> None:
    weight = weight_of(SHAPE, device)
    x, gemm = rows(count, SHAPE[2], device).to(dtype), GemmStack(weight)
    for group in range(SHAPE[0]):
        exact = x.double() @ weight.decoder(torch.float32)(group).double().t()
        usual = x @ weight.decoder(dtype)(group).t()
        y = gemm.product(x, group)
        assert y.dtype == dtype
        error, usual_error = ((result.double() - exact).norm() / exact.norm() for result in (y, usual))
        assert error <= 1.25 * usual_error + 1e-6
    assert gemm.product(x.view(1, count, -1)).shape == (1, count, SHAPE[1])


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 14336, 4096), (2, 4096, 14336), (1, 1024, 4096)])
@pytest.mark.parametrize("count", [1, 2, 8, GEMV_ROWS])
def test_sizes_of_mixtral(shape: tuple[int, int, int], count: int) -> None:
    weight = weight_of(shape, "cuda")
    x, gemm = rows(count, shape[2], "cuda"), GemmStack(weight)
    for group in range(shape[0]):
        exact = x.double() @ weight.decoder(torch.float32)(group).double().t()
        error = (gemm.product(x, group).double() - exact).norm() / exact.norm()
        assert error <= 4e-3


def test_only_where_it_can_stand_in() -> None:
    weight = weight_of(SHAPE, "cpu")
    gemm = GemmStack(weight)
    assert not gemm.serves(rows(1, SHAPE[2], "cpu")), "a gradient may be wanted"
    with torch.no_grad():
        assert gemm.serves(rows(GEMV_ROWS, SHAPE[2], "cpu").view(2, -1, SHAPE[2]))
        assert not gemm.serves(rows(GEMV_ROWS + 1, SHAPE[2], "cpu"))
        weight.write(0, torch.zeros(SHAPE).flatten())
        assert not gemm.serves(rows(1, SHAPE[2], "cpu")), "its scales are those of what was there before"


def test_weights_that_it_does_not_hold() -> None:
    assert few_rows_kernel(NF4Weight(SHAPE, "meta")) is None
    assert not GemmStack.can_hold(weight_of(SHAPE, "cpu"))


@pytest.mark.gpu
def test_weights_that_it_holds() -> None:
    assert few_rows_kernel(weight_of(SHAPE, "cuda")) is GemmStack
    assert few_rows_kernel(weight_of((1, 32, 48), "cuda")) is None


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("adapter", [True, False])
def test_a_model_says_the_same(folder: Path, adapter: bool, device: str) -> None:
    ids = torch.arange(3, 23, device=device).view(4, 5)
    model, reference = adapted(folder, device), adapted(folder, device, "float32")
    if not adapter:
        for peft_model in (model, reference):
            peft_model.base_model.disable_adapter_layers()
    with torch.no_grad():
        usual, exact = model(ids).logits, reference(ids).logits
        assert prepare_for_generation(model) > 0
        few = model(ids).logits
    assert (few - exact).norm() < 1.5 * (usual - exact).norm()


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("device", DEVICES)
def test_a_step_decodes_no_scales_and_casts_no_factors(
    folder: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, served = adapted(folder, device), set()
    product = GemmStack.product

    def recorded(gemm: GemmStack, x: Tensor, group: int = 0) -> Tensor:
        served.add(gemm)
        return product(gemm, x, group)

    prepare_for_generation(model)
    monkeypatch.setattr(GemmStack, "product", recorded)
    for owner, name in ((codec, "dequantize_scales"), (LoraFrozenLinear, "masters")):
        monkeypatch.setattr(owner, name, lambda *_, **__: pytest.fail("it was made ready before"))
    with torch.no_grad():
        model(torch.arange(3, 23, device=device).view(4, 5))
    assert served == {stack.gemv for stack in stacks_of(model)}, "attention, and all experts"


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("device", DEVICES)
def test_tokens_one_by_one(folder: Path, device: str) -> None:
    sampling, ids = Sampling(temperature=0, repetition_penalty=1.0, max_new_tokens=8), list(range(3, 43))
    generator, found = torch.Generator(device), []
    for prepared in (False, True):
        model = adapted(folder, device, "float32")
        if prepared:
            prepare_for_generation(model)
        found.append([*stream_tokens(model, ids, PrefixCache(), sampling, stop_ids=(), generator=generator)])
    assert found[0] == found[1]


@pytest.mark.usefixtures("stand_in")
def test_training_frees_all_of_it(folder: Path) -> None:
    ids, model, fresh = torch.arange(3, 13)[None], adapted(folder), adapted(folder)
    prepare_for_generation(model)
    model.train()
    assert all(stack.gemv is None for stack in stacks_of(model))
    assert all(layer._kept is None for _, layer in lora_layers(model))
    for trained in (model, fresh.train()):
        torch.manual_seed(0)
        trained(ids, labels=ids).loss.backward()
    for ours, theirs in zip(model.parameters(), fresh.parameters(), strict=True):
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("change", ["masters", "scaling", "disabled", "dtype"])
def test_factors_are_those_of_now(folder: Path, change: str) -> None:
    model, fresh = adapted(folder), adapted(folder)
    prepare_for_generation(model)
    layers: list[Any] = [layer for changed in (model, fresh) for _, layer in lora_layers(changed)]
    for layer in layers:
        if change == "masters":
            layer.weights("default")[1].detach().mul_(2)
        elif change == "scaling":
            layer.scaling["default"] *= 2
        elif change == "disabled":
            layer.enable_adapters(False)
    dtype = torch.float16 if change == "dtype" else torch.bfloat16
    with torch.no_grad():
        for (_, ours), (_, theirs) in zip(lora_layers(model), lora_layers(fresh), strict=True):
            found, expected = ours.factors(dtype), theirs.factors(dtype)
            if found is None or expected is None:
                assert found is expected
                continue
            assert torch.equal(found.a, expected.a)
            assert torch.equal(found.b, expected.b)


@pytest.mark.usefixtures("stand_in")
def test_bytes_are_those_that_are_kept(folder: Path) -> None:
    model = adapted(folder)
    held = prepare_for_generation(model)
    kept = sum(stack.gemv._scales.untyped_storage().nbytes() for stack in stacks_of(model) if stack.gemv is not None)
    for _, layer in lora_layers(model):
        assert layer._kept is not None
        kept += layer._kept.factors.a.nbytes + layer._kept.factors.b.nbytes
    assert held == kept
    assert all(
        stack.gemv is not None and stack.gemv._codes.data_ptr() == stack.codes.data_ptr() for stack in stacks_of(model)
    )
