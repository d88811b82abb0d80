"""``mixcn report``: one page that has what the run's folder has, and nothing that a browser would run or fetch."""

import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]  # published without types
    EventAccumulator,
)
from torch.utils.tensorboard import SummaryWriter

from lightning_mixcn.cli import main
from lightning_mixcn.sharing.run_record import read_run
from tests.sharing.conftest import CHINESE, ENGLISH, PROMPT

# The run's own figures have the names of its sources, which no font of this machine may have.
pytestmark = pytest.mark.filterwarnings("ignore:No font of this machine has")

TITLES = [
    "Bits per byte by language",
    "What was trained",
    "Data",
    "Curves",
    "Expert load",
    "Long contexts",
    "Samples",
    "Benchmarks",
    "Planned and measured",
    "Command and versions",
]


class Page(HTMLParser):
    """Texts and tags of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._inside: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside.append(tag)

    def handle_data(self, data: str) -> None:
        if self._inside and self._inside[-1] != "style" and data.strip():
            self.texts.append(data.strip())

    def handle_endtag(self, tag: str) -> None:
        while self._inside and self._inside.pop() != tag:
            pass

    @property
    def text(self) -> str:
        return "\n".join(self.texts)

    def after(self, name: str) -> str:
        return self.texts[self.texts.index(name) + 1]


@pytest.fixture(scope="module")
def page(whole_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    out = tmp_path_factory.mktemp("page") / "report.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(whole_run.parent)
        assert main(["report", "run", "--out", str(out)]) == 0
    return Page(out)


def test_every_section_is_there(page: Page) -> None:
    headings = [text for text in page.texts if text in TITLES]
    assert headings == [*TITLES, *TITLES]  # the list of contents first
    assert "Not in this run" not in page.text


def test_nothing_is_run_or_fetched(page: Page) -> None:
    allowed = "html head meta title style body h1 h2 h3 p nav a section div table thead tbody tr th td dl dt dd figure"
    allowed += " img figcaption svg line text polyline circle span i b details summary pre footer"
    assert {tag for tag, _ in page.tags} <= set(allowed.split())
    links = [attributes.get("src") or attributes.get("href") for _, attributes in page.tags]
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in links if link)
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]


def test_texts_of_strangers_stay_texts(page: Page) -> None:
    for text in (PROMPT, CHINESE, ENGLISH):
        assert text in page.texts


def test_numbers_are_those_of_the_events(page: Page, whole_run: Path) -> None:
    run = read_run(whole_run)
    assert run.steps == 4
    assert [start.first_step for start in run.starts] == [1, 3]
    events = EventAccumulator(str(whole_run / "tensorboard")).Reload()
    for tag in ("train/loss", "lr-AdamW", f"data/{CHINESE}/tokens", f"val/{ENGLISH}/bits_per_byte"):
        steps = [2, 4] if tag.startswith("val/") else [1, 2, 3, 4]  # whatever Lightning counts after a run was extended
        assert run.scalars[tag] == dict(zip(steps, (event.value for event in events.Scalars(tag)), strict=True)), tag
    for tag in ("throughput/seconds_per_step", "experts/drift_bits"):  # counted by the steps themselves
        assert run.scalars[tag] == {event.step + 1: event.value for event in events.Scalars(tag)}, tag
    before = json.loads((whole_run / "before/validate.json").read_text(encoding="utf-8"))["sources"]
    for source in (CHINESE, ENGLISH):
        first, last = before[source]["bits_per_byte"], run.scalars[f"val/{source}/bits_per_byte"][4]
        cells = page.texts[page.texts.index(source) :][1:4]
        assert cells == [f"{first:.4f}", f"{last:.4f}", f"{last - first:+.4f} ({last / first - 1:+.1%})"]
        assert f"{run.scalars[f'data/{source}/tokens'][4]:,.0f}" in page.texts
    assert page.after("optimizer steps") == "4 of 4"


def test_what_was_trained_on_what(page: Page, whole_run: Path) -> None:
    assert page.after("LoRA") == "rank 4, alpha 8, dropout 0.05"
    assert page.after("base") == "base"
    assert page.after("resumed") == "after step 2"
    size = (whole_run.parent / "zh.jsonl").stat().st_size
    row = page.texts[page.texts.index("zh.jsonl") :]
    assert row[1] == "0.9"
    assert row[6:8] == ["1", f"{size / 1000:.3g} kB"]


def test_samples_are_side_by_side(page: Page, whole_run: Path) -> None:
    written = [json.loads(line) for line in (whole_run / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [entry["step"] for entry in written if entry["prompt"] == PROMPT] == [0, 2, 4]
    where = page.texts.index(PROMPT)
    assert [text for text in page.texts[where : where + 8] if text.startswith("step ")] == [
        "step 0",
        "step 2",
        "step 4",
    ]


def test_benchmarks_first_and_last(page: Page) -> None:
    where = page.texts.index("ceval")
    assert page.texts[where : where + 4] == ["ceval", "acc", "0.2500 ±0.0500", "0.5000 ±0.0600"]


def test_plan_beside_what_was_measured(page: Page) -> None:
    where = page.texts.index("memory at the fullest moment")
    assert re.fullmatch(r"0\.\d\d GB", page.texts[where + 1])
    assert re.fullmatch(r"\d+\.\d\d GB resident memory of the process", page.texts[where + 2])
    assert "The fullest moment of a step is" in page.text


@pytest.fixture
def copy(whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of the run that may be changed, in the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    return Path(shutil.copytree(whole_run, "run", symlinks=True))


def test_a_killed_run_is_shown_as_far_as_it_came(copy: Path) -> None:
    *_, events = sorted((copy / "tensorboard").glob("events.*"))
    events.write_bytes(events.read_bytes()[:-7])
    for name, rest in (("samples.jsonl", '{"step": 5, "prom'), ("experts.csv", "5,train,中")):
        with (copy / name).open("a", encoding="utf-8") as file:
            file.write(rest)
    (copy / "facts.json").unlink()
    assert main(["report", "run", "--out", "report.html"]) == 0
    assert Page(Path("report.html")).after("optimizer steps") == "4 of 4"


def test_steps_that_were_taken_again_count_once(tmp_path: Path) -> None:
    for number, (steps, value) in enumerate([(range(7), 1.0), (range(4, 9), 2.0)]):
        writer = SummaryWriter(str(tmp_path / "tensorboard"), filename_suffix=f".{number}")
        for step in steps:
            writer.add_scalar("train/nll_nats_per_token", value, step)
        writer.add_scalar("val/zh/bits_per_byte", value, steps[-1])
        writer.close()
    run = read_run(tmp_path)
    assert run.scalars["train/nll_nats_per_token"] == {step: 1.0 if step < 5 else 2.0 for step in range(1, 10)}
    assert run.scalars["val/zh/bits_per_byte"] == {9: 2.0}  # the killed process's step 7 was never reached again


def test_preferences_are_drawn(copy: Path) -> None:
    shutil.rmtree(copy / "tensorboard")
    writer = SummaryWriter(str(copy / "tensorboard"))
    for tag in ("nll_nats_per_token", "accuracy", "reward_chosen", "reward_rejected", "kl_chosen_nats_per_token"):
        writer.add_scalar(f"train/{tag}", 0.5, 0)
    writer.add_scalar(f"val/{CHINESE}/accuracy", 0.6, 0)
    writer.close()
    record = {"step": 3, "question": "<b>?", "answer": "<i>!", "ended": True}
    (copy / "answers.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
    assert main(["report", "run", "--out", "report.html"]) == 0
    page = Page(Path("report.html"))
    where = page.texts.index("Preferences", page.texts.index("Curves", 20))
    assert page.texts[where + 1] == "rewards"
    assert "divergence from the reference: nats per token" in page.texts
    assert page.texts[page.texts.index("<b>?") :][1:3] == ["step 3", "<i>!"]


def test_what_is_not_there_has_no_section(copy: Path) -> None:
    for name in ("experts.csv", "samples.jsonl", "benchmarks.jsonl", "facts.json"):
        (copy / name).unlink()
    for name in ("tensorboard", "long_context", "before", "adapter"):
        shutil.rmtree(copy / name)
    assert main(["report", "run", "--out", "report.html"]) == 0
    text = Page(Path("report.html")).text
    assert "Data" in text.splitlines()
    for title in ("Curves", "Expert load", "Long contexts", "Samples", "Benchmarks", "Bits per byte by language"):
        assert title not in text.splitlines()
    assert "Long contexts (the callback LongContextEval)" in text


def test_a_run_from_python_has_the_arguments_of_its_module(copy: Path) -> None:
    (copy / "config.yaml").unlink()
    assert main(["report", "run", "--out", "report.html"]) == 0
    page = Page(Path("report.html"))
    assert page.after("LoRA") == "rank 4, alpha 8, dropout 0.05"
    assert CHINESE in page.texts
    assert "no configuration, as one from Python" in page.text


def as_text(settings: dict[str, Any]) -> None:
    settings["data"] = "evil.Data"


def in_full(settings: dict[str, Any]) -> None:
    settings["data"]["class_path"] = "evil.Data"


def of_the_optimizer(settings: dict[str, Any]) -> None:
    settings["model"]["init_args"]["optimizer"] = "evil.Optimizer"


def as_text_in_yaml(settings: dict[str, Any]) -> None:
    settings["model"]["init_args"]["lr_scheduler"] = "{class_path: evil.Schedule}"


def in_a_file(settings: dict[str, Any]) -> None:
    Path("settings").write_text("{class_path: evil.Data}", encoding="utf-8")
    settings["data"] = "settings"


@pytest.mark.parametrize("change", [as_text, in_full, of_the_optimizer, as_text_in_yaml, in_a_file])
def test_classes_of_strangers_are_not_made(
    change: Callable[[dict[str, Any]], None], copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("evil.py").write_text("raise SystemExit('imported')", encoding="utf-8")
    monkeypatch.syspath_prepend(".")
    settings = yaml.safe_load((copy / "config.yaml").read_text(encoding="utf-8"))
    change(settings)
    (copy / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    assert main(["report", "run", "--out", "report.html"]) == 0
    assert "a report runs no code of others" in Page(Path("report.html")).text


def broken(name: str, content: str) -> Callable[[Path], Any]:
    return lambda root: (root / name).write_text(content, encoding="utf-8")


def emptied(root: Path) -> None:
    shutil.rmtree(root)
    root.mkdir()


def replaced_by_a_file(root: Path) -> None:
    shutil.rmtree(root)
    root.write_text("", encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shutil.rmtree, "`run='run'` is not there. Give the folder of a run"),
        (emptied, "`run='run'` holds no run"),
        (replaced_by_a_file, "`run='run'` is a file"),
        (broken("before/validate.json", "{"), "'run/before/validate.json' is not valid JSON"),
        (broken("before/validate.json", '{"sources": [1]}'), "'run/before/validate.json': sources"),
        (broken("long_context/long_context.json", '{"evaluations": [3]}'), "is not what LongContextEval writes"),
        (broken("config.yaml", "a: [\n"), "is not YAML"),
    ],
)
def test_bad_input_is_one_line(
    change: Callable[[Path], Any], message: str, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(copy)
    assert main(["report", "run", "--out", "report.html"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mixcn: error:")]
    assert message in line
    assert not Path("report.html").exists()


def test_a_file_is_replaced_only_when_that_is_asked_for(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("tensorboard", "long_context"):
        shutil.rmtree(copy / name)
    Path("report.html").write_text("mine", encoding="utf-8")
    assert main(["report", "run", "--out", "report.html"]) == 2
    assert "report.html'` exists. Give another file, or replace it by `--overwrite`" in capsys.readouterr().err
    assert Path("report.html").read_text(encoding="utf-8") == "mine"
    assert main(["report", "run", "--out", "report.html", "--overwrite"]) == 0
    assert re.search(r"report\.html \(\d.*kB\): the report\. Open it", capsys.readouterr().out)
    assert Page(Path("report.html")).tags[0][0] == "html"
