"""Thresholds of what is removed, as the command has them."""

from dataclasses import dataclass
from typing import Annotated, Literal

from lightning_mixcn.arguments import Between, Name, check_arguments
from lightning_mixcn.errors import UserError, did_you_mean

Part = Annotated[float, Between(0, 1)]
# Beyond it, the bands of the signatures would miss pairs (see `signatures`).
_MOST_CHANGED = 0.2


@dataclass(frozen=True)
class HygieneOptions:
    """What is read, and what is too much of something.

    Args:
        text_key: JSONL key, or parquet or Arrow column, of the text; a YAML's sources have their own.
        document_unit: Extent of a document in a text file: ``file``, ``line`` or ``blank-line``; a YAML's sources have
            their own.
        on_bad_record: ``error`` or ``skip``, for records that are malformed.
        exact: Remove documents whose letters and digits, in small letters, are another's.
        max_changed: Largest estimated share of a document's letters that differ from another's for it to be a near
            duplicate, at most 0.2; 0 keeps near duplicates. 0.17 finds copies with a tenth of their characters changed.
        question_share: Share of a question's words that a document has, in runs of 13, to be contaminated.
        question_key: Key or column of the question in the files of `against`.
        data_dir: Folder with the data of the tasks of `against`, as in `mixcn evaluate`; null takes the hub's.
        min_letters: Fewest letters and digits of a document.
        max_digits: Largest share of a document's characters that are digits.
        max_markup: Largest share of a document's characters that are tags, entities or wiki brackets.
        max_replaced: Largest share of a document's characters that are U+FFFD, which wrong decoding leaves.
        scripts: Scripts joined by ``+`` that a document's letters shall be of, such as ``Han+Latin``; null takes any.
        min_scripts: Smallest share of letters of these scripts.

    Raises:
        ValueError: a value is out of its range, or there is no such script.
    """

    text_key: Name = "text"
    document_unit: Literal["file", "line", "blank-line"] = "file"
    on_bad_record: Literal["error", "skip"] = "error"
    exact: bool = True
    max_changed: Annotated[float, Between(0, _MOST_CHANGED)] = 0.17
    question_share: Annotated[float, Between(0, 1, excluded=(0,))] = 0.5
    question_key: Name = "question"
    data_dir: str | None = None
    min_letters: Annotated[int, Between(0, 10**9)] = 0
    max_digits: Part = 1.0
    max_markup: Part = 1.0
    max_replaced: Part = 1.0
    scripts: str | None = None
    min_scripts: Part = 0.5

    def __post_init__(self) -> None:
        """Check the values."""
        from .characters import SCRIPT_NAMES  # numpy, for which the help does not wait

        check_arguments(HygieneOptions, vars(self))
        if unknown := [name for name in self.script_names if name not in SCRIPT_NAMES]:
            near = did_you_mean(unknown[0], SCRIPT_NAMES)
            raise UserError(f"`scripts={self.scripts!r}`: expected {', '.join(SCRIPT_NAMES)}, got {unknown[0]!r}{near}")

    @property
    def script_names(self) -> list[str]:
        """Return the names in `scripts`."""
        return [] if self.scripts is None else [name.strip() for name in self.scripts.split("+")]
