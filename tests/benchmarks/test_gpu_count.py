"""A step on a GPU by count: operations against a formula by hand, bytes and launches of known operations."""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed; the dev extra has it on Linux")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
H, I, E, K, V, R = 128, 256, 8, 2, 2048, 8  # noqa: E741  # the letters of the model's legends
T, S = 64, 32  # tokens of a micro-batch, and of a row
SIZES = {"hidden_size": H, "width": I}


@pytest.fixture
def gpu_count(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a script of benchmarks/, which is no package."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in [
        name for name in sys.modules if name.partition(".")[0] in ("gpu_count", "gpu_counting", "random_base")
    ]:
        monkeypatch.delitem(sys.modules, name)
    return __import__("gpu_count")


def tiny(gpu_count: Any, memory: str = "none", path: str = "loop", dropout: float = 0.0) -> Any:
    return gpu_count.Case(T, memory, dropout, path, R, "cpu-small", S)


def layer_flops(memory: str) -> int:
    """Forward and backward of a layer whose input needs a gradient; 16 query heads and 4 of keys and values."""
    attention = [(H, H), (H, H // 4), (H, H // 4), (H, H)]
    experts = [(H, I), (H, I), (I, H)]

    def products(projections: list[tuple[int, int]], rows: int) -> tuple[int, int]:
        frozen = sum(2 * rows * a * b for a, b in projections)
        lora = sum(2 * rows * R * (a + b) for a, b in projections)
        return frozen, lora

    frozen, lora = (sum(kind) for kind in zip(products([*attention, (H, E)], T), products(experts, T * K), strict=True))
    attended = 2 * 2 * H * (T // S) * S * (S + 1) // 2  # q kᵀ and p v, of causal pairs
    # The Bs of q, k and v are one matrix, two thirds of which are zeros: in forward, and for the gradient of hidden.
    zeros = 2 * T * 2 * R * (H + H // 2)
    flops = 2 * frozen + 3 * lora + attended * 7 // 2 + 2 * zeros
    flops += 2 * T * K * R * I  # backward makes h @ Aᵀ of down_proj again
    if memory == "selective":  # but for what comes after the last tensor that backward needs: o_proj but for its A
        flops += sum(products(attention, T)) + attended + zeros - 2 * T * H * H - 2 * T * R * H
    if memory == "full":  # but for the down product
        flops += frozen + lora + attended + zeros - sum(products([(I, H)], T * K))
    return flops


@pytest.mark.parametrize(
    ("memory", "path"),
    [("none", "loop"), ("selective", "loop"), ("full", "loop"), ("full", "grouped"), ("none", "decode")],
)
def test_operations_are_those_of_a_formula(gpu_count: Any, memory: str, path: str) -> None:
    counted = gpu_count.count(tiny(gpu_count, memory, path), **SIZES)
    assert sum(work.flops * times for work, times in counted.layer.items()) == layer_flops(memory)
    assert all(times > 0 for times in counted.layer.values())


def test_the_fused_path_decodes_on_a_second_stream(gpu_count: Any) -> None:
    counted = gpu_count.count(tiny(gpu_count, path="fused", dropout=0.1), **SIZES)
    # The Bs of gate and up are one matrix, half of which is zeros: 2R columns for 2I rows, forward and backward.
    zeros = 2 * T * K * R * 2 * I
    assert sum(work.flops * times for work, times in counted.layer.items()) == layer_flops("none") + 2 * zeros

    def operand(outputs: int, inputs: int, rank: int) -> tuple[str, int]:
        """Codes and scales of whole superblocks, [W | B] in bfloat16, B in float32."""
        superblock = 16384 // 2 + 16384 // 64 + 8
        packed = -(-outputs * inputs // 16384) * superblock
        return "decode_operand", packed + outputs * (inputs + rank) * 2 + outputs * R * 4

    beside = [(work.name, work.bytes) for work in counted.layer.elements() if work.side]
    assert Counter(beside) == {
        operand(I, H, 2 * R): 2 * 2 * E, operand(H, I, R): 2 * E,  # gate and up, down
        operand(H, H, 3 * R): 2, operand(H // 4, H, 3 * R): 2 * 2, operand(H, H, R): 2,  # q, k and v, o
    }  # fmt: skip
    rates, loop = gpu_count.Rates(), gpu_count.count(tiny(gpu_count, dropout=0.1), **SIZES)
    decoding = [gpu_count.summed(works.layer, rates)["kinds"]["decoding"] for works in (counted, loop)]
    assert [kind["second_stream"] for kind in decoding] == [True, False]  # all of it, or attention's alone
    gathered = [work.bytes for work in counted.layer.elements() if work.name == "gather_rows"]
    rows, tokens = T * K // E * H * 2, T * K // E * 8
    # x as it is and after dropout; in backward the gradient, and x after dropout. Attention's inputs as they are and
    # after dropout, and its result after dropout.
    of_attention = [3 * T * H * 2 + T * 8, 2 * T * H * 2 + T * 8]
    assert sorted(gathered) == sorted(E * [3 * rows + tokens] + 2 * E * [2 * rows + tokens] + of_attention)


def test_rope_is_one_kernel_forward_and_one_backward(gpu_count: Any) -> None:
    counted = gpu_count.count(tiny(gpu_count), **SIZES)
    rotated = [(work.phase, work.bytes) for work in counted.layer.elements() if work.name == "rotate"]
    # q and k, a quarter of it, are read and written; a token has 8 cosines and 8 sines.
    moved = 2 * T * (H + H // 4) * 2 + 2 * T * H // 16 * 2
    assert sorted(rotated) == [("backward", moved), ("forward", moved)]


def test_the_rest_has_head_and_optimizer(gpu_count: Any) -> None:
    counted = gpu_count.count(tiny(gpu_count), **SIZES, num_hidden_layers=3)
    head = sum(work.flops * times for work, times in counted.rest.items() if V in work.shape)
    assert head == 2 * 2 * T * H * V  # logits, and the gradient of the hidden states
    attention = 2 * (H + H) + 2 * (H + H // 4)
    trained = R * (attention + H + E + 3 * E * (H + I))
    by_name = {work.name: work.bytes for work in counted.optimizer}
    # float32: parameter and two moments are read and written, the gradient is read.
    assert by_name["_fused_adamw_"] == 7 * 4 * 3 * trained
    assert by_name["_foreach_mul_"] == 2 * 4 * 3 * trained


def test_waits_and_launches(gpu_count: Any) -> None:
    loop, grouped, full = (
        gpu_count.count(tiny(gpu_count, memory, path), **SIZES)
        for memory, path in (("none", "loop"), ("none", "grouped"), ("full", "loop"))
    )
    # The documents of a micro-batch; `loop` asks for the rows of a layer, and when it is computed again.
    assert [counted.waits for counted in (loop, grouped, full)] == [(1, 2), (0, 1), (2, 3)]
    decoded = [work for work in loop.layer.elements() if work.name == "dequantize_4bit"]
    assert len(decoded) == 2 * 3 * E
    assert sum(work.name == "decode_operand" for work in loop.layer.elements()) == 2 * 4  # attention's
    assert loop.layer.total() > grouped.layer.total()


def test_bytes_of_operations(gpu_count: Any) -> None:
    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, index, square = empty(4, 8), empty(2, dtype=torch.int64), empty(4, 4)
    half, wide, few, column = x[:, :4], empty(4, 8, dtype=torch.float32), empty(2, 8), empty(4, 1)
    expected = {  # x has 64 bytes
        "mul": (lambda: x * x.detach(), 3 * 64),
        "mul_": (lambda: x.mul_(wide), 64 + 128 + 64),
        "add_": (lambda: x.add_(1), 2 * 64),
        "copy_": (lambda: x.copy_(wide), 128 + 64),
        "_to_copy": (lambda: x.float(), 64 + 128),
        "zero_": (lambda: x.zero_(), 64),
        "index": (lambda: x[index], 2 * 32 + 16),
        "index_copy_": (lambda: x.index_copy_(0, index, few), 2 * 32 + 16),
        "clone": (lambda: half.clone(), 2 * 32),
        "add": (lambda: x + column.expand(4, 8), 64 + 8 + 64),
        "mm": (lambda: torch.mm(half, half.t(), out=square), 3 * 32),
        "addmm_": (lambda: square.addmm_(half, half.t()), 4 * 32),
    }
    with gpu_count.Trace(rank=1, pairs=0) as trace:
        for run, _ in expected.values():
            run()
        x.view(8, 4).t().unsqueeze(0), torch.empty_like(x), torch.ones(3)  # views, memory, and what is on the CPU
    assert {work.name: work.bytes for work in trace.works} == {name: moved for name, (_, moved) in expected.items()}
    assert [(work.shape, work.flops) for work in trace.works if work.shape] == 2 * [((4, 4, 4, 1), 2 * 4**3)]


def test_kernels_and_streams(gpu_count: Any) -> None:
    gate, weight = torch.empty(6, 64, dtype=torch.bfloat16, device="meta"), torch.empty(6, device="meta")
    trace = gpu_count.Trace(rank=1, pairs=0)
    with gpu_count.pretended_card(trace, "loop", 6, 2, 6), trace:
        from lightning_mixcn.model.experts.grouped import swiglu, swiglu_backward

        pretended = gate.is_cuda
        swiglu(gate, gate.detach())
        with torch.cuda.stream(torch.cuda.Stream()):
            swiglu_backward(gate, gate.detach(), gate.detach(), weight)
    # Forward reads two and writes one; backward reads three and writes three, and two numbers a row.
    assert [(w.name, w.bytes, w.side) for w in trace.works] == [
        ("swiglu_kernel", 3 * 6 * 64 * 2, False),
        ("swiglu_backward_kernel", 6 * 6 * 64 * 2 + 2 * 6 * 4, True),
    ]
    assert (pretended, gate.is_cuda) == (True, False)
    assert "is_cuda" not in vars(torch.Tensor)


def test_milliseconds(gpu_count: Any) -> None:
    rates, Work = gpu_count.Rates(), gpu_count.Work
    # 132 tiles of 128 x 256 are one wave, one more row is a second one.
    wave = 2 * (12 * 128) * 4096 * (11 * 256)
    assert rates.product_seconds(12 * 128, 4096, 11 * 256, 1) == pytest.approx(wave / 760e12)
    assert rates.product_seconds(12 * 128 + 1, 4096, 11 * 256, 1) > 1.3 * wave / 760e12
    moved = Work("add", "element-wise", "forward", 2_700_000_000)
    assert rates.seconds(moved) == pytest.approx(1e-3)
    assert rates.seconds(Work("a", "attention", "forward", 1, flops=35 * 10**10)) == pytest.approx(1e-3)
    beside = Work("decode", "decoding", "forward", 2 * 2_700_000_000, side=True)
    works = gpu_count.Counter({moved: 3, beside: 1, Work("add", "element-wise", "backward", 2_700_000_000): 1})
    counted = gpu_count.Counted(works, works, gpu_count.Counter({moved: 4}), 32, (1, 2))
    found = gpu_count.predict(counted, gpu_count.Case(4096, micro_batches=2), rates)
    assert found["layer"]["milliseconds"] == pytest.approx(3 + 1)
    assert found["layer"]["forward"]["second_stream_milliseconds"] == pytest.approx(2)
    assert found["micro_batch"]["milliseconds"] == pytest.approx(32 * 4 + 4 / 2)
    assert (found["micro_batch"]["launches"], found["micro_batch"]["waits"]) == (32 * 5, 31 + 2)
    hosted = gpu_count.predict(counted, gpu_count.Case(4096), gpu_count.Rates(launch_microseconds=1e4))
    assert hosted["micro_batch"]["milliseconds"] == pytest.approx(32 * 5 * 10 + 4)


def test_what_is_printed_says_that_it_is_no_measurement(
    gpu_count: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = [f"--{name}={size}" for name, size in SIZES.items()]
    options = ["--preset=cpu-small", "--tokens=64", "--sequence_length=32", "--rank=8", "--memory=full", *sizes]
    monkeypatch.setattr(sys, "argv", ["gpu_count.py", *options])
    gpu_count.main()
    printed = capsys.readouterr().out
    assert "cpu-small, 64 tokens, full, dropout 0.05, rank 8, path loop\nby count: " in printed
    assert "no measurement" in printed
    assert "tokens/s" in printed
