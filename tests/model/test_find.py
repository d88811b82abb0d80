"""From what a person names to a loaded model; logits are compared with stock PEFT's."""

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

from lightning_mixcn.model import find_model, load_found
from lightning_mixcn.model.checkpoints.identity import IDENTITY_FILE
from lightning_mixcn.model.convert.quantize import quantize
from lightning_mixcn.testing import save_tiny_mixtral
from tests.model.adapters_on_disk import save_adapter


def logits_of(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids).logits
    return logits


def test_a_checkpoint_is_its_own_base(tiny: Path, ids: Tensor) -> None:
    found = find_model(str(tiny))
    assert (found.base.path, found.adapters, found.tokenizer) == (tiny, (), tiny)
    model = load_found(found, quantization="none", dtype="float32")
    stock = transformers.MixtralForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    torch.testing.assert_close(logits_of(model, ids), logits_of(stock, ids), rtol=1e-4, atol=1e-4)
    assert not model.training


def test_a_four_bit_folder_is_a_base(tiny: Path, tmp_path: Path) -> None:
    quantize(str(tiny), str(tmp_path / "small"))
    assert find_model(str(tmp_path / "small")).base.path == tmp_path / "small"


@pytest.mark.parametrize(
    "lora",
    [{}, {"use_rslora": True}, {"rank_pattern": {"w1": 2, "q_proj": 3}}, {"target_modules": ["w1", "gate"]},
     {"layers_to_transform": [1], "target_modules": ["q_proj", "w1", "w2"]}],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")  # PEFT's own rewriting
def test_an_adapter_and_its_run_load_as_they_were_saved(
    tiny: Path, ids: Tensor, tmp_path: Path, lora: dict[str, Any]
) -> None:
    saved = save_adapter(tiny, tmp_path / "run/adapter", **lora)
    for name in ("run", "run/adapter"):
        found = find_model(str(tmp_path / name))
        folders = [adapter.folder for adapter in found.adapters]
        assert (found.base.path, folders, found.tokenizer) == (tiny, [tmp_path / "run/adapter"], tiny)
    model = load_found(found, quantization="none", dtype="float32")
    assert not any(parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(logits_of(model, ids), logits_of(saved, ids), rtol=1e-5, atol=1e-5)


def test_trained_embeddings_come_along(tiny: Path, ids: Tensor, tmp_path: Path) -> None:
    saved = save_adapter(tiny, tmp_path, train_embeddings=True)
    model = load_found(find_model(str(tmp_path)), quantization="none", dtype="float32")
    torch.testing.assert_close(logits_of(model, ids), logits_of(saved, ids), rtol=1e-5, atol=1e-5)


def test_ranks_that_differ_by_layer(tiny: Path, ids: Tensor, tmp_path: Path) -> None:
    """As other tools save them: no padding to the largest rank, and α of single projections."""
    config = peft.LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=["q_proj", "o_proj"],
        rank_pattern={r"layers\.1\.self_attn\.q_proj": 5},
        alpha_pattern={"o_proj": 2},
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    stock: Any = transformers.MixtralForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    theirs: Any = peft.get_peft_model(stock, config).eval()
    theirs.save_pretrained(tmp_path)
    model = load_found(find_model(str(tmp_path)), quantization="none", dtype="float32")
    torch.testing.assert_close(logits_of(model, ids), logits_of(theirs, ids), rtol=1e-4, atol=1e-4)


def test_targets_that_differ_by_layer(tiny: Path, ids: Tensor, tmp_path: Path) -> None:
    """w2 of one layer, q_proj of the other, the router of both."""
    saved = save_adapter(tiny, tmp_path, target_modules=r".*(layers\.1\..*\.w2|layers\.0\..*q_proj|\.gate)")
    model = load_found(find_model(str(tmp_path)), quantization="none", dtype="float32")
    torch.testing.assert_close(logits_of(model, ids), logits_of(saved, ids), rtol=1e-5, atol=1e-5)


def test_the_tokenizer_of_the_adapter_goes_before_the_bases(tiny: Path, tmp_path: Path) -> None:
    save_adapter(tiny, tmp_path)
    shutil.copyfile(tiny / "tokenizer.json", tmp_path / "tokenizer.json")
    assert find_model(str(tmp_path)).tokenizer == tmp_path


def test_the_base_is_known_by_its_content(tiny: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny, tmp_path / "base")
    save_adapter(base, tmp_path / "adapter")
    recorded = json.loads((tmp_path / "adapter" / IDENTITY_FILE).read_text())
    assert recorded["path"] == "base"
    shutil.rmtree(base)
    save_tiny_mixtral(base, seed=1)
    with pytest.raises(ValueError, match=rf"made from the base {base} \(sha256 {recorded['sha256'][:12]}.*another one"):
        find_model(str(tmp_path / "adapter"))


def test_an_adapter_in_its_run_finds_the_base_of_the_run(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_adapter(tiny, tmp_path / "run" / "adapter")
    monkeypatch.setenv("MIXCN_CACHE", str(tmp_path / "empty cache"))
    with pytest.raises(FileNotFoundError, match="needs its base"):
        find_model(str(tmp_path / "run"))
    (tmp_path / "run" / "config.yaml").write_text(json.dumps({"model": {"init_args": {"base": str(tiny)}}}))
    assert find_model(str(tmp_path / "run")).base.path == tiny


def test_a_base_in_four_bits_counts_as_what_it_was_quantised_from(tiny: Path, tmp_path: Path) -> None:
    save_adapter(tiny, tmp_path / "adapter")
    quantize(str(tiny), str(tmp_path / "small"))
    config = tmp_path / "adapter/adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(tmp_path / "small")}))
    assert find_model(str(tmp_path / "adapter")).base.path == tmp_path / "small"


def test_what_is_no_model_is_refused(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    save_adapter(tiny, tmp_path / "adapter")
    config = tmp_path / "adapter/adapter_config.json"
    for name, message in {
        "nowhere": "is not there",
        "empty": "is no model: it has neither config.json",
        "run": "has no adapter/. Train it with the callback AdapterCheckpoint",
    }.items():
        with pytest.raises(FileNotFoundError, match=message):
            find_model(str(tmp_path / name))
    (tmp_path / "adapter" / IDENTITY_FILE).unlink()  # else it says which base was loaded
    for base, kind, message in (
        (str(tmp_path / "gone"), FileNotFoundError, "needs its base"),
        (None, ValueError, "no base"),
    ):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": base}))
        with pytest.raises(kind, match=message):
            find_model(str(tmp_path / "adapter"))


def test_another_revision_of_a_base_is_not_taken_for_the_main_one(tiny: Path, tmp_path: Path) -> None:
    save_adapter(tiny, tmp_path)
    file = tmp_path / "adapter_config.json"
    settings = json.loads(file.read_text()) | {"base_model_name_or_path": "someone/mixtral", "revision": "v2"}
    file.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="belongs to the revision 'v2' of 'someone/mixtral'"):
        find_model(str(tmp_path))


def test_two_adapters_are_for_export(tiny: Path, tmp_path: Path) -> None:
    save_adapter(tiny, tmp_path)
    found = find_model(str(tmp_path))
    with pytest.raises(ValueError, match="Merge them first with `mixcn export`"):
        load_found(found.with_adapter(found.adapters[0]))
