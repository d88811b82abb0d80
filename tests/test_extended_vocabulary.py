"""The whole way with an extended vocabulary: train pieces, merge, fit, resume, validate, export, load elsewhere."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file

from lightning_mixcn import load_mixtral
from lightning_mixcn.cli import main
from lightning_mixcn.model import find_model, load_found
from lightning_mixcn.model.lora.adapter_file import EMBEDDINGS
from lightning_mixcn.testing import run_distributed
from tests.extended_tokenizers import HAN, TALES
from tests.modules.strategy_run import train

STORIES = Path(__file__).parents[1].parent / "shared/data/models/stories260K-mixtral-4e"
CONFIG = """
model:
  class_path: PretrainModule
  init_args:
    dtype: float32
    tokenizer: extended
    train_embeddings: true
    lora: {r: 4, lora_alpha: 8, target_modules: all-linear}
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1.0e-2}}
data:
  class_path: PretrainDataModule
  init_args:
    sources: [{name: text, path: text.jsonl}]
    sequence_length: 64
    micro_batch_size: 2
    num_streams: 2
    num_workers: 0
    val_fraction: 0.2
trainer:
  accelerator: cpu
  max_steps: 3
  val_check_interval: 3
  num_sanity_val_steps: 0
  enable_progress_bar: false
  enable_model_summary: false
"""


@pytest.fixture(autouse=True)
def here(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(tiny_base.name).symlink_to(tiny_base)  # adapters name their base without its path
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")


def extend(base: Path, texts: list[str], vocab_size: int, script: str) -> None:
    """text.jsonl, and the base's tokenizer with pieces of it in the folder extended."""
    Path("text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    train = ["vocab", "train", "text.jsonl", "--out=pieces.model", f"--vocab_size={vocab_size}"]
    assert main([*train, "--character_coverage=1.0"]) == 0
    assert main(["vocab", "merge", str(base), "pieces.model", "--out=extended", f"--script={script}"]) == 0


def run(base: str | Path, name: str, *options: str, command: str = "fit", **model: Any) -> int:
    config: dict[str, Any] = yaml.safe_load(CONFIG)
    config["model"]["init_args"] |= {"base": str(base), **model}
    Path(f"{name}.yaml").write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    return main([command, "--config", f"{name}.yaml", *options])


def bits_per_byte(name: str) -> float:
    report = json.loads(Path(f"runs/{name}/validate.json").read_text(encoding="utf-8"))
    return float(report["sources"]["text"]["bits_per_byte"])


# PEFT's own conversion of w1 and w3 to the fused layout leaves patterns for what was not adapted.
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("kept", [pytest.param("original", marks=pytest.mark.slow), "4-bit folder"])
def test_it_trains_resumes_and_goes_out_into_the_world(tiny_base: Path, kept: str) -> None:
    texts = ["".join(HAN[number % 7 :]) + f"。{number}" for number in range(60)]
    extend(tiny_base, texts, 120, "Han")
    base = str(tiny_base)
    if kept == "4-bit folder":
        assert main(["quantize", base, "small", "--dtype=float32"]) == 0
        base = "small"
    assert run(base, "run") == 0
    assert run(base, "run", "--ckpt_path", "last", "--trainer.max_steps", "5") == 0
    rows = len(transformers.AutoTokenizer.from_pretrained("runs/run/adapter"))
    stored = load_file("runs/run/adapter/adapter_model.safetensors")
    start: Any = load_mixtral(base, tokenizer="extended", train_embeddings=True, dtype="float32")
    for name in ("model.embed_tokens", "lm_head"):
        trained = stored[f"base_model.model.{name}.weight"]
        assert trained.shape == (rows, 32)
        assert (trained[259:] != start.get_submodule(name).weight[259:]).any(dim=1).any()  # they do train
    assert main(["export", "runs/run", "merged", "--base=dequantised"]) == 0
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained("merged", output_loading_info=True)
    assert not any(loaded[1].values())
    ids = torch.randint(3, rows, (2, 32), generator=torch.Generator().manual_seed(0))
    ours = load_found(find_model("runs/run"), dtype="float32")
    with torch.no_grad():
        torch.testing.assert_close(loaded[0].eval()(ids).logits, ours(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    assert loaded[0].config.vocab_size == rows
    known: Any = transformers.AutoTokenizer.from_pretrained("merged")
    assert len(known(texts[0])["input_ids"]) < len(texts[0])
    check_stock_peft(known(texts[0], return_tensors="pt").input_ids)
    assert run(base, "on", adapter="runs/run") == 0  # a further run goes on from its rows


def check_stock_peft(ids: torch.Tensor) -> None:
    """PEFT makes the rows by itself, from the tokenizer that every adapter's folder carries whole."""
    assert main(["export", "runs/run", "onto_original"]) == 0
    with torch.no_grad():
        expected = transformers.AutoModelForCausalLM.from_pretrained("onto_original").eval()(ids).logits
        for layout in (None, "peft", "peft-per-expert"):
            folder = layout or "runs/run/adapter"
            if layout is not None:
                assert main(["export", "runs/run", layout, f"--format={layout}"]) == 0
            report = "vocabulary_extension.json"  # of the merge; no tokenizer needs it
            of_tokenizer = {path.name for path in Path("extended").iterdir()} - {report}
            assert of_tokenizer <= {path.name for path in Path(folder).iterdir()}
            auto = peft.AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            torch.testing.assert_close(auto(ids).logits, expected, rtol=1e-4, atol=1e-4)
            card = Path(folder, "README.md").read_text(encoding="utf-8")
            assert f"call `base.resize_token_embeddings({len(auto.get_input_embeddings().weight)}" in card


def test_the_mean_beats_random_rows_before_any_training() -> None:
    """A real pretrained model, and English words of its own domain."""
    if not STORIES.is_dir():
        pytest.skip("the pretrained fixture stories260K-mixtral-4e lies outside the project and is not here")
    extend(STORIES, [f"{tale} {other}" for tale in TALES for other in TALES], 300, "Latin")
    modes = ("mean", "byte_mean", "multivariate", "random", "zeros")
    for new_rows in modes:
        assert run(STORIES, new_rows, command="validate", new_rows=new_rows, quantization="none") == 0
    measured = {name: bits_per_byte(name) for name in modes}
    # Measured: 2.05, 2.03, 3.34, 2.89, 2.91.
    assert max(measured["mean"], measured["byte_mean"]) < 0.8 * min(measured["random"], measured["zeros"])


def test_a_resumed_run_takes_rows_from_its_checkpoint(tiny_base: Path) -> None:
    """Drawn rows are those of the checkpoint, whatever they would start as now."""
    extend(tiny_base, ["".join(HAN[number % 7 :]) + f"。{number}" for number in range(60)], 95, "Han")
    assert run(tiny_base, "run", new_rows="multivariate") == 0
    shutil.copytree("runs", "kept")
    trained = []
    for new_rows in ("multivariate", "zeros"):
        shutil.rmtree("runs")
        shutil.copytree("kept", "runs")
        assert run(tiny_base, "run", "--ckpt_path", "last", "--trainer.max_steps", "5", new_rows=new_rows) == 0
        trained.append(load_file("runs/run/adapter/adapter_model.safetensors"))
    assert all(torch.equal(tensor, trained[1][name]) for name, tensor in trained[0].items())


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_ranks_train_the_same_rows(tiny_base: Path) -> None:
    """Under FSDP2, against one process; float32 sums in another order."""
    extend(tiny_base, ["".join(HAN[number % 7 :]) + f"。{number}" for number in range(60)], 95, "Han")
    settings: dict[str, Any] = {"max_steps": 3, "tokenizer": str(Path("extended").resolve()), "train_embeddings": True}
    (one,) = run_distributed(partial(train, **settings), 1, ["one"], str(tiny_base), str(Path.cwd()))
    for rank in run_distributed(partial(train, **settings), 2, ["fsdp2"], str(tiny_base), str(Path.cwd())):
        assert rank["fsdp2"]["losses"] == pytest.approx(one["one"]["losses"], rel=1e-5)
        for name in EMBEDDINGS:
            ours, theirs = rank["fsdp2"]["adapter"][name], one["one"]["adapter"][name]
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_an_extended_tokenizer_needs_trained_embeddings(tiny_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    extend(tiny_base, ["".join(HAN[number % 7 :]) + f"。{number}" for number in range(60)], 120, "Han")
    assert run(tiny_base, "run", train_embeddings=False) == 2
    assert "Set `train_embeddings: true`" in capsys.readouterr().err
    assert run(tiny_base, "run", tokenizer=str(tiny_base), new_rows="median") == 2
    assert "new_rows" in capsys.readouterr().err
    assert run("merged", "run") == 2
    assert run(tiny_base, "run") == 0
    assert run(tiny_base, "run", "--ckpt_path", "last", tokenizer=None) == 2  # the checkpoint has more rows
    assert "has the shape" in capsys.readouterr().err


def test_an_adapter_with_rows_of_its_own_brings_its_tokenizer(
    tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extend(tiny_base, ["".join(HAN[number % 7 :]) + f"。{number}" for number in range(60)], 120, "Han")
    assert run(tiny_base, "run") == 0
    assert run(tiny_base, "run", "--ckpt_path", "last", command="validate") == 0
    expected = bits_per_byte("run")
    for name, tokenizer in (("silent", None), ("told", "extended"), ("own", "runs/run/adapter")):
        assert run(tiny_base, name, command="validate", adapter="runs/run", tokenizer=tokenizer) == 0
        assert bits_per_byte(name) == pytest.approx(expected, rel=1e-5), name
    assert run(tiny_base, "on", adapter="runs/run", tokenizer=None) == 0
    own, further = (Path(f"runs/{name}/adapter/tokenizer.json").read_bytes() for name in ("run", "on"))
    assert own == further
    found = find_model("runs/on")
    assert len(transformers.AutoTokenizer.from_pretrained(found.tokenizer)) == len(
        load_file("runs/on/adapter/adapter_model.safetensors")["base_model.model.lm_head.weight"]
    )
    for command in ("fit", "validate"):
        assert run(tiny_base, "other", command=command, adapter="runs/run", tokenizer=str(tiny_base)) == 2
        assert "pieces, but the embeddings of `adapter=" in capsys.readouterr().err
