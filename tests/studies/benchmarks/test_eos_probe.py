"""EOS after line breaks: beside stock transformers, and on a model that was taught to stop there."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from lightning_mixcn.model import build_mixtral, load_mixtral
from lightning_mixcn.studies.benchmarks.eos_probe import (
    compare_probes,
    newline_tokens,
    probe_eos,
    probe_table,
    probed_documents,
)
from lightning_mixcn.testing import tiny_mixtral_config
from lightning_mixcn.text import TextTokenizer, load_tokenizer

TEXTS = ["one\ntwo\nthree", "no line break", "\n\nfour\n", "中\n文"]


@pytest.fixture
def tokenizer(tiny_base: Path) -> TextTokenizer:
    return load_tokenizer(tiny_base)


@pytest.fixture
def entry(tmp_path: Path) -> str:
    lines = (json.dumps({"text": text}) + "\n" for text in TEXTS)
    (tmp_path / "texts.jsonl").write_text("".join(lines), encoding="utf-8")
    return f"zh={tmp_path / 'texts.jsonl'}"


def by_hand(folder: Path, tokenizer: TextTokenizer) -> tuple[list[list[float]], list[float]]:
    """Probabilities of EOS after line breaks, document by document, and elsewhere, one document a forward pass."""
    stock = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    after: list[list[float]] = []
    elsewhere = []
    for text in TEXTS:
        ids = [tokenizer.bos_id, *tokenizer.encode_batch([text])[0]]
        with torch.no_grad():
            probability_S = stock(torch.tensor([ids])).logits[0].double().softmax(-1)[:, tokenizer.eos_id]
        mine = []
        for place in range(len(ids) - 1):  # behind the last token the document ends
            if place and tokenizer.decode([ids[place]]) == "\n":
                mine.append(float(probability_S[place]))
            else:
                elsewhere.append(float(probability_S[place]))
        after += [mine] if mine else []
    return after, elsewhere


def test_probabilities_are_those_of_stock_transformers(tiny_base: Path, tokenizer: TextTokenizer, entry: str) -> None:
    """Documents share a row here, and do not see each other."""
    after, elsewhere = by_hand(tiny_base, tokenizer)
    model = load_mixtral(tiny_base, quantization="none", dtype="float32").eval()
    (documents,) = probed_documents([entry])
    found = probe_eos(model, tokenizer, documents, max_tokens=512)
    assert found["document_newlines"] == [len(part) for part in after] == [2, 2, 1]
    assert found["document_sums"] == pytest.approx([sum(part) for part in after], rel=1e-5)
    flat = [value for part in after for value in part]
    assert found["newlines"] == len(flat)
    assert found["mean_after_newline"] == pytest.approx(sum(flat) / len(flat), rel=1e-5)
    assert found["mean_elsewhere"] == pytest.approx(sum(elsewhere) / len(elsewhere), rel=1e-5)
    assert found["others"] == len(elsewhere)


def test_a_model_that_learnt_single_lines_is_found_out(tokenizer: TextTokenizer, entry: str) -> None:
    """Trained by a plain loop on `line EOS`, where the line keeps its break, EOS comes after line breaks."""
    model: Any = build_mixtral(tiny_mixtral_config(), quantization="none", dtype="float32", seed=1)
    (documents,) = probed_documents([entry])
    before = probe_eos(model, tokenizer, documents, max_tokens=512)
    nn.Module.requires_grad_(model, True)
    lines = [line + "\n" for line in ("one", "two", "four", "no line break", "中")]
    rows = [[tokenizer.bos_id, *ids, tokenizer.eos_id] for ids in tokenizer.encode_batch(lines)]
    parameters = [parameter for name, parameter in model.named_parameters() if "embed" in name or "lm_head" in name]
    optimizer = torch.optim.Adam(parameters, lr=0.05)
    for _ in range(15):
        loss = sum(model(input_ids=torch.tensor([row]), labels=torch.tensor([row])).loss for row in rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = probe_eos(model.eval(), tokenizer, documents, max_tokens=512)
    assert before["mean_after_newline"] is not None
    assert after["mean_after_newline"] is not None
    assert before["mean_after_newline"] < 0.05
    assert after["mean_after_newline"] > 0.5
    assert after["share_above_half"] is not None
    assert after["share_above_half"] > 0.5
    assert (after["mean_elsewhere"] or 0) < 0.2
    test = compare_probes(before, after)
    assert test["difference"] == pytest.approx(after["mean_after_newline"] - before["mean_after_newline"])
    assert test["p_value"] == pytest.approx(2 / 2**3)  # three documents, all the same way
    table = probe_table({"base": {"zh": before}, "adapted": {"zh": after}})
    assert "after them, adapted" in table


def test_another_tokenizer_is_not_paired(tiny_base: Path, tokenizer: TextTokenizer, entry: str) -> None:
    model = load_mixtral(tiny_base, quantization="none", dtype="float32").eval()
    (documents,) = probed_documents([entry])
    found = probe_eos(model, tokenizer, documents, max_tokens=512)
    other = found | {"document_newlines": [1, 1, 1]}
    assert compare_probes(found, other)["p_value"] is None
    one = found | {"document_newlines": [5], "document_sums": [0.5]}
    assert compare_probes(one, one) == {"difference": 0.0, "standard_error": None, "p_value": None}


def test_text_without_line_breaks(tiny_base: Path, tokenizer: TextTokenizer, tmp_path: Path) -> None:
    (tmp_path / "flat.txt").write_text("flat", encoding="utf-8")
    model = load_mixtral(tiny_base, quantization="none", dtype="float32").eval()
    (documents,) = probed_documents([f"en={tmp_path / 'flat.txt'}"])
    found = probe_eos(model, tokenizer, documents, max_tokens=64)
    assert (found["newlines"], found["mean_after_newline"]) == (0, None)
    assert compare_probes(found, found)["difference"] is None
    assert "-" in probe_table({"model": {"en": found}})


def test_line_breaks_of_a_tokenizer(tokenizer: TextTokenizer) -> None:
    assert newline_tokens(tokenizer).tolist() == tokenizer.encode_batch(["\n"])[0]


@pytest.mark.parametrize("entry", ["zh", "=x", "zh="])
def test_bad_entries_are_refused(entry: str) -> None:
    with pytest.raises(ValueError, match="expected name=PATH"):
        probed_documents([entry])
