"""Stock transformers' mixture without an expert, made by taking its weights away, and its likelihood of documents."""

import copy
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from lightning_mixcn.data.loaders import EvaluationLoader
from lightning_mixcn.text import (
    EvaluationSet,
    PlainText,
    Source,
    all_documents,
    load_tokenizer,
    read_corpus,
)

Batch = dict[str, Tensor]


def stock_model(folder: Path) -> Any:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def without_expert(model: Any, layer: int, expert: int, mode: str) -> Any:
    """Mode zero: the expert's last matrix is zero. Mode mask: the layer has one expert less, as has its router."""
    model = copy.deepcopy(model)
    mlp = model.model.layers[layer].mlp
    with torch.no_grad():
        if mode == "zero":
            mlp.experts.down_proj[expert] = 0
            return model
        kept = [other for other in range(len(mlp.gate.weight)) if other != expert]
        mlp.gate.weight = nn.Parameter(mlp.gate.weight[kept])
        mlp.experts.gate_up_proj = nn.Parameter(mlp.experts.gate_up_proj[kept])
        mlp.experts.down_proj = nn.Parameter(mlp.experts.down_proj[kept])
        mlp.experts.num_experts = len(kept)
    return model


def write_texts(path: Path, alphabet: str, documents: int, seed: int = 0) -> Path:
    draw = random.Random(seed)
    texts = ("".join(draw.choices(alphabet, k=draw.randint(3, 40))) for _ in range(documents))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def evaluation_batches(base: Path, files: Sequence[Path], length: int, rows: int, max_rows: int | None) -> list[Batch]:
    """Return the batches that `mixcn validate` evaluates."""
    documents = [all_documents(read_corpus(Source(file.stem, str(file)))) for file in files]
    found = EvaluationSet(documents, PlainText(load_tokenizer(base)), length, max_rows)
    return list(EvaluationLoader(found, rows, num_ranks=1, rank=0))


@torch.no_grad()
def text_bits_per_byte(model: Any, batches: Sequence[Batch], source: int) -> float:
    """Each piece of a document alone through the model, its bits of text added up."""
    nats, text_bytes = 0.0, 0
    for batch in batches:
        for row in range(len(batch["input_ids"])):
            documents_S = batch["document_index"][row]
            for document in sorted(set(documents_S.tolist()) - {-1}):
                place = (documents_S == document).nonzero().flatten()
                if int(batch["source_ids"][row, place[0]]) != source or len(place) < 2:
                    continue
                ids = batch["input_ids"][row, place]
                nll = F.cross_entropy(model(ids[None]).logits[0, :-1].float(), ids[1:], reduction="none").double()
                is_text = batch["text_mask"][row, place][1:]
                nats += float(nll[is_text].sum())
                text_bytes += int(batch["label_bytes"][row, place][1:][is_text].sum())
    return nats / math.log(2) / text_bytes
