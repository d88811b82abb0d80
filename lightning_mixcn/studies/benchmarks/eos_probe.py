"""How likely a model is to stop after a line break inside a document.

A model trained on lines, each closed with EOS, stops at the first line break: it reasons over one line and answers
nothing. That is the likely cause of a published GSM8K score of 0.00 after adaptation with line-wise packing.

Legend: S positions of a row, G documents.
"""

from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lightning_mixcn.data.loaders import EvaluationLoader
from lightning_mixcn.errors import UserError
from lightning_mixcn.studies.processes import is_first
from lightning_mixcn.studies.significance import paired_test
from lightning_mixcn.studies.tables import aligned
from lightning_mixcn.text import (
    DocumentSet,
    EvaluationSet,
    PlainText,
    Source,
    TextTokenizer,
    all_documents,
    parse_sources,
    read_corpus,
)

_SEQUENCE_LENGTH = 2048


class EosProbe(TypedDict):
    """Probabilities of EOS inside the documents of a source.

    Args:
        newlines: Line breaks with text after them in the same document.
        mean_after_newline: Mean probability of EOS after them; ``None`` without any.
        share_above_half: Share of them at which it is above one half: greedy decoding surely stops there.
        others: Positions of text that follow no line break.
        mean_elsewhere: Mean probability of EOS there.
        document_sums: Sum of the probabilities after line breaks ``[G]``.
        document_newlines: Line breaks ``[G]``.
    """

    newlines: int
    mean_after_newline: float | None
    share_above_half: float | None
    others: int
    mean_elsewhere: float | None
    document_sums: list[float]
    document_newlines: list[int]


def probed_documents(entries: Sequence[str], argument: str = "eos_probe") -> list[DocumentSet]:
    """Read the texts of ``name=PATH`` entries.

    Args:
        entries: Each a file, a folder or a glob, as sources of a run; JSONL texts are under ``text``.
        argument: Name of the argument, for errors.

    Raises:
        ValueError: an entry without a name or path, a name given twice, or files that hold no text.
        FileNotFoundError: no such file.
    """
    sources = []
    for entry in entries:
        name, _, path = entry.partition("=")
        if not (name and path):
            raise UserError(f"`{argument}` has {entry!r}: expected name=PATH, e.g. zh=data/zh.jsonl")
        sources.append(Source(name, path))
    parsed = parse_sources(sources, argument, Source)
    return [all_documents(read_corpus(source, f"{argument}[{place}]")) for place, source in enumerate(parsed)]


def probe_eos(model: nn.Module, tokenizer: TextTokenizer, documents: DocumentSet, max_tokens: int) -> EosProbe:
    """Measure the probability of EOS after each line break of a source, given the document up to there.

    Args:
        model: A model of `load_moe`, perhaps with adapters, in evaluation mode.
        tokenizer: The model's.
        documents: The source.
        max_tokens: Tokens of its beginning, in rows of 2,048 tokens; at least one row.
    """
    device = next(model.parameters()).device
    config: Any = model.config
    length = min(_SEQUENCE_LENGTH, config.max_position_embeddings, max(2, max_tokens))
    rows = EvaluationSet([documents], PlainText(tokenizer), length, max(1, max_tokens // length))
    loader = EvaluationLoader(rows, 1, num_ranks=1, rank=0)
    newline_ids = newline_tokens(tokenizer)
    sums, counts = np.zeros(len(rows)), np.zeros(len(rows), dtype=np.int64)
    after: list[Tensor] = []
    elsewhere, others = 0.0, 0
    for batch in tqdm(loader, desc=f"EOS in {documents.name}", delay=2, leave=False, disable=not is_first()):
        place_S, probability_S, follows_S = _row(model, batch, newline_ids, tokenizer.eos_id, device)
        for index, probability in zip(place_S[follows_S].tolist(), probability_S[follows_S].tolist(), strict=True):
            sums[index] += probability
            counts[index] += 1
        after.append(probability_S[follows_S])
        elsewhere += float(probability_S[~follows_S].sum())
        others += int((~follows_S).sum())
    found, newlines = torch.cat(after), int(counts.sum())
    return {
        "newlines": newlines,
        "mean_after_newline": float(sums.sum()) / newlines if newlines else None,
        "share_above_half": float((found > 0.5).double().mean()) if newlines else None,
        "others": others,
        "mean_elsewhere": elsewhere / others if others else None,
        "document_sums": sums[counts > 0].tolist(),
        "document_newlines": counts[counts > 0].tolist(),
    }


def newline_tokens(tokenizer: TextTokenizer) -> Tensor:
    """Return ids of the tokens whose text ends with a line break, int64."""
    ids = [index for index in range(tokenizer.vocab_size) if tokenizer.decode([index]).endswith("\n")]
    return torch.tensor(ids, dtype=torch.int64)


def compare_probes(first: EosProbe, second: EosProbe) -> dict[str, float | None]:
    """Return the difference of the means after line breaks, with a sign-flip test over documents.

    Args:
        first: Probe of one model.
        second: Probe of the other; with another tokenizer, documents may have been cut elsewhere, and are not paired
            then. Nor is a single document.

    Returns:
        ``difference``, ``standard_error``, ``p_value``; ``None`` where there is nothing to compare.
    """
    one, two = first["mean_after_newline"], second["mean_after_newline"]
    difference = None if one is None or two is None else two - one
    if difference is None or first["document_newlines"] != second["document_newlines"]:
        return {"difference": difference, "standard_error": None, "p_value": None}
    test = paired_test(first["document_sums"], second["document_sums"])
    # The mean over line breaks is the sum over documents divided by line breaks.
    error = test.standard_error * test.documents / first["newlines"]
    alone = test.documents < 2  # one document says nothing about others
    return {
        "difference": difference,
        "standard_error": None if alone else error,
        "p_value": None if alone else test.p_value,
    }


def probe_table(probes: dict[str, dict[str, EosProbe]]) -> str:
    """Return a table of all sources.

    Args:
        probes: By model, then by source.
    """
    models = list(probes)
    head = ["P(EOS) in documents", "", "line breaks", *(f"after them, {model}" for model in models)]
    head += [f"elsewhere, {model}" for model in models] + (["difference", "p"] if len(models) > 1 else [])
    lines = [head]
    for source in probes[models[0]]:
        found = [probes[model][source] for model in models]
        cells = [source, "", str(found[0]["newlines"])]
        cells += [_shown(probe["mean_after_newline"]) for probe in found]
        cells += [_shown(probe["mean_elsewhere"]) for probe in found]
        if len(models) > 1:
            test = compare_probes(*found[:2])
            error = "" if test["standard_error"] is None else f" ±{test['standard_error']:.2g}"
            cells.append("-" if test["difference"] is None else f"{test['difference']:+.3g}{error}")
            cells.append("-" if test["p_value"] is None else f"{test['p_value']:.3g}")
        lines.append(cells)
    return aligned(lines)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _row(
    model: nn.Module, batch: dict[str, Tensor], newline_ids: Tensor, eos_id: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Look at each text token of a row that follows another one.

    Returns:
        Its document, P(EOS) instead of it, and whether the token before it in the document ends with a line break:
        ``[n]`` each, int64, float64, bool, on the CPU.
    """
    ids_S, text_S, document_S = (batch[name][0] for name in ("input_ids", "text_mask", "document_index"))
    # As if every text token were EOS: the loss of that label is minus the log of what is asked for.
    labels_S = torch.where(text_S, eos_id, -100)
    with torch.no_grad():
        output = model(
            input_ids=ids_S[None].to(device),
            position_ids=batch["position_ids"].to(device),
            labels=labels_S[None].to(device),
            output_router_logits=False,
        )
    probability_S = (-output.nll[0].double()).exp().cpu()
    newline_S = torch.isin(ids_S, newline_ids)
    follows_S = torch.cat([torch.zeros(1, dtype=torch.bool), newline_S[:-1] & (document_S[:-1] == document_S[1:])])
    return document_S[text_S], probability_S[text_S], follows_S[text_S]
