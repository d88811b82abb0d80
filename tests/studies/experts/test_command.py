"""`mixcn experts` as a person runs it: right, complete, and clear about what it cannot do."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_mixcn.cli import main
from lightning_mixcn.model.export.command import export
from lightning_mixcn.testing import save_tiny_mixtral, save_tiny_model
from tests.model.adapters_on_disk import save_adapter
from tests.studies.experts.experts_command import arguments, lines_of
from tests.studies.experts.stock_experts import evaluation_batches, stock_model, text_bits_per_byte, without_expert

pytestmark = [
    pytest.mark.usefixtures("no_pictures"),
]

FILES = {
    "coactivation.csv", "coactivation.png", "differences.csv", "experts.csv", "experts.json", "experts.png",
    "output_similarity.png", "ranking.txt", "routing.csv", "routing_layers.csv", "saliency.png", "similarity.csv",
    "weight_similarity.png",
}  # fmt: skip


def check_against_stock(out: Path, base: Path, stock: Any, files: list[Path]) -> None:
    """Every figure of `experts.csv` against the model with the expert's weights taken away, run whole."""
    batches = evaluation_batches(base, files, length=48, rows=2, max_rows=3)
    before = [text_bits_per_byte(stock, batches, source) for source in range(len(files))]
    lines, seen = lines_of(out / "experts.csv"), 0
    for layer, expert, mode in dict.fromkeys((line["layer"], line["expert"], line["mode"]) for line in lines):
        changed = without_expert(stock, int(layer), int(expert), mode)
        for source, file in enumerate(files):
            (line,) = (
                line
                for line in lines
                if (line["layer"], line["expert"], line["mode"], line["source"]) == (layer, expert, mode, file.stem)
            )
            expected = text_bits_per_byte(changed, batches, source)
            assert float(line["bits_per_byte_base"]) == pytest.approx(before[source], abs=1e-5)
            assert float(line["bits_per_byte_disabled"]) == pytest.approx(expected, abs=1e-5)
            assert float(line["bits_per_byte_change"]) == pytest.approx(expected - before[source], abs=1e-5)
            seen += 1
    config = stock.config
    assert seen == len(lines) == config.num_hidden_layers * config.num_local_experts * 2 * len(files)


@pytest.mark.usefixtures("pictures")
def test_a_random_model(routed_base: Path, texts: list[Path], tmp_path: Path) -> None:
    assert main(arguments(routed_base, tmp_path / "out", texts, "--quantization=none")) == 0
    check_against_stock(tmp_path / "out", routed_base, stock_model(routed_base), texts)
    assert {file.name for file in (tmp_path / "out").iterdir()} == FILES
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe"])
def test_other_families(family: str, texts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Router weights that are not normalised among them; more experts than a pass has rows."""
    base = save_tiny_model(tmp_path / "base", family, num_experts=12, num_experts_per_tok=3, initializer_range=0.25)
    assert main(arguments(base, tmp_path / "out", texts, "--quantization=none")) == 0
    check_against_stock(tmp_path / "out", base, stock_model(base), texts)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mode both: ")]
    assert len(lines) == 1
    assert "mode both: 2 layers × 12 experts disabled over 288 tokens, as much as " in lines[0]
    assert " forward passes, " in lines[0]
    assert "TFLOP/s (measured). `--mode saliency` takes 1 over the text, " in lines[0]


def test_a_pretrained_model(stories_base: Path, stories_texts: list[Path], tmp_path: Path) -> None:
    assert main(arguments(stories_base, tmp_path / "out", stories_texts, "--quantization=none")) == 0
    check_against_stock(tmp_path / "out", stories_base, stock_model(stories_base), stories_texts)


@pytest.mark.parametrize("which", ["random", "pretrained"])
def test_in_4_bits_with_an_adapter(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """The very model: what its 4 bits hold, and the adapter merged into it."""
    base: Path = request.getfixturevalue("routed_base" if which == "random" else "stories_base")
    files: list[Path] = request.getfixturevalue("texts" if which == "random" else "stories_texts")
    save_adapter(base, tmp_path / "adapter", quantization="nf4", scale=0.05)
    export(str(tmp_path / "adapter"), str(tmp_path / "merged"), base="dequantised", dtype="float32")
    assert main(arguments(tmp_path / "adapter", tmp_path / "out", files, "--quantization=nf4")) == 0
    check_against_stock(tmp_path / "out", base, stock_model(tmp_path / "merged"), files)


def plant(base: Path, out: Path, layer: int, expert: int, layers: list[int]) -> Path:
    """Make a model in which some layers have one expert that does anything, or none."""
    model = stock_model(base)
    with torch.no_grad():
        for number in layers:
            experts = model.model.layers[number].mlp.experts
            for other in range(len(experts.down_proj)):
                if (number, other) != (layer, expert):
                    experts.down_proj[other] = 0
    model.save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (out / name).write_bytes((base / name).read_bytes())
    return out


def says(model_folder: Path, file: Path) -> Path:
    """Texts that a model makes up itself, in printable ASCII, so that it is better with all that it has."""
    model = stock_model(model_folder)
    vocabulary = json.loads((model_folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    printable = torch.tensor([vocabulary[chr(code)] for code in range(33, 127)])
    generator, ids = torch.Generator().manual_seed(0), torch.ones(24, 1, dtype=torch.int64)
    with torch.no_grad():
        for _ in range(40):
            probabilities = model(ids).logits[:, -1, printable].softmax(-1)
            ids = torch.cat([ids, printable[torch.multinomial(probabilities, 1, generator=generator)]], dim=1)
    letter_of = {index: piece for piece, index in vocabulary.items()}
    texts = ("".join(letter_of[token] for token in row[1:]) for row in ids.tolist())
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return file


def first_of(out: Path, mode: str, source: str) -> tuple[int, int]:
    mine = [line for line in lines_of(out / "experts.csv") if (line["mode"], line["source"]) == (mode, source)]
    best = max(mine, key=lambda line: float(line["bits_per_byte_change"]))
    assert float(best["change_low_95"]) > 0
    (block,) = (
        block
        for block in (out / "ranking.txt").read_text(encoding="utf-8").split("\n\n")
        if f"bits per byte of {source} without an expert ({mode})" in block
    )
    assert block.strip().splitlines()[2].split()[:2] == [best["layer"], best["expert"]]
    return int(best["layer"]), int(best["expert"])


@pytest.mark.parametrize("mode", ["mask", "zero"])
@pytest.mark.parametrize(("layer", "expert"), [(1, 2), (2, 0)])
def test_a_planted_expert_is_found_first(mode: str, layer: int, expert: int, tmp_path: Path) -> None:
    """All others do nothing, so it alone matters."""
    base = save_tiny_mixtral(tmp_path / "base", initializer_range=0.3, num_hidden_layers=3)
    planted = plant(base, tmp_path / "planted", layer, expert, [0, 1, 2])
    text = says(planted, tmp_path / "own.jsonl")
    more = ("--quantization=none", f"--mode={mode}", "--max_tokens=1500")
    assert main(arguments(planted, tmp_path / "out", [text], *more)) == 0
    assert first_of(tmp_path / "out", mode, "own") == (layer, expert)
    if mode == "zero":
        changes = [float(line["bits_per_byte_change"]) for line in lines_of(tmp_path / "out" / "experts.csv")]
        assert sum(abs(change) > 1e-5 for change in changes) == 1  # rows that change run in other company: last bits


def test_a_planted_expert_of_a_pretrained_model_is_found_first(
    stories_base: Path, stories_texts: list[Path], tmp_path: Path
) -> None:
    planted = plant(stories_base, tmp_path / "planted", 2, 1, [2])
    assert main(arguments(planted, tmp_path / "out", stories_texts, "--quantization=none")) == 0
    mine = [line for line in lines_of(tmp_path / "out" / "experts.csv") if line["layer"] == "2"]
    for mode in ("mask", "zero"):
        of_mode = [line for line in mine if (line["mode"], line["source"]) == (mode, "tales")]
        best = max(of_mode, key=lambda line: float(line["bits_per_byte_change"]))
        assert best["expert"] == "1"
        assert first_of(tmp_path / "out", mode, "tales") == (2, 1)


def test_the_base_figures_are_those_of_validate(
    routed_base: Path, texts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    val_sources = [{"name": file.stem, "path": str(file)} for file in texts]
    data = {"sources": [], "val_sources": val_sources, "sequence_length": 48, "max_eval_rows": 3, "micro_batch_size": 2}
    config = {
        "model": {"class_path": "PretrainModule", "init_args": {"base": str(routed_base), "dtype": "float32"}},
        "data": {"class_path": "PretrainDataModule", "init_args": data},
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False},
    }
    Path("plain.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    assert main(["validate", "--config", "plain.yaml"]) == 0
    assert main(arguments(routed_base, tmp_path / "out", texts)) == 0
    validated = json.loads(Path("runs/plain/validate.json").read_text(encoding="utf-8"))["sources"]
    base = json.loads((tmp_path / "out" / "experts.json").read_text(encoding="utf-8"))["base"]
    for name, figures in validated.items():
        assert base[name] == {key: pytest.approx(value, rel=1e-12) for key, value in figures.items()} | {
            "documents": base[name]["documents"]
        }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--text", "nowhere"], "`text` has 'nowhere': expected name=PATH"),
        (["--text", "zh=nowhere.jsonl"], "`text[0].path='nowhere.jsonl'` matches no file"),
        (["--sequence_length=1000"], "`sequence_length=1000` is more than the model reads. Give at most 512"),
        (["--sequence_length=1"], "`sequence_length=1`: expected at least 2"),
        (["--max_tokens=0"], "`max_tokens=0`: expected at least 2"),
        (["--micro_batch_size=0"], "`micro_batch_size=0`: expected at least 1"),
        (["--mode=half"], "mode"),
        (["--device=abacus"], "`device='abacus'` is not known"),
        (["--dtype=int8"], "`dtype='int8'` is not known"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    changes: list[str],
    message: str,
    routed_base: Path,
    texts: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = arguments(routed_base, tmp_path / "out", texts)
    if changes[0] == "--text":
        place = command.index("--text")
        command[place : place + 3] = changes
        changes = []
    assert main([*command, *changes]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_model_without_a_spare_expert_cannot_be_masked(
    texts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_tiny_mixtral(tmp_path / "base", num_local_experts=2)
    assert main(arguments(base, tmp_path / "out", texts)) == 2
    assert "already goes to 2 of the model's 2. Use mode zero" in capsys.readouterr().err
    assert main([*arguments(base, tmp_path / "out", texts), "--mode=zero"]) == 0


def test_one_source_of_one_document(routed_base: Path, tmp_path: Path) -> None:
    """No differences, and no intervals."""
    (tmp_path / "one.txt").write_text("first line\n\nsecond\n", encoding="utf-8")
    assert main(arguments(routed_base, tmp_path / "out", [tmp_path / "one.txt"])) == 0
    lines = lines_of(tmp_path / "out" / "experts.csv")
    assert {(line["change_low_95"], line["change_high_95"]) for line in lines} == {("", "")}
    assert not lines_of(tmp_path / "out" / "differences.csv")
    assert "(one document)" in (tmp_path / "out" / "ranking.txt").read_text(encoding="utf-8")
    blocks = arguments(routed_base, tmp_path / "blocks", [tmp_path / "one.txt"], "--document_unit=blank-line")
    assert main(blocks) == 0
    assert json.loads((tmp_path / "blocks" / "experts.json").read_text())["base"]["one"]["documents"] == 2


def test_help_says_what_it_costs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["experts", "--help"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "about half of layers × experts forward passes" in text
    assert "18 minutes at 200 TFLOP/s" in text
    assert "Mode saliency is one pass" in text
