"""The expert block against dense float64 autograd with W + BA written out."""

import json
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from lightning_mixcn.errors import UserError
from lightning_mixcn.model import load_mixtral, set_activation_checkpointing, shard_model
from lightning_mixcn.model.experts import path as expert_path
from lightning_mixcn.model.experts.loop import Dropout, ExpertFactors, ExpertWeights
from lightning_mixcn.model.experts.path import PATHS, FastestPaths, Table, choose_expert_path, read_fastest
from lightning_mixcn.model.experts.routing import route_rows
from lightning_mixcn.model.nf4.storage import DenseWeight, NF4Weight, Weight
from lightning_mixcn.testing import run_distributed
from tests.model.philox import dropout_mask
from tests.model.trained_values import draw_trained

HIDDEN, INTERMEDIATE, RANK = 32, 48, 8
Names = tuple[str, ...]
NAMES: Names = ("x", "routing weight", "a_gate_up", "b_gate", "b_up", "a_down", "b_down")


def make_weights(experts: int, quantization: str, dtype: torch.dtype, device: str = "cpu") -> ExpertWeights:
    def weight(*shape: int) -> Weight:
        made: Weight = NF4Weight(shape) if quantization == "nf4" else DenseWeight(shape, dtype)  # type: ignore[arg-type]  # three sizes
        made.write(0, torch.randn(shape).flatten() * 0.2)
        return made.to(device)

    gate, up = (weight(experts, INTERMEDIATE, HIDDEN) for _ in range(2))
    return gate, up, weight(experts, HIDDEN, INTERMEDIATE)


def make_inputs(tokens: int, experts: int, top_k: int, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    shapes = [
        (tokens, HIDDEN), (tokens, top_k), (experts, 2 * RANK, HIDDEN), (experts, INTERMEDIATE, RANK),
        (experts, INTERMEDIATE, RANK), (experts, RANK, INTERMEDIATE), (experts, HIDDEN, RANK),
    ]  # fmt: skip
    inputs = [torch.randn(shape) * (1.0 if number == 0 else 0.3) for number, shape in enumerate(shapes)]
    inputs[1] = inputs[1].softmax(dim=1)
    dtypes = [dtype, torch.float32, *[dtype] * 5]
    return [value.to(device, dtype).requires_grad_() for value, dtype in zip(inputs, dtypes, strict=True)]


# (stream, tokens of the rows, rows with padding, width, tensor of the dtype) → the rows' dropout masks.
Masks = Callable[[int, Tensor, int, int, Tensor], Tensor]


def drawn_masks(dropout: Dropout, tokens: int) -> Masks:
    """Masks of `loop` and `grouped`: of torch's generator, for all tokens, and for the rows of an expert in turn."""

    def masks(stream: int, token: Tensor, rows: int, width: int, like: Tensor) -> Tensor:
        found = dropout.mask((rows if stream else tokens, width), stream, like)
        if found is None:
            return torch.ones_like(like[:1, :1])
        return found[: len(token)] if stream else found[token]

    return masks


def keyed_masks(dropout: Dropout, tokens: int) -> Masks:
    """Masks of `fused`."""
    return lambda stream, token, rows, width, like: dropout_mask(token, width, *dropout, stream).to(like)


def reference(
    inputs: list[Tensor], index: Tensor, weights: ExpertWeights, masks: Masks, padded: bool = False
) -> Tensor:
    """Σₖ weight·down(silu(gate x)·up x), one dense expert at a time, in the dtype of the inputs."""
    x, routing, a_gate_up, b_gate, b_up, a_down, b_down = inputs
    dtype, y = x.dtype, torch.zeros_like(x)
    routed = {
        expert: slice(rows.start, rows.stop) for expert, rows in route_rows(index, len(a_gate_up), padded).experts()
    }
    decode_gate, decode_up, decode_down = (weight.decoder(torch.float32) for weight in weights)
    for expert, rows in routed.items():
        token, choice = torch.where(index == expert)
        dropped = x[token] * masks(0, token, len(x), HIDDEN, x)
        a_gate, a_up = a_gate_up[expert].split(RANK)
        gate = x[token] @ decode_gate(expert).to(dtype).t() + dropped @ (b_gate[expert] @ a_gate).t()
        up = x[token] @ decode_up(expert).to(dtype).t() + dropped @ (b_up[expert] @ a_up).t()
        h = F.silu(gate) * up
        h_dropped = h * masks(1 + expert, token, rows.stop - rows.start, INTERMEDIATE, h)
        out = h @ decode_down(expert).to(dtype).t() + h_dropped @ (b_down[expert] @ a_down[expert]).t()
        y = y.index_add(0, token, routing[token, choice, None] * out)
    return y


def chosen(kind: str, tokens: int, experts: int, top_k: int) -> Tensor:
    if kind == "one expert":
        return torch.zeros(tokens, 1, dtype=torch.int64)
    if kind == "empty experts":
        return torch.rand(tokens, experts - 2).topk(top_k).indices
    return torch.rand(tokens, experts).topk(top_k).indices


CASES = [
    ("random", 50, 4, 2), ("random", 33, 8, 8), ("random", 20, 4, 1), ("one token", 1, 4, 4),
    ("empty experts", 40, 6, 2), ("one expert", 37, 4, 1),
]  # fmt: skip


# Norm of the error over the norm of the truth: a few units in the last place (2⁻²⁴, 2⁻⁹) for a chain of products.
FLOAT32, BFLOAT16 = (torch.float32, 1e-5), (torch.bfloat16, 2e-2)
# `grouped` decodes to 16 bits or not as `loop` does; `decode` meets dense weights never, and Triton's interpreter
# multiplies bfloat16 as integers and cuts it off instead of rounding.
RUNS = [
    ("loop", "none", FLOAT32), ("loop", "none", BFLOAT16), ("loop", "nf4", FLOAT32), ("loop", "nf4", BFLOAT16),
    ("grouped", "none", FLOAT32), ("grouped", "none", BFLOAT16), ("grouped", "nf4", BFLOAT16),
    ("decode", "nf4", FLOAT32),
]  # fmt: skip


def check(
    path: str,
    case: tuple[str, int, int, int],
    quantization: str,
    precision: tuple[torch.dtype, float],
    probability: float,
    device: str,
    padded: bool = False,
) -> None:
    """Compare a path's result and gradients with `reference` in float64."""
    (kind, tokens, experts, top_k), (dtype, tolerance) = case, precision
    torch.manual_seed(tokens)
    weights = make_weights(experts, quantization, dtype, device)
    inputs = make_inputs(tokens, experts, top_k, dtype, device)
    index, dropout = chosen(kind, tokens, experts, top_k).to(device), Dropout(probability, seed=7)
    upstream = torch.randn(tokens, HIDDEN).to(device, dtype)
    y = PATHS[path](inputs[0], index, inputs[1], weights, dropout, *inputs[2:])
    y.backward(upstream)
    exact = [value.detach().double().requires_grad_() for value in inputs]
    masks = (keyed_masks if path == "fused" else drawn_masks)(dropout, tokens)
    expected = reference(exact, index, weights, masks, padded)
    expected.backward(upstream.double())
    assert relative_error(y, expected) <= tolerance, "output"
    for name, value, truth in zip(NAMES, inputs, exact, strict=True):
        assert value.grad is not None
        assert truth.grad is not None
        assert relative_error(value.grad, truth.grad) <= tolerance, name


RUNS_WITH_DROPOUT = [(*run, probability) for run in RUNS for probability in (0.0, 0.3)] + [
    ("fused", "nf4", FLOAT32, 0.3)  # without dropout: test_fused.py
]


# Of 64 experts some have no rows, and the others a few. Triton's interpreter takes half a minute for them.
MANY = ("empty experts", 24, 64, 8)


@pytest.mark.parametrize(("path", "quantization", "precision", "probability"), RUNS_WITH_DROPOUT)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_equal_dense_float64(
    case: tuple[str, int, int, int],
    precision: tuple[torch.dtype, float],
    probability: float,
    quantization: str,
    path: str,
) -> None:
    if path in ("fused", "decode"):
        needs_interpreter()
    check(path, case, quantization, precision, probability, "cpu", path == "loop" and precision == BFLOAT16)


@pytest.mark.parametrize(
    ("path", "precision", "probability"),
    [
        ("loop", FLOAT32, 0.0), ("loop", BFLOAT16, 0.3), ("grouped", BFLOAT16, 0.0),
        pytest.param("fused", FLOAT32, 0.3, marks=pytest.mark.slow),
        pytest.param("decode", FLOAT32, 0.0, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_many_experts_of_few_rows(path: str, precision: tuple[torch.dtype, float], probability: float) -> None:
    if path in ("fused", "decode"):
        needs_interpreter()
    check(path, MANY, "nf4", precision, probability, "cpu", path == "loop" and precision == BFLOAT16)


def needs_interpreter() -> None:
    pytest.importorskip("triton", reason="Triton is not installed; the dev extra has it on Linux")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton's interpreter is off; on a GPU, test_gradients_on_a_gpu has this path")


@pytest.mark.gpu
@pytest.mark.parametrize("path", ["loop", "fused", "grouped", "decode"])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("probability", [0.0, 0.3])
@pytest.mark.parametrize("case", [*CASES, MANY], ids=str)
def test_gradients_on_a_gpu(case: tuple[str, int, int, int], probability: float, quantization: str, path: str) -> None:
    check(path, case, quantization, BFLOAT16, probability, "cuda")


def relative_error(value: Tensor, truth: Tensor) -> float:
    return float((value.detach().double() - truth.detach()).norm() / truth.detach().norm().clamp_min(1e-12))


@pytest.mark.parametrize("path", ["loop", "fused", "grouped"])
def test_a_projection_without_adapter(path: str) -> None:
    if path == "fused":
        needs_interpreter()
    torch.manual_seed(0)
    weights, inputs = make_weights(4, "none", torch.float32), make_inputs(9, 4, 2, torch.float32)
    index = chosen("random", 9, 4, 2)
    a_up = inputs[2].detach()[:, RANK:].clone().requires_grad_()
    y = PATHS[path](inputs[0], index, inputs[1], weights, Dropout(), a_up, None, inputs[4], None, None)
    y.sum().backward()
    with torch.no_grad():
        padded = [inputs[0], inputs[1], torch.cat([torch.zeros_like(a_up), a_up], 1)]
        padded += [torch.zeros_like(inputs[3]), inputs[4], torch.zeros_like(inputs[5]), torch.zeros_like(inputs[6])]
        torch.testing.assert_close(y, reference(padded, index, weights, drawn_masks(Dropout(), 9)))
    assert a_up.grad is not None


@pytest.mark.parametrize("path", ["loop", "fused", "grouped"])
def test_an_input_that_needs_no_gradient(path: str) -> None:
    if path == "fused":
        needs_interpreter()
    torch.manual_seed(0)
    weights, inputs = make_weights(4, "nf4", torch.float32), make_inputs(9, 4, 2, torch.float32)
    index = chosen("random", 9, 4, 2)
    with_dx, without = (
        torch.autograd.grad(PATHS[path](x, index, inputs[1], weights, Dropout(0.3, 5), *inputs[2:]).sum(), inputs[1:])
        for x in (inputs[0], inputs[0].detach())
    )
    assert all(torch.equal(one, other) for one, other in zip(with_dx, without, strict=True))


@pytest.fixture(autouse=True)
def no_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unset the variable, which the environment of the tests may have set."""
    monkeypatch.delenv("MIXCN_EXPERT_PATH", raising=False)


def chosen_path(place: Callable[[Tensor], Any] = lambda x: x, *, hidden: int = 32, rank: int = 8) -> str:
    """Choose for six tokens and three experts: four rows an expert."""
    dtype = torch.bfloat16
    gate, up = (DenseWeight((3, 48, hidden), dtype) for _ in range(2))
    b = torch.zeros(3, 48, rank, dtype=dtype)
    factors = ExpertFactors(torch.zeros(3, 2 * rank, hidden, dtype=dtype), b, b, None, None)
    x, weights = torch.zeros(6, hidden, dtype=dtype), (gate, up, DenseWeight((3, hidden, 48), dtype))
    return choose_expert_path(place(x), torch.zeros(6, 2, dtype=torch.int64), weights, factors)


def test_on_the_cpu_it_is_the_loop() -> None:
    assert chosen_path() == "loop"


@pytest.mark.parametrize("path", ["loop", "fused", "grouped", "decode"])
def test_the_environment_decides(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXCN_EXPERT_PATH", path)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(expert_path, "has_triton", lambda: True)
    assert chosen_path() == path


@pytest.mark.parametrize(
    ("interpreter", "triton", "message"), [("0", True, "on a GPU, not on cpu"), ("1", False, "not installed")]
)
def test_a_kernel_that_cannot_run(
    interpreter: str, triton: bool, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIXCN_EXPERT_PATH", "decode")
    monkeypatch.setenv("TRITON_INTERPRET", interpreter)
    monkeypatch.setattr(expert_path, "has_triton", lambda: triton)
    with pytest.raises(ValueError, match=message):
        chosen_path()


@pytest.mark.parametrize(
    ("capability", "path"),
    [((8, 0), "loop"), ((8, 9), "loop"), ((9, 0), "grouped"), ((10, 0), "grouped"), ((12, 0), "loop")],
)
def test_grouped_products_only_where_torch_has_a_kernel(
    capability: tuple[int, int], path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expert_path, "_capability", lambda device: capability)
    monkeypatch.setattr(expert_path, "has_triton", lambda: True)
    monkeypatch.setitem(expert_path.FASTEST, "cuda", fastest(((math.inf, "grouped"),)))
    assert chosen_path(on_gpu) == path  # the fastest gives way
    monkeypatch.setenv("MIXCN_EXPERT_PATH", "grouped")  # a wish is refused
    if path == "loop":
        with pytest.raises(ValueError, match=r"capability 9.0 and 10.0 \(H100, B200\) only, not .* on "):
            chosen_path(on_gpu)


def test_fused_needs_an_ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_path, "has_triton", lambda: True)
    for capability, path in (((7, 5), "loop"), ((8, 0), "fused"), ((12, 0), "fused")):
        monkeypatch.setattr(expert_path, "_capability", lambda device, found=capability: found)
        assert chosen_path(on_gpu) == path  # the fastest gives way
    monkeypatch.setenv("MIXCN_EXPERT_PATH", "fused")  # a wish is refused
    monkeypatch.setattr(expert_path, "_capability", lambda device: (7, 5))
    with pytest.raises(ValueError, match=r"`MIXCN_EXPERT_PATH=fused` cannot run here: .* capability 8.0 .* not 7.5"):
        chosen_path(on_gpu)


def test_fused_needs_rows_of_whole_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXCN_EXPERT_PATH", "fused")
    with pytest.raises(ValueError, match="rows of 35 weights begin inside a byte"):
        chosen_path(hidden=35)


def on_gpu(x: Tensor) -> Any:
    """Return what stands in for the same tensor on a GPU."""
    return SimpleNamespace(
        is_cuda=True, device=torch.device("cuda"), dtype=x.dtype, shape=x.shape, element_size=x.element_size
    )


def test_an_unknown_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXCN_EXPERT_PATH", "fast")
    with pytest.raises(ValueError, match=r"`MIXCN_EXPERT_PATH='fast'` .* loop, fused, grouped, decode"):
        chosen_path()


@pytest.mark.parametrize("sizes", [{"hidden": 36}, {"rank": 3}], ids=str)
def test_sizes_that_grouped_products_cannot_take(sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXCN_EXPERT_PATH", "grouped")
    with pytest.raises(ValueError, match="no multiple of 16 bytes"):
        chosen_path(**sizes)  # type: ignore[arg-type]  # numbers only


@pytest.mark.parametrize(("below", "chosen"), [(4.0, "grouped"), (5.0, "decode")])
def test_the_table_is_read_by_rows_of_an_expert(below: float, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(expert_path, "has_triton", lambda: True)
    monkeypatch.setitem(expert_path.FASTEST, "cpu", fastest(((below, "decode"), (math.inf, "grouped"))))
    assert chosen_path() == chosen
    assert chosen_path(rank=3) == "loop"


def fastest(training: Table, forward: Table = ((math.inf, "loop"),)) -> FastestPaths:
    return FastestPaths(training, forward)


def test_without_gradients_another_path_may_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(expert_path.FASTEST, "cpu", fastest(((math.inf, "loop"),), ((math.inf, "grouped"),)))
    assert chosen_path() == "loop"
    with torch.no_grad():
        assert chosen_path() == "grouped"


def test_a_gpu_has_the_winners_of_its_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_path, "has_triton", lambda: True)
    monkeypatch.setitem(expert_path.FASTEST, "cuda", fastest(((math.inf, "loop"),)))
    monkeypatch.setitem(expert_path.FASTEST, "9.0", fastest(((4, "loop"), (math.inf, "grouped"))))
    for capability, path in (((9, 0), "grouped"), ((10, 0), "loop")):
        monkeypatch.setattr(expert_path, "_capability", lambda device, found=capability: found)
        assert chosen_path(on_gpu) == path


WINNERS: dict[str, Any] = {"training": [[64, "loop"], [None, "grouped"]], "forward": [[None, "loop"]]}


def test_the_fastest_paths_are_read(tmp_path: Path) -> None:
    file = tmp_path / "fastest.json"
    file.write_text(json.dumps({"cpu": WINNERS, "cuda": WINNERS, "9.0": WINNERS}))
    expected = FastestPaths(((64.0, "loop"), (math.inf, "grouped")), ((math.inf, "loop"),))
    assert read_fastest(file) == {"cpu": expected, "cuda": expected, "9.0": expected}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ([], "holds a JSON list, expected an object"),
        ({"cpu": WINNERS}, "cuda is missing"),
        ({"cpu": WINNERS, "cuda": {"training": WINNERS["training"]}}, "cuda.forward is missing"),
        ({"cpu": WINNERS, "cuda": WINNERS, "9.0": []}, r"\['9.0'\] is a list of 0 entries, expected a mapping"),
        *[
            ({"cpu": WINNERS, "cuda": WINNERS | {"training": table}}, "cuda.training is .*, expected pairs of rows")
            for table in (
                [], "loop", [[64, "loop"]], [[None, "fast"]], [[None, ["loop"]]], [[None]], [[None, "loop"]] * 2,
                [[64, "loop"], [32, "grouped"], [None, "loop"]], [["64", "loop"], [None, "loop"]],
                [[-1, "loop"], [None, "loop"]], [[True, "loop"], [None, "loop"]],
            )
        ],
    ],
    ids=str,
)  # fmt: skip
def test_a_table_that_is_broken_is_one_line(content: Any, message: str, tmp_path: Path) -> None:
    file = tmp_path / "fastest.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=rf"fastest\.json'.*{message}") as error:
        read_fastest(file)
    assert "\n" not in str(error.value)


def gradients(base: Path, ids: Tensor, quantization: str, mode: str) -> dict[str, Tensor]:
    """Loss and gradients with everything that PEFT's configuration can vary here."""
    lora = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules="all-linear", lora_dropout=0.2, use_rslora=True,
        rank_pattern={"up_proj": 8, "down_proj": 16}, alpha_pattern={"gate_proj": 3},
    )  # fmt: skip
    model = load_mixtral(base, quantization=quantization, dtype="float32", lora=lora).train()
    draw_trained(model, 0.1, seed=3, around_start=False)
    set_activation_checkpointing(model, mode)
    torch.manual_seed(5)
    out = model(input_ids=ids, labels=ids, output_router_logits=True)
    out.loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"loss": out.loss.detach()} | found


@pytest.mark.parametrize(("quantization", "mode"), [("none", "full"), ("nf4", "none"), ("nf4", "full")])
def test_a_model_trains_the_same(
    tiny: Path, ids: Tensor, quantization: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = gradients(tiny, ids, quantization, mode)
    monkeypatch.setenv("MIXCN_EXPERT_PATH", "grouped")
    grouped = gradients(tiny, ids, quantization, mode)
    assert loop.keys() == grouped.keys()
    for name, value in loop.items():
        # float32 sums in another order, through two layers; the dropout masks are the same.
        assert (grouped[name] - value).norm() <= 1e-5 * value.norm(), name


@torch.no_grad()
def test_logits_and_generation_are_those_of_transformers(
    base: Path, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIXCN_EXPERT_PATH", "grouped")
    model: Any = load_mixtral(base, quantization="none", dtype="float32")
    stock: Any = transformers.MixtralForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    torch.testing.assert_close(model(input_ids=ids).logits, stock(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    kwargs: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids[:1], **kwargs), stock.generate(ids[:1], **kwargs))


def trained_gradients(base: str, ids: Tensor, path: str, sharded: bool) -> dict[str, Tensor]:
    """Gradients of all adapters, gathered where they are sharded."""
    os.environ["MIXCN_EXPERT_PATH"] = path
    shard = None
    if sharded:
        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        shard = partial(shard_model, mesh=mesh)
    lora = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model: Any = load_mixtral(base, dtype="float32", lora=lora, shard=shard).train()
    set_activation_checkpointing(model, "full")
    model(input_ids=ids, labels=ids).loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {name: grad.full_tensor() if sharded else grad for name, grad in found.items()}


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("path", ["fused", "grouped"])
def test_sharded_weights(path: str, tiny: Path, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    if path == "fused":
        needs_interpreter()
        ids = ids[:, :8]
    ranks = run_distributed(trained_gradients, 2, str(tiny), ids, path, True)
    monkeypatch.setenv("MIXCN_EXPERT_PATH", "loop")
    alone = trained_gradients(str(tiny), ids, "loop", False)
    # Both ranks see the same rows, so the mean of their gradients is the gradient of one process.
    for found in ranks:
        assert found.keys() == alone.keys()
        for name, value in alone.items():
            assert (found[name] - value).norm() <= 1e-5 * value.norm(), name
