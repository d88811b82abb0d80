"""In-context label mapping: does a model take a rule from its prompt? Asked on held-out text, without a data set.

Continued pre-training without the old language loses in-context learning early, and the new language's perplexity does
not show it (Elhady, Agirre and Artetxe 2025, https://arxiv.org/abs/2506.00288). Their benchmark is language-agnostic;
here prompts are made of a source's own text. A prompt shows snippets of a few documents, each with the label of its
document, and asks for the label of one more snippet: one that the prompt has shown (*seen*: recall), or another one of
those documents (*unseen*: the label goes with the subject). Labels are letters that are dealt anew for each prompt, so
nothing but the prompt tells them.

Legend: N tokens of a row, V vocabulary, Q queries, L labels, P prompts.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from string import ascii_uppercase
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lightning_mixcn.arguments import Seed, check_arguments
from lightning_mixcn.errors import NonFiniteError, UserError
from lightning_mixcn.model.experts.observe import unobserved
from lightning_mixcn.model.reference import evaluating
from lightning_mixcn.studies.processes import is_first, over_ranks
from lightning_mixcn.studies.significance import PairedTest, paired_test, wilson_interval
from lightning_mixcn.studies.tables import aligned
from lightning_mixcn.text import DocumentSet, TextTokenizer

from .options import Characters, Labels, Prompts, Shots

QUERIES = ("seen", "unseen")
_MOST_SNIPPETS = 1000  # from the beginning of a document
_DRAWS = 100  # of documents for a prompt, before a source is said to have none that will do


@dataclass(frozen=True)
class FewShotOptions:
    """Make of the prompts.

    Args:
        prompts: Number of prompts of each source, P.
        labels: Number of documents in a prompt, each with a label of its own; chance is one in so many.
        shots: Snippets that the prompt shows of each document.
        characters: Largest number of characters of a snippet.
        seed: Seed of documents, snippets, their order and their labels.

    Raises:
        ValueError: a number is out of its range.
    """

    prompts: Prompts = 200
    labels: Labels = 2
    shots: Shots = 4
    characters: Characters = 32
    seed: Seed = 0

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_arguments(FewShotOptions, vars(self))


class FewShotPrompt(NamedTuple):
    """Demonstrations, and two queries with the same answer.

    Args:
        shown: Snippets with their labels, a line each.
        queries: Snippet to label, by its kind in `QUERIES`.
        labels: A label for each document of the prompt.
        answer: Number of the queries' document, from 0.
    """

    shown: str
    queries: dict[str, str]
    labels: tuple[str, ...]
    answer: int


class FewShotAccuracy(TypedDict):
    """Answers to one kind of query.

    Args:
        accuracy: Share of prompts whose own label is the most likely one.
        low: Lower end of its 95 % interval (Wilson).
        high: Upper end.
        chance: Accuracy of a model that does not read the prompt.
        right: Whether each prompt was answered right, 0 or 1, ``[P]``.
    """

    accuracy: float
    low: float
    high: float
    chance: float
    right: list[int]


FewShotFigures = dict[str, FewShotAccuracy]  # by kind of query


class QueryRow(NamedTuple):
    """A prompt and a query as tokens.

    Args:
        ids: int64 ``[N]``, up to where the label is to come; from BOS on where the tokenizer puts it.
        label_ids: int64 ``[L]``, the token of each label.
    """

    ids: Tensor
    label_ids: Tensor


def make_prompts(documents: DocumentSet, options: FewShotOptions) -> list[FewShotPrompt]:
    """Draw the prompts of a source; they depend on its text and the options, not on a tokenizer.

    Args:
        documents: The source.
        options: Make of the prompts.

    Raises:
        ValueError: the source has too few documents that are long enough and unlike each other.
    """
    # A character is a byte at least.
    least = (options.shots + 1) * options.characters // 2
    long_enough = [
        place for place, index in enumerate(documents.indices) if documents.corpus.num_bytes_of(index) >= least
    ]
    found = []
    for number in range(options.prompts):
        random = Random(f"{options.seed} {documents.name} {number}")
        for _ in range(_DRAWS if len(long_enough) >= options.labels else 0):
            texts = [documents.text(place) for place in random.sample(long_enough, options.labels)]
            if groups := _draw_snippets(texts, options, random):
                found.append(_prompt(groups, number % options.labels, random))
                break
        else:
            raise UserError(
                f"the source {documents.name!r} has no {options.labels} documents of {options.shots + 1} different "
                f"snippets of {options.characters} characters for the few-shot probe. Give more or longer documents, "
                "or lower `shots`, `labels` or `characters`"
            )
    return found


def _draw_snippets(texts: Sequence[str], options: FewShotOptions, random: Random) -> list[list[str]] | None:
    """Draw snippets of each document, one more than is shown; ``None`` if there are too few, or two are alike."""
    groups = []
    for text in texts:
        pieces = textwrap.wrap(text[: _MOST_SNIPPETS * options.characters], options.characters, break_on_hyphens=False)
        pieces = list(dict.fromkeys(piece for piece in pieces if 2 * len(piece) >= options.characters))
        if len(pieces) <= options.shots:
            return None
        groups.append(random.sample(pieces, options.shots + 1))
    drawn = {piece for group in groups for piece in group}
    return groups if len(drawn) == len(groups) * (options.shots + 1) else None


def _prompt(groups: Sequence[Sequence[str]], answer: int, random: Random) -> FewShotPrompt:
    labels = random.sample(ascii_uppercase[: len(groups)], len(groups))
    shown = [(piece, label) for (_, *pieces), label in zip(groups, labels, strict=True) for piece in pieces]
    random.shuffle(shown)
    unseen, *pieces = groups[answer]
    lines = "".join(f"{piece}: {label}\n" for piece, label in shown)
    return FewShotPrompt(lines, {"seen": random.choice(pieces), "unseen": unseen}, tuple(labels), answer)


def query_row(tokenizer: TextTokenizer, prompt: FewShotPrompt, kind: str) -> QueryRow:
    """Encode a prompt and one of its queries.

    Args:
        tokenizer: The model's.
        prompt: The prompt.
        kind: One of `QUERIES`.

    Raises:
        ValueError: the tokenizer has no token of its own for a label.
    """
    text = f"{prompt.shown}{prompt.queries[kind]}:"
    # With their labels, so that text and label are cut where the tokenizer cuts them.
    rows = tokenizer.encode_batch([f"{text} {label}" for label in prompt.labels])
    ends = {row[-1] for row in rows}
    if any(row[:-1] != rows[0][:-1] for row in rows) or len(ends) < len(rows):
        raise UserError(
            f"the tokenizer does not write the labels {', '.join(prompt.labels)} as one token each after a colon, as "
            "the few-shot probe needs. Leave the probe out"
        )
    return QueryRow(torch.tensor([*tokenizer.begin_ids, *rows[0][:-1]]), torch.tensor([row[-1] for row in rows]))


def label_log_likelihoods(
    model: nn.Module, rows: Sequence[QueryRow], tokens: int, *, rank: int = 0, num_ranks: int = 1, title: str = ""
) -> Tensor:
    """Compute the log-likelihood of each label after its row; all ranks call it with the same rows and share them.

    Several rows are one forward pass, in which they do not see each other. Under FSDP a forward pass is a conversation
    of all ranks, so each does as many.

    Args:
        model: A model of `load_moe`, perhaps with adapters, in evaluation mode.
        rows: Queries, with the same number of labels.
        tokens: Tokens of a forward pass; a longer row is one of its own.
        rank: This rank.
        num_ranks: Number of ranks.
        title: Words before the progress bar.

    Returns:
        float64 ``[Q, L]`` in nats, on the CPU, the same on every rank.
    """
    device = next(model.parameters()).device
    found_QL = torch.zeros(len(rows), len(rows[0].label_ids), dtype=torch.float64, device=device)
    packs = _packs([len(row.ids) for row in rows], tokens)
    turns = tqdm(range(0, len(packs), num_ranks), desc=title, delay=2, leave=False, disable=not is_first())
    for turn in turns:
        if turn + rank < len(packs):
            mine = packs[turn + rank]
            found_QL[mine] = _score([rows[number] for number in mine], model, device)
        else:
            _score(rows[:1], model, device)
    return over_ranks(found_QL).cpu()


def _packs(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Cut the numbers of rows into runs of at most so many tokens."""
    packs: list[list[int]] = []
    room = 0
    for number, length in enumerate(lengths):
        if not packs or length > room:
            packs.append([])
            room = tokens
        packs[-1].append(number)
        room -= length
    return packs


def _score(rows: Sequence[QueryRow], model: nn.Module, device: torch.device) -> Tensor:
    """Score rows in one forward pass; gives float64 ``[rows, L]``."""
    ids_N = torch.cat([row.ids for row in rows])
    positions_N = torch.cat([torch.arange(len(row.ids)) for row in rows])
    ends_Q = torch.tensor([len(row.ids) for row in rows]).cumsum(0) - 1
    with torch.no_grad():
        output = model(
            input_ids=ids_N[None].to(device),
            position_ids=positions_N[None].to(device),
            logits_to_keep=ends_Q.to(device),
            output_router_logits=False,
        )
    log_QV: Tensor = output.logits[0].float().log_softmax(-1)
    return log_QV.gather(1, torch.stack([row.label_ids for row in rows]).to(device)).double()


def probe_few_shot(
    model: nn.Module,
    tokenizer: TextTokenizer,
    documents: DocumentSet,
    options: FewShotOptions,
    tokens: int,
    *,
    rank: int = 0,
    num_ranks: int = 1,
) -> FewShotFigures:
    """Measure the accuracy on a source; all ranks call it. Randomness and the modules' modes stay as they are.

    Args:
        model: A model of `load_moe` or the PeftModel around it.
        tokenizer: The model's.
        documents: The source.
        options: Make of the prompts.
        tokens: Tokens of a forward pass.
        rank: This rank.
        num_ranks: Number of ranks.

    Returns:
        Accuracy by kind of query, the same on every rank.

    Raises:
        ValueError: the source does not give the prompts, or they are longer than the model reads.
        FloatingPointError: a likelihood is not finite.
    """
    prompts = make_prompts(documents, options)
    rows = [query_row(tokenizer, prompt, kind) for kind in QUERIES for prompt in prompts]
    config: Any = model.config
    longest, limit = max(len(row.ids) for row in rows), config.max_position_embeddings
    if longest > limit:
        raise UserError(
            f"a few-shot prompt from {documents.name!r} has {longest} tokens, and the model reads {limit}. "
            "Lower `shots`, `labels` or `characters`"
        )
    with evaluating(model), unobserved():
        title = f"few-shot probe of {documents.name}"
        found_QL = label_log_likelihoods(model, rows, tokens, rank=rank, num_ranks=num_ranks, title=title)
    if not found_QL.isfinite().all():
        raise NonFiniteError(
            f"The few-shot probe of {documents.name!r} gives likelihoods that are not finite. Check the checkpoint or "
            "the adapter that was loaded"
        )
    # Of equal ones the first counts, which is the right one as often as any: answers take turns.
    chosen_Q = found_QL.argmax(1).tolist()
    answers = [prompt.answer for prompt in prompts]
    halves = (chosen_Q[: len(prompts)], chosen_Q[len(prompts) :])
    return {
        kind: _accuracy([int(mine == answer) for mine, answer in zip(chosen, answers, strict=True)], options)
        for kind, chosen in zip(QUERIES, halves, strict=True)
    }


def _accuracy(right: list[int], options: FewShotOptions) -> FewShotAccuracy:
    accuracy = sum(right) / len(right)
    low, high = wilson_interval(accuracy, len(right))
    return {"accuracy": accuracy, "low": low, "high": high, "chance": 1 / options.labels, "right": right}


def compare_few_shot(first: FewShotFigures, second: FewShotFigures) -> dict[str, PairedTest]:
    """Compare two models on the same prompts with McNemar's exact test, by kind of query.

    Args:
        first: Figures of one model.
        second: Figures of the other.
    """
    return {kind: paired_test(first[kind]["right"], second[kind]["right"]) for kind in first}


def few_shot_table(figures: dict[str, dict[str, FewShotFigures]]) -> str:
    """Return a table of all sources and kinds of query.

    Args:
        figures: By model, then by source.
    """
    models = list(figures)
    head = ["few-shot accuracy", "query", "prompts", "chance", *models]
    lines = [head + (["difference", "p"] if len(models) > 1 else [])]
    for source in figures[models[0]]:
        for kind in QUERIES:
            found = [figures[model][source][kind] for model in models]
            cells = [source, kind, str(len(found[0]["right"])), f"{found[0]['chance']:.2g}"]
            cells += [f"{one['accuracy']:.3f} [{one['low']:.3f}, {one['high']:.3f}]" for one in found]
            if len(models) > 1:
                test = compare_few_shot(*(figures[model][source] for model in models[:2]))[kind]
                cells += [f"{test.difference:+.3f}", f"{test.p_value:.3g}"]
            lines.append(cells)
    return aligned(lines) + "\n[95 % interval]; p of McNemar's exact test on the same prompts"
