"""The data module as LightningCLI reads it from YAML."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_mixcn.data import PretrainDataModule
from lightning_mixcn.text import Source, read_corpus

# Lightning 2.6 calls jsonargparse by its former names.
FORMER = "(?s).*(was deprecated in v4|JsonargparseDeprecationWarning)"
pytestmark = pytest.mark.filterwarnings(f"ignore:{FORMER}:DeprecationWarning")

YAML = """
data:
  class_path: lightning_mixcn.data.PretrainDataModule
  init_args:
    sources: [{name: zh, path: "data/zh/*.jsonl.gz", weight: 0.9}, {name: en, path: [data/en, more], max_epochs: 2}]
    val_sources: []
    sequence_length: 128
"""


Parse = Callable[[str], PretrainDataModule]


@pytest.fixture
def parse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Parse:
    def parse_(text: str) -> PretrainDataModule:
        (tmp_path / "run.yaml").write_text(text)
        arguments = ["--config", str(tmp_path / "run.yaml"), "--trainer.accelerator=cpu", "--trainer.logger=false"]
        monkeypatch.setattr(sys, "argv", ["mixcn", *arguments])
        cli = LightningCLI(
            BoringModel,
            PretrainDataModule,
            subclass_mode_data=True,
            run=False,
            save_config_callback=None,
            seed_everything_default=False,
            parser_kwargs={"exit_on_error": False},
        )
        module: PretrainDataModule = cli.datamodule
        return module

    return parse_


def test_yaml(parse: Parse) -> None:
    module = parse(YAML)
    assert module.source_names("train") == ["zh", "en"]
    assert (module.sequence_length, module.num_streams, module.max_eval_rows) == (128, 64, 256)


def test_columns_in_yaml(parse: Parse, tmp_path: Path) -> None:
    (tmp_path / "zh.json").write_text('[{"body": "one"}, {"body": "two"}]')
    yaml = YAML.replace('path: "data/zh/*.jsonl.gz"', f"path: {tmp_path}/zh.json, columns: {{text: body}}")
    source = parse(yaml)._documents._sources["sources"][0]
    assert source.columns == {"text": "body"}
    corpus = read_corpus(source)
    assert [corpus.text(index) for index in range(len(corpus))] == ["one", "two"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("weight: 0.9", "wieght: 0.9", "wieght"),
        ("weight: 0.9", "weight: much", "much"),
        ("sequence_length: 128", "sequence_lenght: 128", "sequence_lenght"),
        ("name: zh, ", "", "name"),
    ],
)
def test_bad_yaml(old: str, new: str, message: str, parse: Parse) -> None:
    with pytest.raises(ArgumentError, match=message):
        parse(YAML.replace(old, new))


def test_help_explains_a_source() -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(PretrainDataModule, "data")
    parser.add_class_arguments(Source, "source")
    text = " ".join(parser.format_help().split())
    assert "Tokens of a row" in text
    assert "Share of the training text relative to the other sources' weights" in text


@pytest.mark.parametrize(
    ("before", "package", "absent"),
    [
        ("json", "text", {"torch", "lightning", "transformers", "pyarrow", "sentencepiece", "tokenizers"}),
        # Lightning itself imports some of these.
        (
            "lightning.pytorch",
            "data",
            {"transformers", "pyarrow", "sentencepiece", "tokenizers", "peft", "bitsandbytes"},
        ),
    ],
    ids=["text", "data"],
)
def test_imports_are_lazy(before: str, package: str, absent: set[str]) -> None:
    program = f"import sys, {before}; before = set(sys.modules); import lightning_mixcn.{package}"
    program += "; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert f"lightning_mixcn.{package}" in done.stdout
    assert not absent & {name.partition(".")[0] for name in done.stdout.split()}
