"""Small benchmark data in the layouts that their authors publish, and the harness's own tasks over it."""

import bz2
import csv
import json
import random
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

SHARED = Path(__file__).parents[2].parent / "shared" / "data" / "eval"
LETTERS = "ABCD"
# Published without care for warnings: all of them are the harness's and its dependencies'.
HARNESS_WARNINGS = "ignore::DeprecationWarning"


def harness() -> Any:
    """Import the harness, or skip the test."""
    return pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install -e '.[eval]'")


@lru_cache(maxsize=1)
def few_tasks() -> Any:
    """Index a few of the harness's own folders, and a group of two of its tasks: all of it takes 15 s."""
    tasks = Path(harness().__file__).parent / "tasks"
    folders = [tasks / name for name in ("ceval", "cmmlu", "mmlu/default", "hellaswag", "gsm8k")]
    here = Path(__file__).with_name("benchmark_groups")
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=False, include_path=[*folders, here])


def index_few_tasks() -> None:
    """Let this process know only `few_tasks`, for good."""
    from lightning_mixcn.studies import tasks

    few_tasks()  # read before the process is forked
    tasks.task_manager = few_tasks


def real_files() -> Path:
    """Return the real C-Eval, CMMLU and MMLU archives, or skip the test."""
    if not (SHARED / "ceval.zip").is_file():
        pytest.skip("the benchmark archives lie outside the project and are not here")
    return SHARED


def write_ceval(folder: Path, subjects: tuple[str, ...] = ("law", "accountant"), questions: int = 40) -> Path:
    """C-Eval's layout with questions made up; the answer is drawn, and empty in the test split."""
    generator = random.Random(0)
    for subject in subjects:
        for split, count in (("dev", 5), ("val", questions), ("test", 6)):
            file = folder / "ceval-exam" / split / f"{subject}_{split}.csv"
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("w", newline="", encoding="utf-8") as opened:
                writer = csv.writer(opened)
                hidden = split == "test"
                writer.writerow(["id", "question", *LETTERS, *([] if hidden else ["answer"])])
                for number in range(count):
                    choices = [str(generator.randrange(100)) for _ in LETTERS]
                    answer = [] if hidden else [generator.choice(LETTERS)]
                    writer.writerow([number, f"{subject} {number}?", *choices, *answer])
    return folder


def write_hellaswag(folder: Path, items: int = 40, training: int = 10) -> Path:
    """HellaSwag's official JSONL out of the real validation items, some of which become training; or a skipped test."""
    text = bz2.decompress((real_files() / "hellaswag_val_full.txt.bz2").read_bytes()).decode().split("\n")
    records = []
    for start in range(0, 6 * (items + training), 6):
        context, label, *endings = text[start : start + 6]
        activity, _, begun = context.partition(": ")
        records.append(
            {"activity_label": activity, "ctx_a": begun, "ctx_b": "", "ctx": begun, "label": label, "endings": endings}
        )
    for split, part in (("val", records[:items]), ("train", records[items:])):
        lines = (json.dumps(record) + "\n" for record in part)
        (folder / f"hellaswag_{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder
