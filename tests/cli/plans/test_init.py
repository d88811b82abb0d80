"""``mixcn init``: the YAML that it writes is planned and trained as it is; what cannot be used is one line."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import MixtralConfig

from lightning_mixcn.cli import main
from lightning_mixcn.cli.text_sample import look_at_source
from lightning_mixcn.testing import save_tiny_model
from lightning_mixcn.text import Source

CHINESE, ENGLISH = "今年春节期间,许多人回到家乡。", "The history of science is long. "


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    for name, text in (("zh", CHINESE), ("en", ENGLISH)):
        write_jsonl(Path(f"{name}.jsonl"), [{"text": f"{number} {text * (1 + number % 3)}"} for number in range(120)])
    return tmp_path


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def read(path: str) -> Any:
    return yaml.safe_load(Path(path).read_text(encoding="utf-8"))


def start(*arguments: str, out: str = "run.yaml") -> int:
    return main(["init", *arguments, "--out", out])


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the configuration of Mixtral-8x7B, and nothing else."""
    path = tmp_path_factory.mktemp("large")
    MixtralConfig(max_position_embeddings=32768).save_pretrained(path)
    return path


def test_pretraining(folder: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert start("--base", str(tiny_base), "--text", "zh=zh.jsonl", "en=en.jsonl", "--gpu", "cpu") == 0
    printed = capsys.readouterr().out
    assert "mixtral, context 512 tokens" in printed
    assert "zh: 1 file (jsonl); a sample of 120 documents: about" in printed
    assert "letters: Han 100%" in printed
    assert "letters: Latin 100%" in printed
    assert printed.splitlines()[-1] == "mixcn fit --config run.yaml"
    text = Path("run.yaml").read_text(encoding="utf-8")
    assert "# Weights are shares of the training tokens. A tenth of English against forgetting." in text
    assert "# Tokens of a row; the base's context is 512." in text
    assert all(len(line) <= 120 for line in text.splitlines() if line.lstrip().startswith("#"))
    settings = yaml.safe_load(text)
    assert settings["data"]["init_args"]["sources"][1] == {"name": "en", "path": "en.jsonl", "weight": 0.1}
    assert settings["data"]["init_args"]["sequence_length"] == 512
    assert settings["model"]["init_args"]["lora"]["r"] == 2
    assert main(["fit", "--config", "run.yaml", "--plan"]) == 0
    assert "the run fits" in capsys.readouterr().out
    # In the training process, since a test has no time for others to start.
    assert main(["fit", "--config", "run.yaml", "--data.num_workers=0"]) == 0
    assert (folder / "runs/run/adapter/adapter_model.safetensors").is_file()


@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe"])
def test_other_families(family: str, folder: Path) -> None:
    save_tiny_model(folder / "base", family)
    assert start("--base", "base", "--text", "zh=zh.jsonl", "--gpu", "cpu") == 0
    assert main(["fit", "--config", "run.yaml", "--plan"]) == 0
    assert read("run.yaml")["data"]["init_args"]["sources"][0]["weight"] == 1.0


@pytest.mark.slow
def test_instruction_tuning(folder: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [{"instruction": f"{number}?", "output": ENGLISH} for number in range(60)]
    write_jsonl(folder / "chat.jsonl", records)
    assert start("--base", str(tiny_base), "--instruct", "chat.jsonl", "--gpu", "cpu") == 0
    assert "chat: 1 file (jsonl); a sample of 60 conversations" in capsys.readouterr().out
    settings = read("run.yaml")
    assert settings["model"]["class_path"] == "InstructModule"
    assert "adapter" not in settings["model"]["init_args"]
    assert settings["data"]["init_args"]["template"] == "mixtral"
    assert main(["fit", "--config", "run.yaml", "--plan"]) == 0
    assert main(["fit", "--config", "run.yaml", "--data.num_workers=0"]) == 0


@pytest.mark.parametrize(
    ("gpu", "rank", "checkpointing", "embeddings"),
    [
        ("80gb", 64, "selective", True),
        pytest.param("40gb", 32, "full", False, marks=pytest.mark.slow),
        pytest.param("h200-141gb", 64, "selective", True, marks=pytest.mark.slow),
    ],
)
def test_memory_decides(gpu: str, rank: int, checkpointing: str, embeddings: bool, folder: Path, large: Path) -> None:
    assert start("--base", str(large), "--text", "zh=zh.jsonl", "--gpu", gpu) == 0
    model = read("run.yaml")["model"]["init_args"]
    chosen = model["lora"]["r"], model["activation_checkpointing"], model.get("train_embeddings", False)
    assert chosen == (rank, checkpointing, embeddings)
    assert model["lora"]["lora_alpha"] == 2 * rank


@pytest.mark.parametrize(
    ("gpu", "strategy", "rank", "embeddings"),
    [
        pytest.param("3x80gb", "DDPStrategy", 64, True, marks=pytest.mark.slow),
        ("4x24gb", "FSDP2Strategy", 64, True),
    ],
)
def test_several_gpus(gpu: str, strategy: str, rank: int, embeddings: bool, folder: Path, large: Path) -> None:
    assert start("--base", str(large), "--text", "zh=zh.jsonl", "--gpu", gpu) == 0
    settings = read("run.yaml")
    trainer, model = settings["trainer"], settings["model"]["init_args"]
    assert trainer["devices"] == int(gpu[0])
    assert trainer["strategy"]["class_path"].rpartition(".")[2] == strategy
    assert (model["lora"]["r"], model.get("train_embeddings", False)) == (rank, embeddings)
    rows = trainer["accumulate_grad_batches"] * settings["data"]["init_args"]["micro_batch_size"] * trainer["devices"]
    text = Path("run.yaml").read_text(encoding="utf-8")
    assert f"# A step is {rows} rows" in text
    assert f"tokens on {gpu[0]} ranks." in text
    # The plan of the command, for cards of at least this memory, agrees that it fits.
    card = "h100-80gb" if "80" in gpu else "rtx-4090-24gb"
    assert main(["fit", "--config", "run.yaml", "--plan", "--card", card]) == 0


def test_what_cannot_fit_is_refused(folder: Path, large: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert start("--base", str(large), "--text", "zh=zh.jsonl", "--gpu", "24gb") == 2
    error = capsys.readouterr().err
    assert "cannot be trained on a GPU of 24 GB: even with rank 8" in error
    assert "`--gpu rtx-5090-32gb` is the smallest card that would do" in error
    assert not Path("run.yaml").exists()


@pytest.mark.slow
def test_gpus_that_are_too_few_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--base", "Qwen/Qwen3-235B-A22B", "--text", "zh=zh.jsonl", "--gpu"]
    assert start(*given, "2x24gb") == 2
    error = capsys.readouterr().err
    assert "cannot be trained on 2 x GPU of 24 GB" in error
    assert "a run, shared by 2 GPUs, needs" in error
    assert "on each, and 22.1 GB are there" in error


def test_another_key_and_bad_records(folder: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(folder / "zh.jsonl", [{"title": "a", "body": CHINESE}] * 30 + [{"title": "b"}])
    assert start("--base", str(tiny_base), "--text", "zh=zh.jsonl", "--gpu", "cpu") == 0
    assert "bad records in the sample, to be skipped: 1. The first" in capsys.readouterr().out
    data = read("run.yaml")["data"]["init_args"]
    assert data["sources"][0]["text_key"] == "body"
    assert data["on_bad_record"] == "skip"


def test_a_book_is_cut_into_documents(folder: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "book.txt").write_text(f"{CHINESE}\n\n" * 60, encoding="utf-8")
    (folder / "note.txt").write_text(CHINESE, encoding="utf-8")
    assert start("--base", str(tiny_base), "--text", "zh=book.txt", "--gpu", "cpu") == 0
    assert "1 file (text); a sample of 60 documents" in capsys.readouterr().out
    assert read("run.yaml")["data"]["init_args"]["sources"][0]["document_unit"] == "blank-line"
    assert "each block between blank lines is a document" in Path("run.yaml").read_text(encoding="utf-8")
    assert start("--base", str(tiny_base), "--text", "zh=note.txt", "--gpu", "cpu", out="note.yaml") == 0
    assert read("note.yaml")["data"]["init_args"]["val_fraction"] == 0
    assert main(["fit", "--config", "note.yaml", "--data.num_workers=0", "--trainer.max_steps=1"]) == 0


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_all_documents_are_estimated(suffix: str, folder: Path) -> None:
    text = "".join(json.dumps({"text": f"{number} {ENGLISH * (number % 7)}"}) + "\n" for number in range(30_000))
    path = folder / f"large.{suffix}"
    path.write_bytes(gzip.compress(text.encode()) if suffix.endswith("gz") else text.encode())
    sample = look_at_source(Source("en", str(path)), "text en", None)
    assert sample.documents == 400
    assert sample.all_documents == pytest.approx(30_000, rel=0.3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "zh.jsonl"], "`text=zh.jsonl`: expected NAME=PATH"),
        (["--text", "zh=nowhere*"], "`text zh.path='nowhere*'` matches no file"),
        (["--text", "zh=latin.txt"], "is not UTF-8: byte 0xe9"),
        (["--text", "zh=zh.jsonl", "--gpu", "h100-80"], "(did you mean 'h100-80gb'?)"),
        (["--text", "zh=zh.jsonl", "--gpu", "0x24gb"], "expected at least one GPU, such as 4x24gb"),
        (["--text", "zh=zh.jsonl", "--instruct", "en.jsonl"], "Give either `--text` or `--instruct`"),
        ([], "Give either `--text` or `--instruct`"),
        (["--instruct", "zh.jsonl"], "not one document can be read"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, folder: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "latin.txt").write_bytes("café".encode("latin-1"))
    assert start("--base", str(tiny_base), *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not Path("run.yaml").exists()


def test_no_file_is_replaced(folder: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("run.yaml").write_text("mine", encoding="utf-8")
    assert start("--base", str(tiny_base), "--text", "zh=zh.jsonl") == 2
    assert "`out=run.yaml` exists" in capsys.readouterr().err
    assert Path("run.yaml").read_text(encoding="utf-8") == "mine"


def test_a_base_that_is_not_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert start("--base", "nowhere", "--text", "zh=zh.jsonl") == 2
    assert "'nowhere' is not there" in capsys.readouterr().err
