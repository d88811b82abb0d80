"""The subcommand ``vocab``: pieces of another language, trained, merged into a base's tokenizer, and counted."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from lightning_mixcn.arguments import Between, Count, Name, Seed
from lightning_mixcn.errors import UserError
from lightning_mixcn.files.atomic import check_file, check_output, new_file, new_folder
from lightning_mixcn.files.hub import local_folder

if TYPE_CHECKING:
    from .merge import ChosenPieces

_SHOWN = 12
_TOKENIZER = "tokenizer.json or tokenizer.model"


def train(
    corpus: list[str],
    *,
    out: str,
    vocab_size: Annotated[int, Between(4, 10**7)] = 20_000,
    model_type: Literal["bpe", "unigram"] = "bpe",
    character_coverage: Annotated[float, Between(0.98, 1)] = 0.9995,
    max_piece_characters: Annotated[int, Between(1, 512)] = 16,
    max_sentences: Annotated[int, Between(0, 10**12)] = 0,
    text_key: Name = "text",
    seed: Seed = 0,
) -> None:
    """Train SentencePiece pieces on a corpus, for `mixcn vocab merge`.

    Text is streamed to SentencePiece, without a copy on disk; it keeps all sentences in memory. On one core, 4 MB of
    Chinese gave 8,000 BPE pieces in 11 s, unigram ones in 25 s; for gigabytes draw a sample with `max_sentences`.

    Args:
        corpus: Files, folders, globs or URLs: JSONL, text, parquet or Arrow, compressed or not.
        out: SentencePiece model to write, e.g. pieces.model; it must not exist.
        vocab_size: Pieces, SentencePiece's three special ones included.
        model_type: ``bpe``, whose pieces a BPE tokenizer's merges all reach, or ``unigram``.
        character_coverage: Share of all characters of the text that get a piece of their own; the rarest get none.
        max_piece_characters: Characters of the longest piece.
        max_sentences: Lines drawn at random, of the whole corpus, more than 100; 0 takes all.
        text_key: JSONL key, or parquet or Arrow column, of the text.
        seed: Seed of that draw.

    Raises:
        ValueError: the text is too little for so many pieces, or broken, or an option is out of its range.
        FileNotFoundError: a path matches no file.
        FileExistsError: OUT is there.
    """
    from lightning_mixcn.tokenizer.sentencepiece import read_pieces

    from .training import corpus_files, iterate_texts, sentences, train_pieces

    target = Path(out).expanduser().resolve()
    check_file(target)
    if 0 < max_sentences <= 100:  # SentencePiece's own bound, as the others
        raise UserError(f"`max_sentences={max_sentences}`: expected more than 100, or 0 for all")
    lines = sentences(iterate_texts(corpus_files(corpus, text_key), "reading"))
    model = train_pieces(
        lines, vocab_size=vocab_size, model_type=model_type, character_coverage=character_coverage,
        max_piece_characters=max_piece_characters, max_sentences=max_sentences, seed=seed,
    )  # fmt: skip
    with new_file(target) as unfinished:
        unfinished.write_bytes(model)
    pieces = read_pieces(str(target))
    made = f"{target}: {len(pieces):,} pieces, such as {' '.join(pieces[:_SHOWN])}"
    print(made, file=sys.stderr, flush=True)


def merge(
    base_tokenizer: str,
    pieces: str,
    *,
    out: str,
    script: str = "Han",
    max_pieces: Count | None = None,
    unreachable: Literal["drop", "complete"] = "drop",
) -> None:
    """Merge new pieces into a base's tokenizer; old languages tokenize as before. Takes seconds.

    New pieces get the ids after the old ones, and scores (or merges) below all of them. `mixcn fit` takes the folder
    as `model.init_args.tokenizer`, with `train_embeddings: true`.

    Args:
        base_tokenizer: Folder or hub id of the base, or of its tokenizer: a BPE, SentencePiece's or byte-level.
        pieces: SentencePiece model, of `mixcn vocab train` or any other, or a folder with a tokenizer.model.
        out: Folder to make; it must not exist, or be empty. Beside the tokenizer it gets vocabulary_extension.json:
            what was left out, and why.
        script: Scripts of whose characters alone a new piece may consist, a blank in front aside: Han, Cyrillic …, by
            Unicode's names, several joined by +. A language that the base knows and that is written in the same script
            does not tokenize as before, nor does any with the script ``any``.
        max_pieces: Most new pieces, the first ones of the file; null takes all.
        unreachable: A BPE arrives at a piece by joining two, so some of a ``unigram`` model are out of its reach.
            ``drop`` leaves them out; ``complete`` adds their beginnings as pieces, with the lowest scores.

    Raises:
        ValueError: no SentencePiece model, no BPE, no such script, or nothing new.
        FileNotFoundError: no such tokenizer.
        FileExistsError: OUT is not empty.
    """
    from lightning_mixcn.tokenizer.sentencepiece import read_pieces

    from .merge import choose_pieces, mergeable_base, write_tokenizer
    from .scripts import ScriptFilter

    target = Path(out).expanduser().resolve()
    check_output(target)
    keeps, candidates = ScriptFilter(script), read_pieces(pieces)
    folder = local_folder(base_tokenizer, holding=_TOKENIZER)
    base = mergeable_base(folder)
    chosen = choose_pieces(base, candidates, keeps, max_pieces=max_pieces, unreachable=unreachable)
    write_tokenizer(folder, base, chosen, script, target)
    print(_summary(chosen, len(base.pieces), script))


def report(
    tokenizer: list[str],
    *,
    text: list[str],
    out: str | None = None,
    max_documents: Count | None = None,
    text_key: Name = "text",
    document_unit: Literal["file", "line", "blank-line"] = "file",
) -> None:
    """Count characters a token, and tokens that are single bytes, of several tokenizers on several texts.

    About 1 MB of text a second and tokenizer.

    Args:
        tokenizer: Folders, hub ids or SentencePiece models.
        text: Sources, each as name=PATH: JSONL, text, parquet or Arrow; a file, a folder, a glob or an URL.
        out: Folder to make, with vocabulary.csv, vocabulary.json and vocabulary.txt; null prints the table only.
        max_documents: Most documents of each source, the first ones; null takes all.
        text_key: JSONL key, or parquet or Arrow column, of the text.
        document_unit: Extent of a document in a text file: ``file``, ``line`` or ``blank-line``.

    Raises:
        ValueError: a tokenizer or a text is broken, or an argument of another form.
        FileNotFoundError: no such tokenizer or text.
        FileExistsError: OUT is not empty.
    """
    from lightning_mixcn.studies.tables import csv_text

    from .report import CountingTokenizer, as_records, as_table, count_texts
    from .training import iterate_texts, named_files

    target = None if out is None else Path(out).expanduser().resolve()
    if target is not None:
        check_output(target)
    files = named_files(text, text_key, document_unit)
    paths = [_tokenizer(path) for path in tokenizer]
    names = [path.name for path in paths]
    names = [name if names.count(name) == 1 else given for name, given in zip(names, tokenizer, strict=True)]
    counting = [CountingTokenizer(path, name) for path, name in zip(paths, names, strict=True)]
    counts = []
    for source, of_source in files.items():
        counts += count_texts(counting, source, iterate_texts(of_source, source), max_documents)
    table = as_table(counts)
    if target is not None:
        with new_folder(target) as folder:
            records = as_records(counts)
            content = json.dumps(records, ensure_ascii=False, indent=2)
            for name, written in (("csv", csv_text(records)), ("json", f"{content}\n"), ("txt", f"{table}\n")):
                (folder / f"vocabulary.{name}").write_text(written, encoding="utf-8")
    print(table)


def _tokenizer(path: str) -> Path:
    """Return a SentencePiece model, or the folder that a name means."""
    file = Path(path).expanduser()
    return file if file.is_file() else local_folder(path, holding=_TOKENIZER)


def _summary(chosen: "ChosenPieces", present: int, script: str) -> str:
    shown = " ".join(chosen.unreachable[:_SHOWN])
    lines = [
        (chosen.candidates, "pieces given"),
        (chosen.other_script, f"of another script than {script}, left out"),
        (chosen.already_there, "in the base already, or twice"),
        (len(chosen.unreachable), f"that its merges never reach, left out{f': {shown} …' if shown else ''}"),
        (chosen.beyond_max, "beyond max_pieces, left out"),
        (len(chosen.helpers), "beginnings of others, added to reach these"),
        (len(chosen.added), f"added in all: {present:,} → {present + len(chosen.added):,}"),
    ]
    return "\n".join(f"{number:8,}  {what}" for number, what in lines if number)
