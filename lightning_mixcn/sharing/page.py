"""A run as one page of HTML that loads nothing."""

from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from lightning_mixcn.errors import ExistingFileError
from lightning_mixcn.files.atomic import new_file
from lightning_mixcn.files.written import say_written
from lightning_mixcn.masking import mask_secrets, visible

from .blocks import Section
from .charts import HEIGHT, WIDTH
from .measured import MEASURED
from .run_record import RunRecord, read_run
from .trained import TRAINING
from .watched import WATCHED

# By section that a run may lack: what would have recorded it.
_ABSENT = {
    "Bits per byte by language": "a validation",
    "Curves": "TensorBoard's events",
    "Expert load": "the callback ExpertLoadMonitor",
    "Long contexts": "the callback LongContextEval",
    "Samples": "the callback SampleText or SampleAnswers",
    "Benchmarks": "the callback BenchmarkEval or FewShotProbe",
}


def write_report_page(root: Path, out: Path, *, overwrite: bool = False) -> None:
    """Write the page of a run.

    Args:
        root: Folder of the run.
        out: File to write.
        overwrite: Replace the file if it exists.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the folder holds no run, or a damaged file of one.
        FileExistsError: the file exists, and `overwrite` is not given.
    """
    if out.exists() and not (overwrite and out.is_file()):
        advice = "Give the name of a file" if out.is_dir() else "Give another file, or replace it by `--overwrite`"
        raise ExistingFileError(f"`out={str(out)!r}` exists. {advice}")
    text = report_page(read_run(root))
    with new_file(out, replace=overwrite) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
    say_written(out, "the report. Open it in a browser; it needs no server and no network")


def report_page(run: RunRecord) -> str:
    """Return the page of a run as HTML: every text of the run escaped, secrets masked."""
    made = (part(run) for part in (*TRAINING, *WATCHED, *MEASURED))
    sections: list[Section] = [section for section in made if section is not None]
    titles = {section.title for section in sections}
    absent = [f"{title} ({by})" for title, by in _ABSENT.items() if title not in titles]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["shown"] = lambda text: visible(mask_secrets(str(text)))
    template = (files(__package__) / "report.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        name=run.root.resolve().name,
        summary=_summary(run),
        sections=sections,
        absent=absent,
        width=WIDTH,
        height=HEIGHT,
    )


def _summary(run: RunRecord) -> str:
    """Say in one line what the page is about."""
    base = run.own_model()[0]
    planned = run.section("trainer").get("max_steps")
    of_all = f" of {planned:,}" if isinstance(planned, int) and planned > 0 else ""
    return f"{run.class_name('model') or 'A run'}{f' on {base}' if base else ''}: {run.steps:,}{of_all} optimizer steps"
