"""Have models answer questions, and write the blind sheet of their answers."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from lightning_mixcn.errors import UserError
from lightning_mixcn.files.atomic import new_folder
from lightning_mixcn.model.checkpoints.reading import is_quantised
from lightning_mixcn.model.inference.sampling import Sampling
from lightning_mixcn.model.options import ModelOptions
from lightning_mixcn.studies.models import model_fingerprint
from lightning_mixcn.studies.parts import StudyParts, finished_before, say
from lightning_mixcn.text import Turn

from .answers import Answer, AnsweringModel
from .matches import KEY
from .pairs import ANSWERS
from .questions import read_questions, shown
from .sheet import Item, SheetRow, lay_out, printable, sheet_csv, sheet_page


def answer_and_lay_out(
    models: Sequence[str],
    questions: str,
    folder: Path,
    template: str | None,
    questions_per_pair: int | None,
    sampling: Sampling,
    seed: int,
    options: ModelOptions,
) -> None:
    """Have every model answer, and write the sheet; arguments as in the command ``preference sheet``."""
    asked, place = read_questions(questions), options.torch_device()
    answering = [AnsweringModel(src, asked, template) for src in models]
    _check_quantization(answering, options)
    settings: dict[str, Any] = {
        "models": list(models),
        "fingerprints": [model_fingerprint(model.found) for model in answering],
        "prompts_sha256": [model.prompts_sha256 for model in answering],
        "questions_per_pair": questions_per_pair, **asdict(sampling), "seed": seed,
        "quantization": options.quantization, "dtype": options.dtype, "device": place.type,
    }  # fmt: skip
    if finished_before(folder, KEY, settings):
        return
    parts = StudyParts(folder, settings)
    name = f"p{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:6]}"
    items = lay_out(len(models), len(asked), sheet=name, seed=seed, questions_per_pair=questions_per_pair)
    wanted = [sorted({item.question for item in items if number in item[2:]}) for number in range(len(models))]
    _answer(answering, wanted, parts, sampling, seed, options)
    answers = {(m, q): _load(parts, m, q) for m, of_model in enumerate(wanted) for q in of_model}
    _write(folder, settings, name, items, asked, answers)
    parts.delete()
    say(f"{folder}: {len(items)} items. Give judges sheet.html or sheet.csv alone; key.json names the models.")


def _check_quantization(models: Sequence[AnsweringModel], options: ModelOptions) -> None:
    for model in models:
        if options.quantization == "none" and is_quantised(model.found.base):
            raise UserError(f"`quantization=none`, but {model.src!r} is in 4 bits. Use nf4, or the original")


def _answer(
    models: Sequence[AnsweringModel],
    wanted: Sequence[Sequence[int]],
    parts: StudyParts,
    sampling: Sampling,
    seed: int,
    options: ModelOptions,
) -> None:
    """Have the models give every answer that is not there yet, one model after the other."""
    with tqdm(total=sum(map(len, wanted)), desc="answering", unit="answer") as progress:
        for number, (answering, asked) in enumerate(zip(models, wanted, strict=True)):
            left = [question for question in asked if _part(number, question) not in parts]
            progress.update(len(asked) - len(left))
            if not left:
                continue
            model = options.load(answering.found)
            for question in left:
                answer = answering.answer(model, question, sampling, seed)
                content = json.dumps(answer._asdict(), ensure_ascii=False).encode()
                parts.save(_part(number, question), {"json": np.frombuffer(content, dtype=np.uint8)})
                progress.update()
            del model  # before the next one takes its memory


def _part(model: int, question: int) -> str:
    return f"model{model}_question{question}"


def _load(parts: StudyParts, model: int, question: int) -> Answer:
    return Answer(**json.loads(parts.load(_part(model, question))["json"].tobytes()))


def _write(
    folder: Path,
    settings: dict[str, Any],
    name: str,
    items: Sequence[Item],
    asked: Sequence[list[Turn]],
    answers: dict[tuple[int, int], Answer],
) -> None:
    """Write the output, all of it in one step."""
    questions = [shown(turns) for turns in asked]
    rows = [
        SheetRow(
            item.name,
            printable(questions[item.question]),
            printable(answers[item.left, item.question].text),
            printable(answers[item.right, item.question].text),
        )
        for item in items
    ]
    key = {"sheet": name, "models": settings["models"], "items": [item._asdict() for item in items]}
    names = settings["models"]
    lines = [
        {
            "model": names[model],
            "number": question,
            "question": questions[question],
            "messages": [{"role": turn.role, "content": turn.content} for turn in asked[question]],
            **answer._asdict(),
        }
        for (model, question), answer in answers.items()
    ]
    with new_folder(folder) as unfinished:
        (unfinished / "sheet.csv").write_bytes(sheet_csv(rows))
        (unfinished / "sheet.html").write_bytes(sheet_page(name, rows).encode())
        (unfinished / KEY).write_text(
            json.dumps(key | {"settings": settings}, ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
        )
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (unfinished / ANSWERS).write_text(text, encoding="utf-8")
