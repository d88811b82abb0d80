"""`mixcn export` as a command: whole outputs or none, the same bytes, and errors that say what to do."""

import errno
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lightning_mixcn.cli import main
from lightning_mixcn.files import hub
from lightning_mixcn.model.checkpoints import writer as shard_writer
from lightning_mixcn.model.checkpoints.folder import Checkpoint
from lightning_mixcn.model.checkpoints.writer import ShardWriter
from lightning_mixcn.model.convert.quantize import quantize
from lightning_mixcn.model.export.card import Training, adapter_card
from lightning_mixcn.model.export.command import export
from lightning_mixcn.testing import save_tiny_mixtral
from tests.model.adapters_on_disk import save_adapter

FORMATS = ["hf", "peft", "peft-per-expert"]


@pytest.fixture
def run(tiny: Path, tmp_path: Path) -> Path:
    """Return a run folder: its adapter with tokenizer and chat template, and what `mixcn validate` measured."""
    folder = tmp_path / "run"
    save_adapter(tiny, folder / "adapter")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny / name, folder / "adapter" / name)
    (folder / "adapter/chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    zh = {"nll_nats_per_token": 2.5, "bits_per_byte": 1.25, "tokens": 4982, "bytes": 7689}
    report = {"sources": {"zh": zh}, "steps_trained": 300}
    (folder / "validate.json").write_text(json.dumps(report), encoding="utf-8")
    return folder


def test_the_command(run: Path, tmp_path: Path) -> None:
    arguments = ["export", str(run), str(tmp_path / "out"), "--dtype=bfloat16", "--max_shard_bytes=50000"]
    assert main(arguments) == 0
    names = {file.name for file in (tmp_path / "out").iterdir() if file.suffix != ".safetensors"}
    assert names == {
        "README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors.index.json",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert (tmp_path / "out/chat_template.jinja").read_text() == "{{ messages }}"


def test_the_card_has_the_runs_figures_and_no_path_of_this_machine(tiny: Path, run: Path, tmp_path: Path) -> None:
    (run / "adapter/README.md").write_text("---\nlicense: mit\n---\nTrained on news.\n", encoding="utf-8")
    for src, out in ((run, "one"), (run / "adapter", "two")):
        export(str(src), str(tmp_path / out))
    card = (tmp_path / "one/README.md").read_text(encoding="utf-8")
    assert card == (tmp_path / "two/README.md").read_text(encoding="utf-8")
    assert "| zh | 2.5000 | 1.2500 | 4,982 |" in card
    assert "after 300 steps" in card
    assert "Trained on news." in card
    assert "license: mit" not in card
    assert "library_name: transformers" in card
    assert tiny.name in card
    assert str(tmp_path) not in card


def card_of(folder: Path) -> tuple[dict[str, Any], str]:
    """Header and text of a card, the header as the hub's library reads it."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    return dict(huggingface_hub.metadata_load(folder / "README.md") or {}), text.partition("\n---\n")[2]


def test_cards_say_what_each_folder_is(tmp_path: Path) -> None:
    base = save_tiny_mixtral(tmp_path / "Base-v0.1")
    (base / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [fr]\n---\nA base.", encoding="utf-8")
    quantize(str(base), str(tmp_path / "small"), dtype="float32")
    save_adapter(tmp_path / "small", tmp_path / "run/adapter", quantization="nf4")
    training = Training(Checkpoint(tmp_path / "small"), 7, "nf4", "bfloat16", "mixtral", end_ids=(2,), languages=["zh"])
    measured = {"nll_nats_per_token": 2.5, "bits_per_byte": 1.25, "tokens": 4982}
    card = adapter_card(training, {"step": 6, "sources": {"zh": measured}})
    (tmp_path / "run/adapter/README.md").write_text(card, encoding="utf-8")
    report = {"sources": {"zh": measured}, "steps_trained": 7, "quantization": "nf4"}
    (tmp_path / "run/validate.json").write_text(json.dumps(report), encoding="utf-8")
    export(str(tmp_path / "run"), str(tmp_path / "merged"))
    export(str(tmp_path / "run"), str(tmp_path / "exact"), base="dequantised")
    assert (
        main(["export", str(tmp_path / "run"), str(tmp_path / "layout"), "--format=peft", "--languages=[zh,en]"]) == 0
    )
    export(str(base), str(tmp_path / "copy"))

    for name, title, library, languages in (
        ("run/adapter", "# Base-v0.1: LoRA adapter", "peft", ["zh"]),
        ("merged", "# Base-v0.1, adapted", "transformers", ["zh"]),
        ("exact", "# Base-v0.1, adapted", "transformers", ["zh"]),
        ("layout", "# Base-v0.1: LoRA adapter", "peft", ["zh", "en"]),
        ("copy", "# Base-v0.1\n", "transformers", None),
    ):
        header, text = card_of(tmp_path / name)
        assert text.lstrip().startswith(title), name
        assert "Base: `Base-v0.1`" in text
        assert "small" not in text
        assert str(tmp_path) not in text
        assert "License: apache-2.0, as the base's card says." in text
        assert (header["license"], header["library_name"], header.get("language")) == (
            "apache-2.0", library, languages,
        )  # fmt: skip
    for name in ("merged", "exact"):
        text = card_of(tmp_path / name)[1]
        assert "LoRA adapter" not in text
        assert "Measured after 6 steps, with the base in 4 bits (NF4):" in text
        assert "Measured on the run after 7 steps, with the base in 4 bits (NF4), before export" in text
        assert ("the merged model differs by what the 4 bits round off" in text) == (name == "merged")
    copied = card_of(tmp_path / "copy")[1]
    assert "adapted" not in copied
    assert "Measured" not in copied


def test_a_license_that_is_not_known_is_left_out(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export(str(run), str(tmp_path / "out"))
    assert re.search(
        r"out \([\d.]+ .?B\): the whole model. Talk to it with mixcn chat .*out, serve", capsys.readouterr().out
    )
    header, text = card_of(tmp_path / "out")
    assert "license" not in header
    assert "License: that of the base, which its files here do not state." in text


def test_an_original_that_is_missing_or_unknown_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the card, and in one line of the command."""
    base = save_tiny_mixtral(tmp_path / "base")
    quantize(str(base), str(tmp_path / "small"))
    base.rename(tmp_path / "elsewhere")
    save_adapter(tmp_path / "small", tmp_path / "adapter", quantization="nf4")
    training = Training(Checkpoint(tmp_path / "small"), 7, "nf4", "bfloat16")
    (line,) = training.shortcomings
    assert line.startswith("The unquantised base 'base', which 'small' was made from, was not there")
    assert line in adapter_card(training, {})
    export(str(tmp_path / "adapter"), str(tmp_path / "out"), format="peft")
    assert line in card_of(tmp_path / "out")[1]
    assert f"{line}\n" in capsys.readouterr().err
    (tmp_path / "small/base_identity.json").unlink()
    (line,) = training.shortcomings
    assert "does not record what it was made from" in line
    assert line in adapter_card(training, {})


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_files_have_the_mode_that_the_umask_says(tiny: Path, tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        save_adapter(tiny, tmp_path / "run/adapter")
        for format in FORMATS:
            export(str(tmp_path / "run"), str(tmp_path / format), format=format)  # type: ignore[arg-type]  # of the list
        quantize(str(tiny), str(tmp_path / "small"))
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 15
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask}


@pytest.mark.parametrize("format", FORMATS)
def test_twice_gives_the_same_bytes(run: Path, tmp_path: Path, format: Any) -> None:
    for out in ("one", "two"):
        export(str(run), str(tmp_path / out), format=format)
    one, two = ({file.name: file.read_bytes() for file in (tmp_path / out).iterdir()} for out in ("one", "two"))
    assert one == two


@pytest.mark.parametrize("format", FORMATS)
def test_an_interrupted_export_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: Any
) -> None:
    before = sorted(tmp_path.iterdir())
    added: list[str] = []

    def interrupt(self: ShardWriter, name: str, tensor: Tensor) -> None:
        added.append(name)
        if len(added) == 10:
            raise KeyboardInterrupt

    def interrupt_writing(*arguments: object, **keywords: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ShardWriter, "add", interrupt)
    monkeypatch.setattr("lightning_mixcn.model.lora.adapter_writer.write_safetensors", interrupt_writing)
    with pytest.raises(KeyboardInterrupt):
        export(str(run), str(tmp_path / "out"), format=format)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("format", FORMATS)
def test_a_full_disk_is_named(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], format: str
) -> None:
    def full(*arguments: object, **keywords: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(shard_writer, "write_safetensors", full)
    monkeypatch.setattr("lightning_mixcn.model.lora.adapter_writer.write_safetensors", full)
    assert main(["export", str(run), str(tmp_path / "out"), f"--format={format}"]) == 2
    assert "no space to write" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def moved(base: Path, to: Path) -> None:
    """Put another model where the base was."""
    shutil.rmtree(base)
    if to.name != "gone":
        save_tiny_mixtral(base, seed=5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "out"], "'nowhere' is not there"),
        (["empty", "out"], "is no model: it has neither config.json"),
        (["run", "out", "--format=onnx"], "onnx"),
        (["run", "run"], "is a folder that is not empty"),
        (["run", "out", "--outtype=f16"], "`outtype` and `llama_cpp` are for `format=gguf`"),
        (["run", "out", "--format=peft", "--base=dequantised"], "merges nothing"),
        (["run", "out", "--base=dequantised", "--original=tiny"], "is not used by `base=dequantised`"),
        (["run", "out", "--original=small"], "is in 4 bits. Give the unquantised model"),
        (["run", "out", "--original=other"], "was made from the base"),
        (["run", "out", "--adapter", "nowhere"], "'nowhere' is not there"),
        (["run", "out", "--adapter", "wide"], "has the shape [48, 64], the base has [48, 32]"),
        (["run", "out", "--dtype=int8"], "dtype"),
        (["run", "out", "--format=gguf"], "convert_hf_to_gguf.py is not on the PATH"),
        (["run", "out", "--format=gguf", "--llama_cpp=empty"], "convert_hf_to_gguf.py is not in 'empty'"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    tiny: Path,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    (tmp_path / "empty").mkdir()
    if any("small" in argument for argument in arguments):
        quantize(str(tiny), "small")
    if any("other" in argument for argument in arguments):
        save_tiny_mixtral("other", seed=3)
    if any("wide" in argument for argument in arguments):
        save_adapter(save_tiny_mixtral("wide_base", hidden_size=64), tmp_path / "wide", target_modules=["w1"])
    before = sorted(tmp_path.iterdir())
    capsys.readouterr()
    assert main(["export", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("mixcn: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(("place", "message"), [("gone", "needs its base"), ("other", "was made from the base")])
def test_a_base_that_is_gone_or_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str, message: str
) -> None:
    base = save_tiny_mixtral(tmp_path / "base")
    save_adapter(base, tmp_path / "adapter")
    moved(base, tmp_path / place)
    capsys.readouterr()
    assert main(["export", str(tmp_path / "adapter"), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert (str(base) if place == "other" else "'base'") in error


def test_four_bits_whose_original_is_gone_need_a_choice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save_tiny_mixtral(tmp_path / "base")
    quantize(str(base), str(tmp_path / "small"), dtype="float32")
    save_adapter(tmp_path / "small", tmp_path / "adapter", quantization="nf4")
    export(str(tmp_path / "adapter"), str(tmp_path / "one"))
    command = ["export", str(tmp_path / "adapter"), str(tmp_path / "two")]
    (base / "model.safetensors").rename(tmp_path / "weights")
    assert main(command) == 2
    assert f"{str(base)!r} holds no weights" in capsys.readouterr().err
    (tmp_path / "weights").rename(base / "model.safetensors")
    base.rename(tmp_path / "elsewhere")
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "is in 4 bits, made from" in error
    assert "`--original FOLDER`, or `--base dequantised`" in error
    assert main([*command, f"--original={tmp_path / 'elsewhere'}"]) == 0
    one, two = ((tmp_path / out / "model.safetensors").read_bytes() for out in ("one", "two"))
    assert one == two
    save_tiny_mixtral(tmp_path / "wrong", seed=9)
    assert main(["export", str(tmp_path / "adapter"), str(tmp_path / "three"), f"--original={tmp_path / 'wrong'}"]) == 2
    assert "another one" in capsys.readouterr().err


def test_four_bits_of_a_hub_model_find_their_original(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_tiny_mixtral(tmp_path / "base")
    monkeypatch.setattr(hub, "_from_hub", lambda name, files: {"owner/name": base}[name])
    quantize("owner/name", str(tmp_path / "small"), dtype="float32")
    save_adapter(tmp_path / "small", tmp_path / "adapter", quantization="nf4")
    export(str(tmp_path / "adapter"), str(tmp_path / "one"))
    export(str(tmp_path / "adapter"), str(tmp_path / "two"), original=str(base))
    one, two = ((tmp_path / out / "model.safetensors").read_bytes() for out in ("one", "two"))
    assert one == two


@pytest.mark.parametrize("format", ["peft", "peft-per-expert"])
def test_an_adapter_without_factors_is_refused(
    tiny: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], format: str
) -> None:
    weights = run / "adapter/adapter_model.safetensors"
    save_file({"base_model.model.lm_head.weight": torch.zeros(272, 32)}, weights)
    assert main(["export", str(run), str(tmp_path / "out"), f"--format={format}"]) == 2
    assert "holds no LoRA factors" in capsys.readouterr().err


def test_overflow_in_half_precision_is_refused(tiny: Path, tmp_path: Path) -> None:
    model = save_adapter(tiny, tmp_path / "adapter", target_modules=["q_proj"])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1e4)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"q_proj is NaN or infinite in float16 once merged"):
        export(str(tmp_path / "adapter"), str(tmp_path / "out"), dtype="float16")
    assert not (tmp_path / "out").exists()


def test_a_damaged_adapter_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(run / "adapter", tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    written = bytearray(weights.read_bytes())
    written[-1] ^= 1
    weights.write_bytes(written)
    assert main(["export", str(tmp_path / "adapter"), str(tmp_path / "out")]) == 2
    assert "was changed or damaged after it was written" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
