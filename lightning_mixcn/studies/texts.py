"""The texts that a study is of, as its command names them."""

from collections.abc import Sequence
from dataclasses import replace

from lightning_mixcn.errors import UserError
from lightning_mixcn.text import (
    DocumentSet,
    Source,
    all_documents,
    parse_sources,
    read_corpus,
)
from lightning_mixcn.text.corpus.sources import DocumentUnit, list_files


def named_path(entry: str) -> tuple[str, str]:
    """Name and path of ``name=PATH``. ValueError if it is not that."""
    name, equals, path = entry.partition("=")
    if not (name and equals and path):
        raise UserError(f"`text` has {entry!r}: expected name=PATH, e.g. zh=data/zh.jsonl")
    return name, path


def read_documents(text: Sequence[str], text_key: str, document_unit: DocumentUnit) -> list[DocumentSet]:
    """All documents of the sources, unpacked where they were not yet.

    Args:
        text: Each ``name=PATH``: a file, a folder or a glob.
        text_key: JSONL key, or parquet or Arrow column, of the text.
        document_unit: What a document is in a text file.

    Raises:
        ValueError: no source, a name twice, an argument of another form, or text that cannot be used.
        FileNotFoundError: a path matches no file.
    """
    if not text:
        raise UserError("`text` is empty. Give at least one source as name=PATH, e.g. zh=data/zh.jsonl")
    entries = [Source(*named_path(entry), text_key=text_key) for entry in text]
    documents = []
    for index, source in enumerate(parse_sources(entries, "text", Source)):
        place = f"text[{index}]"
        if document_unit != "file" and any(file.format == "text" for file in list_files(source, place)):
            source = replace(source, document_unit=document_unit)
        documents.append(all_documents(read_corpus(source, place)))
    return documents
