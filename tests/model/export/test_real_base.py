"""Exports of a real pretrained base in bf16, the one that `make demo` makes: 30 layers, four experts."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

from lightning_mixcn.model import find_model, load_found
from lightning_mixcn.model.export.command import export
from tests.model.adapters_on_disk import save_adapter

BASE = Path(__file__).parents[3] / ".cache" / "demo" / "base"
TEXT = "The capital of China is 北京。今年春节期间，全国人民都在 家里 看电视。\n\ndef f(x): return 12 * x"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not BASE.is_dir(), reason=".cache/demo/base is not there: run `make demo` once"),
    # PEFT's own conversion of w1 and w3 to the fused layout leaves patterns for what was not adapted.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
]


def logits_of(model: Any) -> Tensor:
    ids = transformers.AutoTokenizer.from_pretrained(BASE)(TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        logits: Tensor = model.eval()(input_ids=ids).logits.float()
    return logits


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Root mean square of the difference, as a share of that of the logits.

    Two ways in bf16 were 0.016 to 0.017 apart, which is as far as each is from float32. The largest of a million
    single differences says less: 0.033 of the largest logit, 0.022 to 0.028 from bf16's rounding alone.
    """
    return float((ours - theirs).square().mean().sqrt() / ours.square().mean().sqrt())


def test_every_way_gives_the_same_logits_in_bf16(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    trained = save_adapter(BASE, adapter, scale=0.01)
    bare = logits_of(transformers.AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32))
    exact = logits_of(trained)  # float32
    del trained
    ours = logits_of(load_found(find_model(str(adapter)), quantization="none"))
    stock: Any = transformers.AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.bfloat16)
    stock = logits_of(peft.PeftModel.from_pretrained(stock, str(adapter)))
    for layout in ("per-expert", "fused"):
        export(str(adapter), str(tmp_path / layout), layout=layout)
        merged = logits_of(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / layout))
        assert difference(ours, merged) < 2e-2
    assert difference(ours, stock) < 2e-2
    assert difference(ours, exact) < 2e-2
    assert difference(exact, bare) > 1e-2  # the adapter says something
