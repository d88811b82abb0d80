"""What a section of the page is made of; the template has a form for each kind."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from .charts import Chart


@dataclass(frozen=True)
class Facts:
    """Names and values; what is not known is left out."""

    kind: ClassVar[str] = "facts"
    values: Mapping[str, str]


@dataclass(frozen=True)
class Table:
    """A table.

    Args:
        head: Names of the columns.
        rows: Cells; the first column is the row's name.
        texts: Further columns of text, which are aligned to the left.
        note: What a reader has to know.
    """

    kind: ClassVar[str] = "table"
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: Sequence[int] = ()
    note: str = ""


@dataclass(frozen=True)
class Charts:
    """Curves beside each other."""

    kind: ClassVar[str] = "charts"
    charts: Sequence[Chart]


@dataclass(frozen=True)
class Picture:
    """A picture.

    Args:
        caption: What it shows.
        uri: Its content as a data URI.
    """

    caption: str
    uri: str


@dataclass(frozen=True)
class Pictures:
    """Pictures beside each other."""

    kind: ClassVar[str] = "pictures"
    pictures: Sequence[Picture]


@dataclass(frozen=True)
class PromptSamples:
    """What the model made of one prompt.

    Args:
        prompt: The prompt.
        texts: By optimizer steps.
    """

    prompt: str
    texts: Mapping[int, str]


@dataclass(frozen=True)
class Samples:
    """Samples, their steps side by side."""

    kind: ClassVar[str] = "samples"
    samples: Sequence[PromptSamples]


@dataclass(frozen=True)
class Note:
    """A paragraph."""

    kind: ClassVar[str] = "note"
    text: str


@dataclass(frozen=True)
class Listing:
    """A text as it is, folded.

    Args:
        title: What it is.
        text: The text.
    """

    kind: ClassVar[str] = "listing"
    title: str
    text: str


Block = Facts | Table | Charts | Pictures | Samples | Note | Listing


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading."""

    title: str
    blocks: Sequence[Block] = field(default_factory=list)


def facts(values: Mapping[str, Any]) -> Facts:
    """Return what is known: neither null nor empty."""
    return Facts({name: as_text(value) for name, value in values.items() if value not in (None, "", [], {})})


def as_text(value: Any) -> str:
    """Write a setting as a reader expects it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {as_text(each)}" for key, each in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(as_text, value))
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)


def charts(drawn: Iterable[Chart | None]) -> list[Block]:
    """Return the charts that have something to show, as a block; none if none has."""
    kept = [chart for chart in drawn if chart is not None]
    return [Charts(kept)] if kept else []
