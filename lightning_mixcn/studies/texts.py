"""The texts that a study reads, as its command names them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal

from lightning_mixcn.arguments import Between, Name, RowTokens, check_arguments
from lightning_mixcn.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from lightning_mixcn.text import DocumentSet


@dataclass(frozen=True)
class StudyText:
    """Texts, and the rows that are cut of them.

    Args:
        text: Sources, each as name=PATH, e.g. --text zh=data/zh.jsonl en=data/en: JSONL, text, parquet or Arrow; a
            file, a folder or a glob. Several documents that the model has not seen; to compare languages, the one of
            interest first.
        max_tokens: Tokens of each source, in whole rows, at least one row.
        sequence_length: Tokens of a row. Documents in it do not see each other; a longer one goes on in the next row.
        micro_batch_size: Rows in a forward pass.
        text_key: JSONL key, or parquet or Arrow column, of the text.
        document_unit: Extent of a document in a text file: ``file``, ``line`` or ``blank-line``. Errors and intervals
            need several documents.

    Raises:
        ValueError: a number is too small.
    """

    text: Sequence[Name] = ()
    max_tokens: Annotated[int, Between(2, 10**12)] = 32_768
    sequence_length: RowTokens = 2048
    micro_batch_size: Annotated[int, Between(1, 2**16)] = 1
    text_key: Name = "text"
    document_unit: Literal["file", "line", "blank-line"] = "file"

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_arguments(StudyText, vars(self))

    @property
    def rows(self) -> int:
        """Return the number of rows of each source."""
        return max(1, self.max_tokens // self.sequence_length)

    @property
    def paths(self) -> dict[str, str]:
        """Return the sources' paths by their names."""
        return dict(map(named_path, self.text))

    def documents(self) -> list[DocumentSet]:
        """Read all documents. Raises: as `read_documents`."""
        return read_documents(self.text, self.text_key, self.document_unit)

    def check_context(self, config: PreTrainedConfig) -> int:
        """Return how many tokens a model reads. ValueError if that is less than a row."""
        longest: int = config.max_position_embeddings
        longest = min(longest, getattr(config, "sliding_window", None) or longest)
        if self.sequence_length > longest:
            raise UserError(
                f"`sequence_length={self.sequence_length}` is more than the model reads. Give at most {longest}"
            )
        return longest


def named_path(entry: str) -> tuple[str, str]:
    """Return name and path of ``name=PATH``. ValueError if it is not that."""
    name, equals, path = entry.partition("=")
    if not (name and equals and path):
        raise UserError(f"`text` has {entry!r}: expected name=PATH, e.g. zh=data/zh.jsonl")
    return name, path


def read_documents(
    text: Sequence[str], text_key: str, document_unit: Literal["file", "line", "blank-line"]
) -> list[DocumentSet]:
    """Read all documents of the sources, which are unpacked where they were not yet.

    Args:
        text: Each ``name=PATH``: a file, a folder or a glob.
        text_key: JSONL key, or parquet or Arrow column, of the text.
        document_unit: Extent of a document in a text file.

    Raises:
        ValueError: no source, a name twice, an argument of another form, or text that cannot be used.
        FileNotFoundError: a path matches no file.
    """
    from lightning_mixcn.text import Source, all_documents, parse_sources, read_corpus
    from lightning_mixcn.text.corpus.listings import list_files

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
