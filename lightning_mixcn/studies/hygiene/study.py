"""The whole of ``mixcn data``: sources opened, read once, decided on, and written out."""

import gzip
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any, Literal

import yaml
import zstandard
from tqdm.auto import tqdm

from lightning_mixcn.errors import UserError, require_package
from lightning_mixcn.files.atomic import new_folder
from lightning_mixcn.files.configuration import read_configuration
from lightning_mixcn.masking import mask_secrets
from lightning_mixcn.studies.parts import StudyParts, finished_before, say
from lightning_mixcn.text import Corpus, Source, parse_sources, read_corpus
from lightning_mixcn.text.corpus.listings import list_files
from lightning_mixcn.text.corpus.sources import DEFAULT_KEY

from .contamination import QuestionIndex
from .decisions import KEPT, REASONS, Decisions, decide
from .options import HygieneOptions
from .questions import Question, benchmark_questions
from .report import Findings, summarise, write_report
from .scan import Scan, Texts, scan

Compression = Literal["none", "gz", "zst"]
_SUFFIXES = {"none": "", "gz": ".gz", "zst": ".zst"}
_REPORT = "report.json"


def study_texts(
    sources: Sequence[str],
    out: Path,
    against: Sequence[str],
    options: HygieneOptions,
    *,
    keep: bool,
    compression: Compression | None = None,
) -> None:
    """Report on the texts of some sources, and write those that stay.

    Args:
        sources: As in the command.
        out: Folder to make.
        against: Files of questions and names of tasks.
        options: Thresholds.
        keep: True to write the documents that stay.
        compression: Of these files; None takes that of each source's files where it is the same for all.
    """
    if options.max_changed > 0:
        require_package("rensa", "the search for near duplicates", ", or set `max_changed=0` to keep them")
    corpora = open_sources(sources, options)
    questions = benchmark_questions(against, options.question_key, options.data_dir)
    texts, index = Texts(corpora), QuestionIndex([question.text for question in questions])
    read = {
        "sources": {corpus.source.name: corpus.fingerprint for corpus in corpora},
        "questions": hashlib.blake2b(json.dumps(questions).encode(), digest_size=16).hexdigest(),
        "near duplicates": options.max_changed > 0,
    }
    settings = {**read, **asdict(options), "kept": keep, "compression": compression}
    if finished_before(out, _REPORT, settings):
        return
    parts = StudyParts(out, read)
    found = scan(texts, index, parts, with_signatures=options.max_changed > 0)
    decisions = decide(texts, found, options)
    with new_folder(out) as folder:
        if keep:
            _write_kept(folder / "kept", texts, decisions, compression)
        _write_lines(folder / "removed.jsonl", _removed(texts, decisions, questions))
        _write_lines(folder / "overlaps.jsonl", _overlaps(texts, found, questions))
        findings = Findings(texts, found, decisions, questions, index.ignored)
        write_report(folder, summarise(findings), findings, settings)
    parts.delete()
    say(f"{int((decisions.reasons != KEPT).sum())} of {len(texts)} documents are to go: {out / 'report.html'}")


def open_sources(sources: Sequence[str], options: HygieneOptions) -> list[Corpus]:
    """Open the documents of files, folders and globs, as one source, or of a run's YAML, as its sources.

    Raises:
        ValueError: the YAML has no sources of text, or a file is damaged.
        FileNotFoundError: a path matches no file.
    """
    if not sources:
        raise UserError("`sources` is empty. Give files, folders or globs, or the YAML of a run")
    if len(sources) == 1 and Path(sources[0]).suffix in (".yaml", ".yml"):
        place, entries = "sources", _of_run(Path(sources[0]).expanduser())
        parsed = parse_sources(entries, place, Source)
    else:
        place, path = "source", sources[0] if len(sources) == 1 else list(sources)
        parsed = parse_sources([{"name": "text", "path": path, "text_key": options.text_key}], place, Source)
        if any(file.format == "text" for file in list_files(parsed[0], "sources")):
            parsed = (replace(parsed[0], document_unit=options.document_unit),)
    return [
        read_corpus(source, f"{place}[{number}]", on_bad_record=options.on_bad_record)
        for number, source in enumerate(parsed)
    ]


def _of_run(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise UserError(f"`sources={str(path)!r}` is no file. Give the YAML of a run, or files, folders or globs")
    content = yaml.safe_load(read_configuration(path, str(path)))
    try:
        entries = content["data"]["init_args"]["sources"]
    except (KeyError, TypeError) as error:
        raise UserError(
            f"`sources={str(path)!r}` has no `data.init_args.sources`. Give the YAML of a run that trains on text"
        ) from error
    if "Instruct" in str(content["data"].get("class_path")) or not isinstance(entries, list):
        raise UserError(
            f"`sources={str(path)!r}`: expected a list of sources of text (PretrainDataModule), not of conversations"
        )
    return entries


def _write_kept(folder: Path, texts: Texts, decisions: Decisions, compression: Compression | None) -> None:
    folder.mkdir()
    with tqdm(total=len(texts), desc="writing", unit=" documents", delay=1) as progress:
        for corpus, start in zip(texts.corpora, texts.starts, strict=False):
            source = corpus.source
            key = (source.columns or {}).get(DEFAULT_KEY, source.text_key)
            suffix = _SUFFIXES[compression or _compression_of(corpus)]
            with _opened(folder / f"{source.name}.jsonl{suffix}") as file:
                for index in range(len(corpus)):
                    if decisions.reasons[start + index] == KEPT:
                        file.write(json.dumps({key: corpus.text(index)}, ensure_ascii=False).encode() + b"\n")
                    progress.update()


def _compression_of(corpus: Corpus) -> Compression:
    suffixes = {Path(str(store.file)).suffix for store in corpus.stores}
    return "gz" if suffixes == {".gz"} else "zst" if suffixes == {".zst"} else "none"


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a file to write; the same documents give the same bytes."""
    with path.open("wb") as raw:
        if path.suffix == ".gz":
            with gzip.GzipFile("", "wb", 6, raw, mtime=0) as packed, io.BufferedWriter(packed) as file:
                yield file
        elif path.suffix == ".zst":
            with zstandard.ZstdCompressor().stream_writer(raw, closefd=False) as file:
                yield file
        else:
            yield raw


def _write_lines(path: Path, records: Iterator[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _removed(texts: Texts, decisions: Decisions, questions: Sequence[Question]) -> Iterator[dict[str, Any]]:
    for number, reason in enumerate(decisions.reasons.tolist()):
        if reason == KEPT:
            continue
        record = _place(texts, number) | {"reason": REASONS[reason]}
        other, value = int(decisions.others[number]), round(float(decisions.values[number]), 4)
        if REASONS[reason] in ("exact", "near"):
            record["duplicate_of"] = _place(texts, other)
        if REASONS[reason] == "question":
            record["question"] = mask_secrets(questions[other].place)
        yield record if REASONS[reason] == "exact" else record | {"value": value}


def _overlaps(texts: Texts, found: Scan, questions: Sequence[Question]) -> Iterator[dict[str, Any]]:
    for document, question, share in found.overlaps.tolist():
        place = mask_secrets(questions[int(question)].place)
        yield _place(texts, int(document)) | {"question": place, "share": round(share, 4)}


def _place(texts: Texts, number: int) -> dict[str, Any]:
    origin = texts.origin(number)
    return {"source": origin.source, "file": mask_secrets(str(origin.file)), "line": origin.record}
