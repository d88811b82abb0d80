"""Generation on a CPU: products of few rows that decode 4-bit weights inside the kernel."""

from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import peft
import pytest
import torch
from torch import Tensor

from lightning_mixcn.model import load_mixtral
from lightning_mixcn.model.inference.generation import prepare_for_generation
from lightning_mixcn.model.nf4.storage import GEMV_ROWS, GemvStack, NF4Weight
from lightning_mixcn.testing import save_tiny_mixtral

pytestmark = pytest.mark.skipif(
    not bnb.has_avx512bf16(),
    reason="bitsandbytes has its kernel for CPUs with AVX-512 and bfloat16 alone",
)

# Matrices that begin inside a superblock, and end inside one.
SHAPE = (3, 96, 192)


@pytest.fixture
def weight() -> NF4Weight:
    values = NF4Weight(SHAPE)
    values.write(0, torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).flatten())
    return values


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sizes that the kernel takes."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    return save_tiny_mixtral(tmp_path_factory.mktemp("gemv"), initializer_range=0.3, **sizes)


def adapted(folder: Path, dtype: str = "bfloat16") -> Any:
    """4 bits, with adapters that change what it says."""
    targets = ["q_proj", "o_proj", "w1", "w2", "w3"]
    lora = peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(0)
    return load_mixtral(folder, lora=lora, dtype=dtype).eval()


@pytest.fixture
def model(folder: Path) -> Any:
    return adapted(folder)


def rows(count: int, columns: int = SHAPE[2]) -> Tensor:
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(count)).bfloat16()


@pytest.mark.parametrize("group", range(SHAPE[0]))
def test_the_order_is_that_of_bitsandbytes(weight: NF4Weight, group: int) -> None:
    _, out, columns = SHAPE
    matrix = weight.decoder(torch.float32)(group)
    codes, state = bnb.quantize_4bit(matrix, blocksize=64, quant_type="nf4")
    expected, state = bnb._convert_weight_packed_for_cpu(codes, state)
    x = rows(5)
    theirs = torch.ops.bitsandbytes.gemv_4bit(x, expected, (out, columns), state.absmax, state.code, 64)
    assert torch.equal(GemvStack(weight).product(x, group), theirs)


@pytest.mark.parametrize("count", [1, 2, 7, GEMV_ROWS])
def test_as_exact_as_a_product_with_the_decoded_matrix(weight: NF4Weight, count: int) -> None:
    x, gemv = rows(count), GemvStack(weight)
    for group in range(SHAPE[0]):
        exact = x.double() @ weight.decoder(torch.float32)(group).double().t()
        usual = x @ weight.decoder(torch.bfloat16)(group).t()
        error, usual_error = ((y.double() - exact).norm() / exact.norm() for y in (gemv.product(x, group), usual))
        assert error < 1.25 * usual_error


def test_only_where_it_can_stand_in(weight: NF4Weight) -> None:
    gemv = GemvStack(weight)
    assert not gemv.serves(rows(1)), "a gradient may be wanted"
    with torch.no_grad():
        assert gemv.serves(rows(1))
        assert gemv.serves(rows(GEMV_ROWS).view(2, -1, SHAPE[2]))
        assert not gemv.serves(rows(GEMV_ROWS + 1))
        assert not gemv.serves(rows(1).float())
        weight.write(0, torch.zeros(weight.codes.numel() * 2))
        assert not gemv.serves(rows(1)), "it is a copy of what was there before"


@pytest.mark.parametrize("shape", [(1, 48, 64), (1, 64, 96)])
def test_sizes_that_the_kernel_does_not_take(shape: tuple[int, int, int]) -> None:
    assert not GemvStack.can_hold(NF4Weight(shape))
    assert GemvStack.can_hold(NF4Weight((1, 64, 64)))


@pytest.mark.parametrize("adapter", [True, False])
def test_a_model_says_the_same(folder: Path, adapter: bool) -> None:
    ids = torch.arange(3, 23).view(4, 5)
    model, reference = adapted(folder), adapted(folder, "float32")
    if not adapter:
        model.base_model.disable_adapter_layers()
        reference.base_model.disable_adapter_layers()
    with torch.no_grad():
        usual, exact = model(ids).logits, reference(ids).logits
        assert prepare_for_generation(model) > 0
        few = model(ids).logits
    assert not torch.equal(few, usual), "the kernel was not used"
    assert (few - exact).norm() < 1.5 * (usual - exact).norm()


def test_attention_and_experts_go_through_it(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    served = set()
    product = GemvStack.product

    def recorded(gemv: GemvStack, rows: Tensor, group: int = 0) -> Tensor:
        served.add(gemv)
        return product(gemv, rows, group)

    monkeypatch.setattr(GemvStack, "product", recorded)
    prepare_for_generation(model)
    with torch.no_grad():
        model(torch.arange(3, 23).view(4, 5))
    held = {module.gemv: module.shape[0] for module in model.modules() if isinstance(module, NF4Weight)}
    assert set(held.values()) == {1, 4}, "one matrix of attention, or four experts"
    assert served == set(held)


def test_bytes_are_those_of_the_copies(model: Any) -> None:
    held = prepare_for_generation(model)
    copies = [module.gemv for module in model.modules() if isinstance(module, NF4Weight)]
    tensors = [value for copy in copies if copy is not None for value in (copy._codes, copy._scales)]
    assert held == sum(tensor.nbytes for tensor in tensors)


def test_training_goes_on_as_before(model: Any) -> None:
    ids = torch.arange(3, 13)[None]
    usual = model(ids, labels=ids).loss
    prepare_for_generation(model)
    again = model(ids, labels=ids).loss
    assert torch.equal(again, usual)
    again.backward()


def test_not_where_memory_is_short(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_mixcn.model.inference.generation.usable_bytes", lambda device: 0)
    assert prepare_for_generation(model) == 0
    assert all(module.gemv is None for module in model.modules() if isinstance(module, NF4Weight))


def test_nothing_without_4_bits(folder: Path) -> None:
    assert prepare_for_generation(load_mixtral(folder, quantization="none")) == 0
