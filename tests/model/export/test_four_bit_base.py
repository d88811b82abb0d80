"""Adapters and exports of runs on a 4-bit folder, which stock tools cannot read: they name the original."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import peft
import pytest
import torch
import transformers
from torch import Tensor

from lightning_mixcn.files import hub
from lightning_mixcn.model import find_model, load_found, load_mixtral
from lightning_mixcn.model.checkpoints.folder import Checkpoint
from lightning_mixcn.model.checkpoints.identity import IDENTITY_FILE, QUANTIZATION_METHOD
from lightning_mixcn.model.convert.quantize import quantize
from lightning_mixcn.model.export.command import export
from lightning_mixcn.testing import save_tiny_mixtral
from tests.model.adapters_on_disk import save_adapter
from tests.model.export.test_folder import logits_of

# PEFT's own conversion of w1 and w3 leaves patterns for what is not adapted; its advice on tied embeddings is for
# merging.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def original(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Return a base whose 4-bit folder is ``small`` beside it."""
    folder = save_tiny_mixtral(tmp_path / "original", tie_word_embeddings=request.param)
    quantize(str(folder), str(tmp_path / "small"), dtype="float32")
    return folder


def named_base(adapter: Path) -> str | None:
    name: str | None = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    return name


def auto_peft_logits(adapter: Path, ids: Tensor) -> Tensor:
    """Of the model that PEFT loads by the adapter's folder alone, where the base is in the working folder."""
    return logits_of(peft.AutoPeftModelForCausalLM.from_pretrained(str(adapter), dtype=torch.float32), ids)


def expected_logits(original: Path, adapter: Path, ids: Tensor) -> Tensor:
    """Stock PEFT on the stock original, put together by hand."""
    stock = transformers.MixtralForCausalLM.from_pretrained(original, dtype=torch.float32)
    return logits_of(peft.PeftModel.from_pretrained(stock, str(adapter)), ids)


@pytest.mark.parametrize("train_embeddings", [False, True], ids=["factors", "embeddings"])
def test_auto_peft_loads_the_adapter_on_its_original(
    original: Path, ids: Tensor, tmp_path: Path, train_embeddings: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was loaded on random weights, with a line among others (28.8 nats instead of 3.2 on the demo)."""
    monkeypatch.chdir(original.parent)
    run = tmp_path / "run/adapter"
    trained = save_adapter(tmp_path / "small", run, quantization="nf4", scale=0.03, train_embeddings=train_embeddings)
    assert named_base(run) == original.name
    folders = [run]
    for layout in ("peft", "peft-per-expert"):
        export(str(run), str(tmp_path / layout), format=layout)
        folders.append(tmp_path / layout)
    quantisation = logits_of(load_mixtral(original, dtype="float32"), ids) - logits_of(
        load_mixtral(original, quantization="none", dtype="float32"), ids
    )
    for folder in folders:
        assert named_base(folder) == original.name
        got = auto_peft_logits(folder, ids)
        torch.testing.assert_close(got, expected_logits(original, folder, ids), rtol=1e-5, atol=1e-5)
        assert (got - logits_of(trained, ids)).norm() < 2 * quantisation.norm()
        found = find_model(str(folder))
        assert found.base.path == tmp_path / "small"  # ours goes on in 4 bits
        ours = load_found(found, dtype="float32")
        torch.testing.assert_close(logits_of(ours, ids), logits_of(trained, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reader", [transformers.AutoModelForCausalLM, transformers.MixtralForCausalLM])
def test_transformers_refuses_a_four_bit_folder(original: Path, tmp_path: Path, reader: Any) -> None:
    with pytest.raises(ValueError, match=r"mixcn_nf4_mixtral|no `quant_method` attribute"):
        reader.from_pretrained(tmp_path / "small")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "small").eos_token == "</s>"


def test_a_folder_of_the_former_format_still_loads(original: Path, ids: Tensor, tmp_path: Path) -> None:
    former = shutil.copytree(tmp_path / "small", tmp_path / "former")
    config = json.loads((former / "config.json").read_text())
    config["model_type"] = "mixtral"
    config["quantization_config"]["quant_method"] = config["quantization_config"].pop("format")
    assert config["quantization_config"]["quant_method"] == QUANTIZATION_METHOD
    (former / "config.json").write_text(json.dumps(config))
    logits = [logits_of(load_mixtral(tmp_path / name, dtype="float32"), ids) for name in ("small", "former")]
    assert torch.equal(*logits)
    save_adapter(former, tmp_path / "adapter", quantization="nf4")
    assert named_base(tmp_path / "adapter") == original.name


def test_a_base_is_found_again_from_any_folder(
    original: Path, ids: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter names its base without the path, which this machine remembers by the base's content."""
    monkeypatch.chdir(tmp_path)
    quantize("original", "again", dtype="float32")
    save_adapter(Path("again"), Path("on_four_bits"), quantization="nf4")
    save_adapter(Path("original"), Path("dense"))
    export("on_four_bits", "exported", format="peft-per-expert")
    monkeypatch.chdir(os.sep)
    for name in ("on_four_bits", "dense", "exported"):
        assert named_base(tmp_path / name) == original.name
        assert str(tmp_path) not in "".join(path.read_text() for path in (tmp_path / name).glob("*.json"))
    assert find_model(str(tmp_path / "on_four_bits")).base.path == tmp_path / "again"
    assert find_model(str(tmp_path / "exported")).base.path == tmp_path / "again"
    assert find_model(str(tmp_path / "dense")).base.path == original
    assert logits_of(load_found(find_model(str(tmp_path / "dense")), dtype="float32"), ids).isfinite().all()
    monkeypatch.setenv("MIXCN_CACHE", str(tmp_path / "another machine"))
    with pytest.raises(FileNotFoundError, match=r"its base .original., which is not there. Move it back"):
        find_model(str(tmp_path / "dense"))


def test_a_hub_id_stays_one(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_from_hub", lambda name, files: {"owner/name": original}[name])
    quantize("owner/name", str(tmp_path / "of_hub"), dtype="float32")
    save_adapter(tmp_path / "of_hub", tmp_path / "adapter", quantization="nf4")
    assert named_base(tmp_path / "adapter") == "owner/name"


def test_when_the_four_bits_are_gone_the_original_takes_their_place(
    original: Path, ids: Tensor, tmp_path: Path
) -> None:
    trained = save_adapter(tmp_path / "small", tmp_path / "adapter", quantization="nf4")
    shutil.rmtree(tmp_path / "small")
    found = find_model(str(tmp_path / "adapter"))
    assert found.base.path == original
    ours = load_found(found, dtype="float32")  # quantised on loading, to the same bits
    torch.testing.assert_close(logits_of(ours, ids), logits_of(trained, ids), rtol=1e-4, atol=1e-4)


def test_an_unknown_original_is_not_named(
    original: Path, ids: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Naming the 4-bit folder would have an older one loaded with random weights."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # peft would ask a hub, and wait for it
    (tmp_path / "small" / IDENTITY_FILE).unlink()
    trained = save_adapter(tmp_path / "small", tmp_path / "adapter", quantization="nf4")
    assert named_base(tmp_path / "adapter") is None
    with pytest.raises((ValueError, TypeError, OSError)):
        peft.AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "adapter"))
    ours = load_found(find_model(str(tmp_path / "adapter")), dtype="float32")
    torch.testing.assert_close(logits_of(ours, ids), logits_of(trained, ids), rtol=1e-4, atol=1e-4)


def test_a_dequantised_export_is_a_stock_mixtral(original: Path, ids: Tensor, tmp_path: Path) -> None:
    trained = save_adapter(tmp_path / "small", tmp_path / "adapter", quantization="nf4")
    export(str(tmp_path / "adapter"), str(tmp_path / "out"), base="dequantised")
    assert Checkpoint(tmp_path / "out").config["model_type"] == "mixtral"
    stock: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits_of(stock, ids), logits_of(trained, ids), rtol=1e-4, atol=1e-4)
