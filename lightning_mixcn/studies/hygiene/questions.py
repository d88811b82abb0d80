"""Questions of benchmarks: of lm-evaluation-harness tasks, or of files."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lightning_mixcn.errors import UserError
from lightning_mixcn.text import Source, read_corpus

_MOST_CHARACTERS = 10_000_000


class Question(NamedTuple):
    """A question of a benchmark.

    Args:
        place: Task and number of the question in it, from 0, or file and line.
        text: The question, with its choices where the task's prompt has them.
    """

    place: str
    text: str


def benchmark_questions(against: Sequence[str], key: str, data_dir: str | None) -> list[Question]:
    """Read questions.

    Args:
        against: Files, folders or globs of JSONL, JSON, parquet, text or CSV, and names of tasks.
        key: Key or column of the question in files.
        data_dir: Folder with the tasks' data; null takes the hub's.

    Raises:
        ValueError: the harness is not installed, no such task, or a file that cannot be used.
        FileNotFoundError: a path matches no file.
    """
    questions, tasks = list[Question](), list[str]()
    for name in against:
        if name.lower().endswith(".csv"):
            questions += _of_csv(Path(name).expanduser(), key)
        elif "/" in name or "*" in name or Path(name).suffix or Path(name).exists():
            corpus = read_corpus(Source("questions", name, text_key=key), f"against {name!r}")
            places = map(corpus.origin, range(len(corpus)))
            questions += [Question(f"{o.file}:{o.record}", corpus.text(i)) for i, o in enumerate(places)]
        else:
            tasks.append(name)
    return questions + (list(_of_tasks(tasks, data_dir)) if tasks else [])


def _of_csv(path: Path, key: str) -> list[Question]:
    if not path.is_file():
        raise UserError(f"`against={str(path)!r}` is no file. Give CSV or JSONL of questions, or names of tasks")
    csv.field_size_limit(_MOST_CHARACTERS)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            columns = reader.fieldnames or []
            if key not in columns:
                told = f"has no column {key!r}. Set `question_key` to one of {', '.join(columns) or 'its columns'}"
                raise UserError(f"`against={str(path)!r}` {told}")
            return [Question(f"{path}:{reader.line_num}", row[key] or "") for row in reader]
    except (UnicodeError, csv.Error) as error:
        raise UserError(f"`against={str(path)!r}` is no CSV in UTF-8 ({error}). Save it again") from error


def _of_tasks(names: Sequence[str], data_dir: str | None) -> Iterator[Question]:
    from lightning_mixcn.studies.task_files import BenchmarkFiles
    from lightning_mixcn.studies.tasks import load_benchmarks

    files = None if data_dir is None else BenchmarkFiles(data_dir)
    for name, task in load_benchmarks(names, files=files).tasks.items():
        for number, document in enumerate(task.eval_docs):
            yield Question(f"{name}:{number}", _prompt(task, document))


def _prompt(task: Any, document: Any) -> str:
    """Return a task's prompt without its examples; where that is a number, as in WinoGrande, the longest text."""
    prompt = task.doc_to_text(document)
    if isinstance(prompt, str):
        return prompt
    return max((value for value in document.values() if isinstance(value, str)), key=len, default="")
