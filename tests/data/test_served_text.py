"""What is served is what was trained: ids and likelihoods of stock transformers on an exported folder, and of rows."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from lightning.pytorch import Trainer

from lightning_mixcn.data import PretrainDataModule
from lightning_mixcn.demo.base import set_document_separator
from lightning_mixcn.model.architectures import MODEL_TYPES
from lightning_mixcn.model.export.command import export
from lightning_mixcn.modules import PretrainModule
from lightning_mixcn.testing import save_tiny_model
from lightning_mixcn.text import Source

DOCUMENTS = ["北京是中国的首都。", "Once upon a time, there was a fox.", "a"]
# The demo's base is made as Qwen3's family here, of a byte-level tokenizer that puts no BOS before a text.
KINDS = [*MODEL_TYPES, "the demo's base"]
BEGIN = {"mixtral": [1], "olmoe": [], "qwen3_moe": [], "the demo's base": [2]}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def base(kind: str, tmp_path: Path) -> Path:
    folder = save_tiny_model(tmp_path / "base", "qwen3_moe" if kind == "the demo's base" else kind)
    if kind == "the demo's base":
        set_document_separator(folder, "</s>")
    return folder


@pytest.fixture
def exported(base: Path, tmp_path: Path) -> Path:
    export(str(base), str(tmp_path / "exported"))
    return tmp_path / "exported"


def data_of(base: Path, folder: Path, texts: list[str], **choices: Any) -> PretrainDataModule:
    source = folder / "zh.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return PretrainDataModule(
        [Source("zh", str(source), max_epochs=1)], tokenizer=str(base), sequence_length=256,
        micro_batch_size=1, num_streams=1, num_workers=0, **choices,
    )  # fmt: skip


@pytest.mark.parametrize("packing", ["documents", "best_fit", "concatenate"])
def test_a_row_begins_with_the_ids_of_the_exported_tokenizer(
    kind: str, base: Path, exported: Path, tmp_path: Path, packing: Any
) -> None:
    data = data_of(base, tmp_path, DOCUMENTS, packing=packing, val_fraction=0.0)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    row, numbers, labels = (batch[name][0] for name in ("input_ids", "document_ids", "labels"))
    served = transformers.AutoTokenizer.from_pretrained(exported)
    expected = {text: served(text).input_ids for text in DOCUMENTS}
    assert all(ids[: len(BEGIN[kind])] == BEGIN[kind] for ids in expected.values())
    assert len(expected["a"]) == 1 + len(BEGIN[kind])
    rows = [row[numbers == number].tolist() for number in range(len(DOCUMENTS))]
    assert sorted(rows) == sorted([*ids, served.eos_token_id] for ids in expected.values())
    # Of a document that sees none before it, nothing predicts the first token.
    firsts = [int(labels[numbers == number][0]) for number in range(len(DOCUMENTS))]
    assert firsts[0] == -100
    assert all((label == -100) == (packing != "concatenate") for label in firsts[1:])


def test_bits_per_byte_are_those_of_stock_transformers(base: Path, exported: Path, tmp_path: Path) -> None:
    """Over text that has a token before it, whose bytes are counted: without BOS all but the first token's."""
    text = DOCUMENTS[0]
    (tmp_path / "held_out.jsonl").write_text(json.dumps({"text": text}), encoding="utf-8")
    data = data_of(base, tmp_path, DOCUMENTS, val_sources=[Source("zh", str(tmp_path / "held_out.jsonl"))])
    module = PretrainModule(str(base), quantization="none", dtype="float32")
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.validate(module, data, verbose=False)
    found = module.source_likelihoods["val"]["zh"]

    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()
    ids = torch.tensor([[*tokenizer(text).input_ids, tokenizer.eos_token_id]])
    with torch.no_grad():
        log_probabilities = model(ids).logits[0, :-1].double().log_softmax(-1)
    nats = -log_probabilities[torch.arange(ids.shape[1] - 1), ids[0, 1:]]
    # A token of 北 is one of its three bytes, all of which are credited to the first.
    first = 0 if tokenizer(text).input_ids[0] == tokenizer.bos_token_id else 3
    size = len(text.encode()) - first
    assert (found["tokens"], found["bytes"]) == (ids.shape[1] - 1, size)
    assert found["nll_nats_per_token"] == pytest.approx(float(nats.mean()), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(float(nats[:-1].sum()) / math.log(2) / size, rel=1e-5)
