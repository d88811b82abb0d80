"""`mixcn experts --choose`: which experts are chosen, from a study and from what a run wrote."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_mixcn.callbacks.expert_load.report import ExpertLoadFile, ExpertLoadRow
from lightning_mixcn.cli import main
from lightning_mixcn.studies.experts.choose import best_experts
from lightning_mixcn.studies.experts.report import write_importance
from lightning_mixcn.testing import save_tiny_mixtral
from tests.studies.experts.experts_command import arguments
from tests.studies.experts.stock_experts import stock_model
from tests.studies.experts.test_command import says
from tests.studies.experts.test_report import known

pytestmark = pytest.mark.usefixtures("no_pictures")


def choose(table: Path, out: Path, *options: str) -> dict[str, Any]:
    assert main(["experts", str(table), "--out", str(out), *options]) == 0
    content: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return content


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    write_importance(folder, known())
    (folder / "experts.json").write_text(json.dumps({"settings": {"src": "models/base"}}), encoding="utf-8")
    return folder


def write_load(file: Path, loads: Mapping[tuple[int, str, str, int], Sequence[Sequence[int]]]) -> Path:
    """Write what `ExpertLoadMonitor` does: counts by step, stage, source and first position of a bucket."""
    written = ExpertLoadFile(file)
    written.start(0, 0)
    for key, counts_LE in loads.items():
        numbers = np.ndenumerate(np.array(counts_LE))
        written.append([ExpertLoadRow(*key, layer, expert, int(tokens)) for (layer, expert), tokens in numbers])
    return file


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return a run whose routing changed: zh's tokens went to expert 0 first, in the end to the last ones."""
    (tmp_path / "run").mkdir()
    first, last = [[9, 1, 0], [9, 1, 0]], [[1, 3, 0], [0, 1, 3]]
    loads = {
        (0, "val", "zh", 0): first, (0, "val", "en", 0): first,
        (5, "train", "zh", 0): first, (5, "train", "en", 0): first,
        (10, "val", "zh", 0): last, (10, "val", "zh", 512): [[0, 2, 4], [0, 0, 6]],
        (10, "val", "en", 0): [[4, 4, 2]] * 2,
    }  # fmt: skip
    write_load(tmp_path / "run" / "experts.csv", loads)
    return tmp_path / "run"


# ---- which ----


def test_the_best_of_each_layer_or_of_the_model() -> None:
    scores_LE = np.array([[3.0, 1.0, 2.0, 0.0], [0.5, 9.0, 8.0, 7.0]])
    assert best_experts(scores_LE, 1) == {0: [0], 1: [1]}
    assert best_experts(scores_LE, 3) == {0: [0, 1, 2], 1: [1, 2, 3]}
    assert best_experts(scores_LE, 4) == {0: [0, 1, 2, 3], 1: [0, 1, 2, 3]}
    assert best_experts(scores_LE, 0.375) == {1: [1, 2, 3]}
    assert best_experts(scores_LE, 0.5) == {0: [0], 1: [1, 2, 3]}
    assert best_experts(scores_LE, 0.01) == {1: [1]}


def test_of_equal_experts_the_first() -> None:
    scores_LE = np.array([[0.0, 1.0, 1.0, 0.0]] * 40)
    assert best_experts(scores_LE, 1) == {layer: [1] for layer in range(40)}
    assert best_experts(scores_LE, 3) == {layer: [0, 1, 2] for layer in range(40)}
    assert best_experts(scores_LE, 0.25) == {layer: [1, 2] for layer in range(20)}


@pytest.mark.parametrize(
    ("options", "experts"),
    [
        (["--choose=1"], {"0": [0], "1": [1]}),
        (["--choose=1", "--choose_for=en"], {"0": [0], "1": [0]}),
        (["--choose=0.2"], {"1": [1]}),
        (["--choose=1", "--choose_by=saliency"], {"0": [1], "1": [1]}),
        (["--choose=0.5", "--choose_by=saliency"], {"0": [1, 2], "1": [1]}),
        (["--choose=2", "--choose_by=load"], {"0": [0, 1], "1": [0, 1]}),
        # Shares of zh are 0.3, 0.4, 0.3, of en 0.5, 0.5, 0.
        (["--choose=1", "--choose_by=divergence"], {"0": [2], "1": [2]}),
        (["--choose=2", "--choose_by=divergence", "--choose_for=en"], {"0": [0, 1], "1": [0, 1]}),
        (["--choose=3", "--choose_by=random"], {"0": [0, 1, 2], "1": [0, 1, 2]}),
    ],
)
def test_a_study_that_is_there(options: list[str], experts: dict[str, list[int]], study: Path, tmp_path: Path) -> None:
    content = choose(study, tmp_path / "choice.json", *options)
    assert content["experts"] == experts
    assert content["layers"] == [int(layer) for layer in experts]
    assert content["router"] is content["attention"] is True


def test_what_a_choice_says_of_itself(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = choose(study, tmp_path / "choice.json", "--choose=1")
    assert content["about"] == {
        "table": str(study / "experts.csv"), "mode": "mask", "study": {"src": "models/base"},
        "made_by": "mixcn experts", "choose": 1.0, "choose_by": "importance", "choose_for": "zh",
        "num_layers": 2, "num_experts": 3, "chosen_experts": 2, "share_of_load": {"zh": 0.35, "en": 0.5},
    }  # fmt: skip
    shown = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert shown[:2] == [
        "2 of 6 experts in 2 of 2 layers, by importance for zh",
        "They are 33.3% of the experts, and carry of the load: 35.0% of zh's, 50.0% of en's",
    ]
    assert shown[3:6] == ["layer experts load of zh load of en", "0 0 30.0% 50.0%", "1 1 40.0% 50.0%"]


def test_random_choices_have_a_seed(run: Path, tmp_path: Path) -> None:
    def chosen(seed: int) -> Any:
        options = ["--choose=1", "--choose_by=random", f"--choose_seed={seed}"]
        return choose(run, tmp_path / f"{seed}.json", *options)["experts"]

    assert chosen(3) == chosen(3)
    assert len({json.dumps(chosen(seed)) for seed in range(12)}) > 3


@pytest.mark.parametrize("place", ["folder", "file"])
def test_a_run(place: str, run: Path, tmp_path: Path) -> None:
    """The last validation counts, all its positions together."""
    table = run if place == "folder" else run / "experts.csv"
    by_load = choose(table, tmp_path / "load.json", "--choose=1", "--choose_by=load")
    assert by_load["experts"] == {"0": [1], "1": [2]}
    assert (by_load["about"]["stage"], by_load["about"]["step"]) == ("val", 10)
    assert by_load["about"]["share_of_load"] == {"zh": pytest.approx(14 / 20), "en": pytest.approx(6 / 20)}
    by_divergence = choose(table, tmp_path / "divergence.json", "--choose=1", "--choose_by=divergence")
    assert by_divergence["experts"] == {"0": [2], "1": [2]}
    assert by_divergence["about"]["choose_against"] == "en"


def test_a_run_without_validation(tmp_path: Path) -> None:
    """All of its training counts."""
    steps = {(step, "train", "zh", 0): [[tokens, 5, 0]] for step, tokens in ((1, 0), (2, 6), (3, 6))}
    write_load(tmp_path / "experts.csv", steps)
    content = choose(tmp_path, tmp_path / "choice.json", "--choose=1", "--choose_by=load")
    assert content["experts"] == {"0": [1]}
    assert content["about"]["share_of_load"] == {"zh": pytest.approx(15 / 27)}


# ---- planted ----

PLANTED, LAYER, CONSTANT = (0, 3), 1, 5


def plant(folder: Path) -> Path:
    """Make a model of which two experts alone do anything, and to which the router of their layer sends all tokens."""
    base = save_tiny_mixtral(folder / "base", initializer_range=0.3, num_hidden_layers=3)
    model = stock_model(base)
    with torch.no_grad():
        # A column that is the same for all tokens, which the residual stream keeps: a router can rely on it.
        model.model.embed_tokens.weight[:, CONSTANT] = 3.0
        for number, layer in enumerate(model.model.layers):
            layer.mlp.gate.weight[:, CONSTANT] = 0.0
            for expert in range(4):
                if number != LAYER or expert not in PLANTED:
                    layer.mlp.experts.down_proj[expert] = 0
            layer.self_attn.o_proj.weight[CONSTANT] = 0.0
        router = model.model.layers[LAYER].mlp.gate.weight
        router[:] = router / 10
        router[list(PLANTED), CONSTANT] = 3.0
    model.save_pretrained(folder / "planted")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "planted" / name).write_bytes((base / name).read_bytes())
    return folder / "planted"


def test_planted_experts_are_chosen(tmp_path: Path) -> None:
    """By each measure; the study itself writes the first choice, and is not done again for the others."""
    planted = plant(tmp_path)
    text = says(planted, tmp_path / "own.jsonl")
    study, expected = tmp_path / "study", {str(LAYER): list(PLANTED)}
    command = arguments(planted, study, [text], "--quantization=none", "--max_tokens=1500", "--choose=0.17")
    for _ in range(2):  # the second time all is there
        assert main(command) == 0
        assert json.loads((study / "choice.json").read_text(encoding="utf-8"))["experts"] == expected
    for by in ("importance", "saliency", "load"):
        content = choose(study, tmp_path / f"{by}.json", "--choose=0.17", f"--choose_by={by}")
        assert content["experts"] == expected
        assert content["about"]["share_of_load"] == {"own": pytest.approx(1 / 3)}


# ---- mistakes ----


@pytest.mark.parametrize(
    ("table", "options", "message"),
    [
        ("study", ["--choose=4"], "`choose=4`: a layer has 3 experts. Give at most that, or a share below 1"),
        ("study", ["--choose=1.5"], "`choose=1.5`: expected a whole number of experts a layer, or a share below 1"),
        ("study", ["--choose=0"], "`choose=0.0`: expected more than 0 experts a layer, or a share below 1"),
        ("study", ["--choose=1", "--choose_for=fr"], "`choose_for='fr'` is no source there. Expected one of zh, en"),
        ("study", ["--choose=1", "--choose_against=en"], "`choose_against` is for `choose_by` divergence"),
        (
            "study", ["--choose=1", "--choose_by=divergence", "--choose_against=zh"],
            "`choose_by=divergence` compares 'zh' with another source. Give two, which differ",
        ),
        ("study", ["--choose_for=zh"], "`choose_for` is for `choose`, which is not given"),
        ("study", ["--choose=1", "--choose_by=size"], "choose_by"),
        ("run", ["--choose=1"], "`choose_by=importance` was not measured there. Use load, divergence, random, or a"),
        ("three", ["--choose=1", "--choose_by=divergence"], "`choose_against` is needed: expected one of en, ru"),
        ("one", ["--choose=1", "--choose_by=divergence"], "`choose_by=divergence` compares 'zh' with another source"),
        ("empty", ["--choose=1"], "has no experts.csv. Give the folder of a study by `mixcn experts` or of a run"),
        ("nowhere", ["--choose=1"], "has no experts.csv"),
        ("other", ["--choose=1"], "is not what `mixcn experts` or ExpertLoadMonitor writes: it has the columns a, b."),
        ("blank", ["--choose=1"], "it has the columns of nothing"),
        ("half", ["--choose=1", "--choose_by=load"], "is damaged (experts of 'zh' are missing). Make it again"),
        ("words", ["--choose=1", "--choose_by=load"], "is damaged ("),
        ("study", ["--sequence_length=48"], "`text` is empty. Give at least one source as name=PATH"),
    ],
)  # fmt: skip
def test_mistakes(
    table: str, options: list[str], message: str, study: Path, run: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    head = "step,stage,source,position_from,layer,expert,tokens\n"
    for name, content in (
        ("other", "a,b\n1,2\n"), ("blank", ""), ("half", f"{head}1,val,zh,0,0,0,7\n1,val,zh,0,0,2,7\n"),
        ("words", f"{head}1,val,zh,0,0,0,many\n"),
    ):  # fmt: skip
        (tmp_path / name).mkdir()
        (tmp_path / name / "experts.csv").write_text(content)
    (tmp_path / "empty").mkdir()
    for name, sources in (("one", ["zh"]), ("three", ["zh", "en", "ru"])):
        (tmp_path / name).mkdir()
        write_load(tmp_path / name / "experts.csv", {(1, "val", source, 0): [[1, 2]] for source in sources})
    src = {"study": study, "run": run}.get(table, tmp_path / table)
    if not any("choose" in option for option in options):  # to measure, which needs a model
        src = save_tiny_mixtral(tmp_path / "model")
    capsys.readouterr()
    assert main(["experts", str(src), "--out", str(tmp_path / "choice.json"), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "choice.json").exists()


def test_what_cannot_be_chosen_is_refused_before_the_study(
    routed_base: Path, texts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for options, message in (
        (["--choose=5"], "`choose=5`: a layer has 4 experts"),
        (["--choose=1", "--mode=saliency"], "`choose_by=importance` was not measured there. Use saliency, load"),
        (["--choose=1", "--choose_for=fr"], "`choose_for='fr'` is no source there. Expected one of zh, en"),
    ):
        assert main([*arguments(routed_base, tmp_path / "out", texts), *options]) == 2
        assert message in capsys.readouterr().err
        assert not list(tmp_path.iterdir())


def test_another_file_stays(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same choice may be made again; another one does not take its place."""
    file = tmp_path / "choice.json"
    choose(study, file, "--choose=1")
    before = file.read_bytes()
    choose(study, file, "--choose=1")
    assert main(["experts", str(study), "--out", str(file), "--choose=2"]) == 2
    assert "expected a new one" in capsys.readouterr().err
    assert file.read_bytes() == before
