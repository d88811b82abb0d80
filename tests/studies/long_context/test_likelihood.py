"""Likelihood by context length, against sums made by hand from one forward pass of transformers."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import MixtralForCausalLM

from lightning_mixcn.model import load_mixtral
from lightning_mixcn.model.inference.prefill import ChunkedPrefill
from lightning_mixcn.studies.long_context.likelihood import DocumentRow, evaluate_lengths, longest_documents
from lightning_mixcn.testing import run_distributed
from lightning_mixcn.text import (
    DocumentSet,
    Source,
    TextTokenizer,
    all_documents,
    load_tokenizer,
    read_corpus,
)

LENGTHS = [32, 64, 128, 256]


def document(length: int, source: int = 0) -> DocumentRow:
    ids = torch.randint(3, 259, (length,), generator=torch.Generator().manual_seed(length))
    return DocumentRow(source, ids, torch.arange(length) % 3)


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> nn.Module:
    return load_mixtral(tiny_base, quantization="none", dtype="float32")


def test_every_length_is_the_documents_cut_to_it(model: nn.Module, tiny_base: Path) -> None:
    rows = [document(300), document(100), document(64, source=1)]
    stock = MixtralForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    result = evaluate_lengths(model, rows, ["zh", "en"], LENGTHS, chunk=48)
    assert not result.out_of_memory
    assert [(entry["source"], entry["length"]) for entry in result.likelihoods] == [
        (source, length) for source in ("zh", "en") for length in LENGTHS
    ]
    for entry in result.likelihoods:
        own = [row for row in rows if ["zh", "en"][row.source] == entry["source"]]
        cut = [(row.ids[: entry["length"]], row.byte_counts[: entry["length"]]) for row in own]
        with torch.no_grad():
            nats = sum(
                F.cross_entropy(stock(input_ids=ids[None]).logits[0, :-1], ids[1:], reduction="sum").double().item()
                for ids, _ in cut
            )
        tokens, text_bytes = sum(len(ids) - 1 for ids, _ in cut), sum(int(counts[1:].sum()) for _, counts in cut)
        assert (entry["tokens"], entry["bytes"]) == (tokens, text_bytes)
        assert entry["nll_nats_per_token"] == pytest.approx(nats / tokens, abs=1e-4)
        assert entry["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
        assert entry["bits_per_byte"] == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-5)
        assert entry["documents"] == len(own)
        assert entry["documents_in_full"] == sum(len(row.ids) >= entry["length"] for row in own)


def test_buckets_add_up(model: nn.Module) -> None:
    entries = evaluate_lengths(model, [document(100)], ["zh"], LENGTHS, chunk=512).likelihoods
    assert [entry["bucket_tokens"] for entry in entries] == [31, 32, 36, 0]
    assert entries[-1]["bucket_nll_nats_per_token"] is None
    assert entries[-1]["nll_nats_per_token"] == entries[-2]["nll_nats_per_token"]
    whole = sum((entry["bucket_nll_nats_per_token"] or 0) * entry["bucket_tokens"] for entry in entries)
    assert whole == pytest.approx(entries[-1]["nll_nats_per_token"] * 99)


def test_a_source_without_documents_has_no_figures(model: nn.Module) -> None:
    entries = evaluate_lengths(model, [document(40, source=1)], ["zh", "en"], [32], chunk=16).likelihoods
    assert [entry["source"] for entry in entries] == ["en"]


def test_what_does_not_fit_is_left_out(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that is refused, and one that lets a pass fail later on."""
    rows, advance = [document(300), document(100)], ChunkedPrefill.advance
    expected = evaluate_lengths(model, rows, ["zh"], LENGTHS[:2], chunk=48).likelihoods

    def small(self: ChunkedPrefill, *args: Any) -> Any:
        if self.tokens + len(args[0]) > 90:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return advance(self, *args)

    monkeypatch.setattr(ChunkedPrefill, "advance", small)
    result = evaluate_lengths(model, rows, ["zh"], LENGTHS, chunk=48)
    assert result.out_of_memory == [128, 256]
    assert result.likelihoods == expected

    def none(self: ChunkedPrefill, *args: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(ChunkedPrefill, "__init__", none)
    assert evaluate_lengths(model, rows, ["zh"], LENGTHS, chunk=48) == ([], LENGTHS)


def test_another_error_rises(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: ChunkedPrefill, *args: Any) -> None:
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(ChunkedPrefill, "advance", wrong)
    with pytest.raises(RuntimeError, match="multiplied"):
        evaluate_lengths(model, [document(40)], ["zh"], [32], chunk=16)


def test_a_likelihood_that_is_not_finite_is_an_error(tiny_base: Path) -> None:
    broken = load_mixtral(tiny_base, quantization="none", dtype="float32")
    nn.init.constant_(broken.lm_head.weight, math.nan)
    with pytest.raises(FloatingPointError, match="source 'zh' at 32 tokens is nan nats"):
        evaluate_lengths(broken, [document(40)], ["zh"], [32], chunk=16)


def test_modes_and_random_numbers_stay(tiny_base: Path) -> None:
    model = load_mixtral(tiny_base, quantization="none", dtype="float32")
    model.train()
    model.model.norm.eval()
    before = torch.get_rng_state()
    evaluate_lengths(model, [document(40)], ["zh"], [32], chunk=16)
    assert torch.equal(torch.get_rng_state(), before)
    assert [name for name, module in model.named_modules() if not module.training] == ["model.norm"]


def evaluate_as_a_rank(base: str, memory: int) -> dict[str, Any]:
    """Evaluate this rank's documents, with room for a number of tokens. Returns: what came of it."""
    rank, num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    documents = []
    for length in (300, 100, 64, 40, 33, 20):
        ids = torch.randint(3, 259, (length,), generator=torch.Generator().manual_seed(length))
        documents.append(DocumentRow(length % 2, ids, torch.ones_like(ids)))
    mine = documents if num_ranks == 1 else [[], documents[:1], documents[1:]][rank]
    passes, advance = 0, ChunkedPrefill.advance

    def counting(self: ChunkedPrefill, *arguments: Any) -> Any:
        nonlocal passes
        passes += 1
        torch.distributed.barrier()  # as a sharded model would: every rank takes part in every pass
        if self.tokens + len(arguments[0]) > memory:
            raise torch.OutOfMemoryError
        return advance(self, *arguments)

    ChunkedPrefill.advance = counting  # type: ignore[method-assign, assignment]  # in a process of this rank's own
    model = load_mixtral(base, quantization="none", dtype="float32")
    result = evaluate_lengths(model, mine, ["even", "odd"], [32, 64, 256], 48)
    return {"passes": passes, "likelihoods": result.likelihoods, "out_of_memory": result.out_of_memory}


@pytest.mark.multiprocess
@pytest.mark.parametrize("memory", [1000, 200], ids=["enough", "out of memory"])
def test_ranks_with_0_and_1_and_5_documents_give_what_one_gives(memory: int, tiny_base: Path) -> None:
    """Rank 1, with one long document, runs out of memory alone."""
    (one,) = run_distributed(evaluate_as_a_rank, 1, str(tiny_base), memory)
    three = run_distributed(evaluate_as_a_rank, 3, str(tiny_base), memory)
    assert one["out_of_memory"] == ([] if memory == 1000 else [256])
    assert len({rank["passes"] for rank in three}) == 1
    assert three[0] == three[1] == three[2]
    assert three[0]["out_of_memory"] == one["out_of_memory"]
    for got, expected in zip(three[0]["likelihoods"], one["likelihoods"], strict=True):
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            # The same float64 sums in another order.
            assert got[name] == (pytest.approx(value, rel=1e-12) if isinstance(value, float) else value)


@pytest.fixture
def tokenizer(tiny_base: Path) -> TextTokenizer:
    return load_tokenizer(tiny_base)


@pytest.fixture
def sets(tmp_path: Path) -> list[DocumentSet]:
    texts = {"zh": ["中文" * 10, "短", "长一些的中文" * 10], "en": ["", "a" * 50, "b" * 30]}
    found = []
    for name, documents in texts.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(json.dumps({"text": text}) for text in documents), encoding="utf-8")
        found.append(all_documents(read_corpus(Source(name, str(path)))))
    return found


def test_the_longest_of_each_source_come_first(sets: list[DocumentSet], tokenizer: TextTokenizer) -> None:
    rows = longest_documents(sets, tokenizer, documents=2, max_tokens=1000)
    assert [(row.source, len(row.ids)) for row in rows] == [(0, 181), (0, 61), (1, 51), (1, 31)]
    assert all(row.ids[0] == tokenizer.bos_id and row.byte_counts[0] == 0 for row in rows)
    assert tokenizer.decode(rows[0].ids[1:].tolist()) == "长一些的中文" * 10
    assert int(rows[0].byte_counts.sum()) == 180


def test_a_document_is_cut(sets: list[DocumentSet], tokenizer: TextTokenizer) -> None:
    rows = longest_documents(sets, tokenizer, documents=1, max_tokens=41)
    assert [(len(row.ids), len(row.byte_counts)) for row in rows] == [(41, 41), (41, 41)]


def test_ranks_have_each_document_once(sets: list[DocumentSet], tokenizer: TextTokenizer) -> None:
    def share(rank: int, num_ranks: int) -> list[list[int]]:
        rows = longest_documents(sets, tokenizer, documents=9, max_tokens=99, rank=rank, num_ranks=num_ranks)
        return [row.ids.tolist() for row in rows]

    whole = share(0, 1)
    assert len(whole) == 5  # the empty one has nothing to predict
    assert sorted(row for rank in range(4) for row in share(rank, 4)) == sorted(whole)
