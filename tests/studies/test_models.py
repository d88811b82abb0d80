"""Which columns a table has, and that a base is the base."""

from pathlib import Path

import peft
import pytest
import torch

from lightning_mixcn.model import load_mixtral
from lightning_mixcn.model.find import find_model
from lightning_mixcn.model.options import ModelOptions
from lightning_mixcn.studies.models import (
    EvaluatedModel,
    LoadedModels,
    evaluated_models,
    model_fingerprint,
)
from lightning_mixcn.testing import byte_tokenizer
from tests.model.adapters_on_disk import save_adapter


@pytest.fixture
def adapter(tiny_base: Path, tmp_path: Path) -> Path:
    save_adapter(tiny_base, tmp_path / "adapter")
    return tmp_path / "adapter"


def names(models: list[EvaluatedModel]) -> list[tuple[str, bool]]:
    return [(model.name, model.switched_off) for model in models]


def test_columns(tiny_base: Path, adapter: Path) -> None:
    found = find_model(str(adapter))
    assert names(evaluated_models("x", found, None)) == [("base", True), ("adapted", False)]
    assert names(evaluated_models("x", found, "both")) == [("base", True), ("adapted", False)]
    assert names(evaluated_models("x", found, "on")) == [("adapted", False)]
    (base,) = evaluated_models("x", found, "off")
    assert (base.name, base.found.adapters, base.switched_off) == ("base", (), False)
    plain = find_model(str(tiny_base))
    assert names(evaluated_models("x", plain, None)) == names(evaluated_models("x", plain, "off")) == [("model", False)]
    with pytest.raises(ValueError, match="'x' has no adapter"):
        evaluated_models("x", plain, "both")


@pytest.mark.parametrize("train_embeddings", [False, True])
def test_the_base_is_the_base(train_embeddings: bool, tiny_base: Path, tmp_path: Path) -> None:
    """With trained embeddings, too, which are still there when the adapter is off."""
    trained = save_adapter(tiny_base, tmp_path / "adapter", train_embeddings=train_embeddings)
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        expected = {
            "base": load_mixtral(tiny_base, quantization="none", dtype="float32")(input_ids=ids).logits,
            "adapted": trained(input_ids=ids).logits,
        }
    loaded = LoadedModels(ModelOptions("none", "float32"), torch.device("cpu"))
    models = evaluated_models("x", find_model(str(tmp_path / "adapter")), None)
    assert models[0].switched_off is not train_embeddings
    for model in models:
        with loaded.use(model) as module, torch.no_grad():
            torch.testing.assert_close(module(input_ids=ids).logits, expected[model.name])


def test_another_tokenizer_is_the_adapters_own(tiny_base: Path, adapter: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["今天"])
    tokenizer.save_pretrained(adapter)
    base, adapted = evaluated_models("x", find_model(str(adapter)), None)
    assert not base.switched_off
    assert base.tokenizer().vocab_size + 1 == adapted.tokenizer().vocab_size


def test_a_fingerprint_tells_models_apart(tiny_base: Path, adapter: Path, tmp_path: Path) -> None:
    one = model_fingerprint(find_model(str(adapter)))
    save_adapter(tiny_base, tmp_path / "other", lora_alpha=9)
    two = model_fingerprint(find_model(str(tmp_path / "other")))
    assert one["base_sha256"] == two["base_sha256"]
    assert one["adapter_sha256"] != two["adapter_sha256"]
    assert peft.PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path == tiny_base.name
