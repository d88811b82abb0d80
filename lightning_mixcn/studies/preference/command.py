"""The subcommand ``preference``: blind side-by-side sheets of models' answers, and what filled-in sheets say."""

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from lightning_mixcn.errors import UserError
from lightning_mixcn.files.atomic import check_output, new_folder
from lightning_mixcn.model.checkpoints.folder import Checkpoint
from lightning_mixcn.model.checkpoints.reading import is_quantised, torch_dtype
from lightning_mixcn.model.find import load_found
from lightning_mixcn.model.inference.generation import Sampling
from lightning_mixcn.studies.models import fingerprint
from lightning_mixcn.studies.parts import StudyParts, check_settings

from .answers import Answer, AnsweringModel
from .matches import KEY, read_matches
from .questions import read_questions, shown
from .report import table, write_report
from .scores import PreferenceScores
from .sheet import Item, SheetRow, lay_out, printable, sheet_csv, sheet_page


def sheet(
    models: list[str],
    *,
    questions: str,
    out: str,
    template: str | None = None,
    questions_per_pair: int | None = None,
    temperature: float = 0.2,
    top_k: int = 40,
    top_p: float = 0.9,
    repetition_penalty: float = 1.1,
    max_new_tokens: int = 400,
    seed: int = 0,
    quantization: str = "nf4",
    dtype: str = "bfloat16",
    device: str | None = None,
) -> None:
    """Let two or more models answer questions, and write blind sheets for judges. It goes on where it was killed.

    Give a judge sheet.html (a page that needs nothing else and saves the judge's CSV) or sheet.csv (for a spreadsheet),
    and nothing else of the folder: key.json and answers.jsonl name the models.

    Args:
        models: Each a Hugging Face folder or hub id, 4-bit folder of `mixcn quantize`, run folder, or PEFT adapter
            folder. Models are loaded one after the other. Every pair of them gets the questions: three models, three
            times as many items.
        questions: Text, one question a line, or JSON or JSON Lines with `question` (and `system`), with `messages`, or
            training conversations, whose last answer is left out.
        out: Folder to make: sheet.csv, sheet.html, key.json, answers.jsonl. Until it is whole, finished answers are in
            the hidden folder .OUT.unfinished beside it.
        template: ``mixtral``, ``tokenizer`` for the chat template of each model's tokenizer, or a Jinja file. Null is
            the one that each model carries, else ``mixtral``.
        questions_per_pair: Draw so many questions for each pair of models; null takes all.
        temperature: Logits are divided by it; 0 takes the likeliest token.
        top_k: Choose among this many likeliest tokens; 0 for all.
        top_p: Choose among the likeliest tokens that together have this probability; 1 for all.
        repetition_penalty: Makes tokens of question and answer less likely if more than 1, which is none.
        max_new_tokens: Most tokens of an answer. The cost is one forward pass of one token for each: models × questions
            × tokens of an answer.
        seed: Of the answers' random numbers, the sides and the order.
        quantization: ``nf4`` (4 bits) or ``none``.
        dtype: ``bfloat16``, ``float16`` or ``float32``.
        device: ``cuda``, ``cpu`` …; by default the GPU if there is one.

    Raises:
        ValueError: fewer than two models, an option out of its range, or a question that cannot be asked.
        FileNotFoundError: no such model, template or file.
        FileExistsError: the folder holds something else, or a sheet with other arguments.
    """
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty, max_new_tokens)
    _check_numbers(models, questions_per_pair)
    asked, place = read_questions(questions), _device(device)
    answering = [AnsweringModel(src, asked, template) for src in models]
    _check_quantization(answering, quantization, dtype)
    settings: dict[str, Any] = {
        "models": list(models),
        "fingerprints": [fingerprint(model.found) for model in answering],
        "prompts_sha256": [model.prompts_sha256 for model in answering],
        "questions_per_pair": questions_per_pair, **asdict(sampling), "seed": seed,
        "quantization": quantization, "dtype": dtype, "device": place.type,
    }  # fmt: skip
    folder = Path(out).expanduser().resolve()
    if _is_finished(folder, settings):
        return
    parts = StudyParts(folder, settings)
    name = f"p{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:6]}"
    items = lay_out(len(models), len(asked), sheet=name, seed=seed, questions_per_pair=questions_per_pair)
    wanted = [sorted({item.question for item in items if number in item[2:]}) for number in range(len(models))]
    _answer(answering, wanted, parts, sampling, seed, {"quantization": quantization, "dtype": dtype, "device": place})
    answers = {(m, q): _load(parts, m, q) for m, of_model in enumerate(wanted) for q in of_model}
    _write(folder, settings, name, items, [shown(turns) for turns in asked], answers)
    parts.delete()
    _say(f"{folder}: {len(items)} items. Give judges sheet.html or sheet.csv alone; key.json names the models.")


def score(sheets: list[str], *, out: str, key: str | None = None, seed: int = 0) -> None:
    """Win rates, Elo and agreement from filled-in sheets of `mixcn preference sheet`. Takes seconds.

    Args:
        sheets: Filled-in sheets, one a judge, whom the file's name names. A verdict is left, right or tie (左, 右, 平);
            empty where there is none.
        out: Folder to make: pairs.csv, models.csv, judges.csv, table.txt and preference.json. Elo is the maximum of
            the Bradley-Terry likelihood, which knows no order of the matches; a tie is half a win for both; the first
            model has 1000. Intervals are of 95 %: Wilson's over questions; of Elo, questions are drawn anew.
        key: The sheets' key.json; null takes the one beside the first sheet.
        seed: Of the intervals' resampling.

    Raises:
        ValueError: an unknown verdict, item or column, an item twice, or a sheet without any verdict.
        FileNotFoundError: no such sheet or key.
        FileExistsError: OUT is not empty.
    """
    folder = Path(out).expanduser().resolve()
    check_output(folder)
    matches = read_matches(sheets, key)
    scores = PreferenceScores(matches, seed)
    with new_folder(folder) as unfinished:
        write_report(unfinished, scores)
    print(table(scores))


def _check_numbers(models: Sequence[str], questions_per_pair: int | None) -> None:
    if len(models) < 2:
        raise UserError(f"`models` names {len(models)}. Give at least two models to compare")
    if twice := [one for one, other in combinations(models, 2) if one == other]:
        raise UserError(f"`models` names {twice[0]!r} twice. Leave one out")
    if questions_per_pair is not None and questions_per_pair < 1:
        raise UserError(f"`questions_per_pair={questions_per_pair}`: expected at least 1, or null for all")


def _check_quantization(models: Sequence[AnsweringModel], quantization: str, dtype: str) -> None:
    torch_dtype(dtype)
    if quantization not in ("nf4", "none"):
        raise UserError(f"`quantization={quantization!r}`: expected nf4 or none")
    for model in models:
        if quantization == "none" and is_quantised(Checkpoint(model.found.base)):
            raise UserError(f"`quantization=none`, but {model.src!r} is in 4 bits. Use nf4, or the original")


def _device(name: str | None) -> torch.device:
    try:
        return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UserError(f"`device={name!r}` is not known. Expected cpu, cuda, cuda:1 …") from error


def _is_finished(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether this very sheet is there."""
    if not (folder / KEY).is_file():
        return False
    check_settings(json.loads((folder / KEY).read_text(encoding="utf-8")).get("settings", {}), settings, folder)
    _say(f"{folder} was finished before.")
    return True


def _answer(
    models: Sequence[AnsweringModel],
    wanted: Sequence[Sequence[int]],
    parts: StudyParts,
    sampling: Sampling,
    seed: int,
    loading: dict[str, Any],
) -> None:
    """Every answer that is not there yet, model by model."""
    with tqdm(total=sum(map(len, wanted)), desc="answering", unit="answer") as progress:
        for number, (answering, asked) in enumerate(zip(models, wanted, strict=True)):
            left = [question for question in asked if _part(number, question) not in parts]
            progress.update(len(asked) - len(left))
            if not left:
                continue
            model = load_found(answering.found, **loading)
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
    questions: Sequence[str],
    answers: dict[tuple[int, int], Answer],
) -> None:
    """Write the output, all of it in one step."""
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
        {"model": names[model], "question": questions[question], **answer._asdict()}
        for (model, question), answer in answers.items()
    ]
    with new_folder(folder) as unfinished:
        (unfinished / "sheet.csv").write_bytes(sheet_csv(rows))
        (unfinished / "sheet.html").write_bytes(sheet_page(name, rows).encode())
        (unfinished / KEY).write_text(
            json.dumps(key | {"settings": settings}, ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
        )
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (unfinished / "answers.jsonl").write_text(text, encoding="utf-8")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
