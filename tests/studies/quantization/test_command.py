"""`mixcn quantization` against transformers and bitsandbytes, killed and restarted, and with bad input."""

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_mixcn.cli import main
from lightning_mixcn.model import load_mixtral, load_moe
from lightning_mixcn.model.checkpoints.identity import IDENTITY_FILE
from lightning_mixcn.model.export.folder import export_checkpoint
from lightning_mixcn.studies.parts import StudyParts
from lightning_mixcn.studies.quantization import report as quantization_report
from lightning_mixcn.studies.quantization import study
from lightning_mixcn.testing import save_tiny_model
from tests.model.adapters_on_disk import save_adapter
from tests.studies.experts.stock_experts import evaluation_batches, stock_model, text_bits_per_byte
from tests.studies.rounded_mixtral import rounded_stock_model, save_whole_superblocks

LENGTH, MAX_TOKENS = 48, 150


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_whole_superblocks(tmp_path_factory.mktemp("whole") / "base")


@pytest.fixture
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization_report, "save_figure", lambda path, *_: path.touch())


def arguments(src: Path, out: Path, files: list[Path], *more: str) -> list[str]:
    text = [f"{file.stem}={file}" for file in files]
    return [
        *("quantization", str(src), "--out", str(out), "--text", *text, "--device=cpu"),
        *(f"--sequence_length={LENGTH}", f"--max_tokens={MAX_TOKENS}", "--micro_batch_size=2", *more),
    ]


def report_of(out: Path) -> Any:
    return json.loads((out / "quantization.json").read_text(encoding="utf-8"))


def test_bits_per_byte_are_those_of_transformers_with_bitsandbytes_weights(
    base: Path, texts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each document alone through stock transformers, its weights rounded by bitsandbytes."""
    assert main(arguments(base, tmp_path / "out", texts)) == 0
    formats = report_of(tmp_path / "out")["formats"]
    assert [of["format"] for of in formats] == ["float32", "nf4-double", "nf4-single"]
    assert [of["bits_per_quantised_weight"] for of in formats] == [32, 4 + 8 / 64 + 64 / 16384, 4.5]
    stock = [stock_model(base), *(rounded_stock_model(base, double=double) for double in (True, False))]
    batches = evaluation_batches(base, texts, LENGTH, 2, MAX_TOKENS // LENGTH)
    for source, file in enumerate(texts):
        expected = [text_bits_per_byte(model, batches, source) for model in stock]
        found = [of["sources"][file.stem] for of in formats]
        assert [part["bits_per_byte"] for part in found] == pytest.approx(expected, rel=1e-5)
        assert [part["difference"] for part in found] == pytest.approx([e - expected[0] for e in expected], abs=1e-5)
        assert found[0]["documents"] > 2
        assert found[1]["standard_error"] > 0
    assert capsys.readouterr().out.strip() == (tmp_path / "out" / "quantization.md").read_text(encoding="utf-8").strip()
    assert sorted(file.suffix for file in (tmp_path / "out").iterdir()) == [".csv", ".json", ".md", ".png"]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.usefixtures("no_picture")
def test_the_unquantised_format_is_of_the_asked_type(base: Path, texts: list[Path], tmp_path: Path) -> None:
    assert main(arguments(base, tmp_path / "out", texts[:1], "--dtype=bfloat16")) == 0
    dense, double, _ = report_of(tmp_path / "out")["formats"]
    assert (dense["format"], dense["bits_per_weight"]) == ("bfloat16", 16)
    assert dense["bytes"] == sum(p.nbytes for p in load_mixtral(base, quantization="none").parameters())
    assert double["bytes"] == sum(p.nbytes for p in load_mixtral(base).parameters())


@pytest.mark.usefixtures("no_picture")
@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe"])
def test_other_families(family: str, texts: list[Path], tmp_path: Path) -> None:
    """Many experts, whose weights are in 4 bits as attention's are."""
    base = save_tiny_model(tmp_path / "base", family, num_experts=16, num_experts_per_tok=4)
    assert main(arguments(base, tmp_path / "out", texts)) == 0
    dense, double, _ = report_of(tmp_path / "out")["formats"]
    batches = evaluation_batches(base, texts, LENGTH, 2, MAX_TOKENS // LENGTH)
    for source, file in enumerate(texts):
        expected = text_bits_per_byte(stock_model(base), batches, source)
        assert dense["sources"][file.stem]["bits_per_byte"] == pytest.approx(expected, rel=1e-5)
    assert double["relative_weight_error"] == pytest.approx(0.092, abs=0.002)
    assert double["bytes"] == sum(p.nbytes for p in load_moe(base, dtype="float32").parameters())


@pytest.mark.usefixtures("no_picture")
def test_the_pretrained_fixture(stories_base: Path, stories_texts: list[Path], tmp_path: Path) -> None:
    assert main(arguments(stories_base, tmp_path / "out", stories_texts)) == 0
    dense, double, single = report_of(tmp_path / "out")["formats"]
    # What NF4 does to normally distributed weights: 0.092 of their norm.
    assert double["relative_weight_error"] == pytest.approx(0.092, abs=0.001)
    assert single["relative_weight_error"] == pytest.approx(0.092, abs=0.001)
    assert single["relative_weight_error"] < double["relative_weight_error"]
    assert dense["sources"]["tales"]["bits_per_byte"] < dense["sources"]["other"]["bits_per_byte"]
    assert double["sources"]["tales"]["difference"] > 0


@pytest.mark.usefixtures("no_picture")
def test_killed_and_restarted_it_writes_the_same(
    base: Path, texts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, resumed = (arguments(base, tmp_path / name / "out", texts) for name in ("w", "r"))
    assert main(whole) == 0
    save: Any = StudyParts.save
    saved: list[str] = []
    deaths = {2, 5}

    def dying(self: StudyParts, name: str, arrays: Any) -> None:
        if len(saved) in deaths:
            deaths.remove(len(saved))
            raise KeyboardInterrupt
        save(self, name, arrays)
        saved.append(name)

    with monkeypatch.context() as patch:
        patch.setattr(StudyParts, "save", dying)
        for _ in range(2):
            assert main(resumed) == 130
            assert [path.name for path in (tmp_path / "r").iterdir()] == [".out.unfinished"]
        assert main(resumed) == 0
    assert len(saved) == len(set(saved)) == 3 * (1 + 3)  # formats × (weights + batches)
    for file in (tmp_path / "w" / "out").iterdir():
        assert (tmp_path / "r" / "out" / file.name).read_bytes() == file.read_bytes()
    capsys.readouterr()
    assert main(resumed) == 0
    again = capsys.readouterr()
    assert "was finished before" in again.err
    assert "nf4-double" in again.out
    assert main([*resumed, "--dtype=bfloat16"]) == 2
    assert "`dtype='float32'`, but now it is 'bfloat16'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--max_tokens=1"], "`max_tokens=1`: expected at least 2"),
        (["--sequence_length=600"], "is more than the model reads. Give at most 512"),
        (["--micro_batch_size=0"], "`micro_batch_size=0`"),
        (["--dtype=int8"], "`dtype='int8'` is not known"),
        (["--device=abacus"], "`device='abacus'` is not known"),
        (["--gguf", "nowhere.gguf"], "`gguf` has 'nowhere.gguf', which is no file"),
    ],
)
def test_bad_options_are_one_line_and_leave_nothing(
    base: Path, texts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: list[str], message: str
) -> None:
    assert main(arguments(base, tmp_path / "out", texts, *changes)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_what_is_not_unquantised_is_refused(
    base: Path, texts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", str(base), str(tmp_path / "small")]) == 0
    capsys.readouterr()
    assert main(arguments(tmp_path / "small", tmp_path / "out", texts)) == 2
    assert "is in 4 bits, of which nothing unquantised is left. Give the original" in capsys.readouterr().err
    save_adapter(tmp_path / "small", tmp_path / "run" / "adapter", quantization="nf4")
    (tmp_path / "small" / IDENTITY_FILE).unlink()
    assert main(arguments(tmp_path / "run", tmp_path / "out", texts)) == 2
    error = capsys.readouterr().err
    assert "Merge it with `mixcn export --original FOLDER`" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_picture")
def test_of_a_run_the_merged_model_is_measured(
    base: Path, texts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The figures of a run are those of what `mixcn export` makes of it; killed after merging, it merges no more."""
    save_adapter(base, tmp_path / "run" / "adapter", scale=0.3)
    of_run = arguments(tmp_path / "run", tmp_path / "of_run", texts[:1])
    merges: list[Path] = []

    def counted(found: Any, folder: Path, options: Any) -> None:
        merges.append(folder)
        export_checkpoint(found, folder, options)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(study, "export_checkpoint", counted)
    with monkeypatch.context() as patch:
        patch.setattr(StudyParts, "save", killed)
        assert main(of_run) == 130
    assert main(of_run) == 0
    assert len(merges) == 1
    assert not list(tmp_path.glob(".*"))
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "merged")]) == 0
    assert main(arguments(tmp_path / "merged", tmp_path / "of_merged", texts[:1])) == 0
    assert report_of(tmp_path / "of_run")["formats"] == report_of(tmp_path / "of_merged")["formats"]
    assert main(arguments(base, tmp_path / "of_base", texts[:1])) == 0
    one, other = (report_of(tmp_path / name)["formats"][0]["sources"] for name in ("of_run", "of_base"))
    assert abs(one["zh"]["bits_per_byte"] - other["zh"]["bits_per_byte"]) > 1e-3
    # Another adapter in the same place is another study.
    save_adapter(base, tmp_path / "run" / "adapter", scale=0.2)
    assert main(of_run) == 2


def test_help_says_what_it_costs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["quantization", "--help"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "one forward pass over all tokens" in text
    assert "26 seconds at 200 TFLOP/s" in text


@pytest.mark.gpu
@pytest.mark.usefixtures("no_picture")
def test_a_gpu_gives_the_figures_of_the_cpu(base: Path, texts: list[Path], tmp_path: Path) -> None:
    for device in ("cpu", "cuda"):
        assert main(arguments(base, tmp_path / device, texts, f"--device={device}")) == 0
    cpu, cuda = (report_of(tmp_path / device)["formats"] for device in ("cpu", "cuda"))
    for one, other in zip(cpu, cuda, strict=True):
        assert one["bytes"] == other["bytes"]
        assert one["relative_weight_error"] == pytest.approx(other["relative_weight_error"], rel=1e-4, abs=1e-9)
        for name, source in one["sources"].items():
            assert source["bits_per_byte"] == pytest.approx(other["sources"][name]["bits_per_byte"], rel=1e-4)
