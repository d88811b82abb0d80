"""What the README shows is run as it stands there."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import MixtralConfig, OlmoeConfig, Qwen3MoeConfig

from lightning_mixcn.cli import main
from lightning_mixcn.testing import byte_tokenizer

README = Path(__file__).parents[1] / "README.md"
CONFIGS = README.parent / "configs"

RUN = """
model:
  class_path: my_module.FocusedPretraining
  init_args:
    focus: 2.0
    dtype: float32
    lora: {r: 4, target_modules: all-linear}
data:
  class_path: PretrainDataModule
  init_args:
    sources: [{name: zh, path: zh.jsonl}]
    sequence_length: 32
    micro_batch_size: 2
    num_workers: 0
    val_fraction: 0.2
trainer: {accelerator: cpu, max_steps: 2, enable_progress_bar: false, num_sanity_val_steps: 0, limit_val_batches: 0}
"""


def test_the_subclass_trains(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    shown = re.findall(r"```python\n(from lightning_mixcn import PretrainModule.*?)```", README.read_text(), re.DOTALL)
    assert len(shown) == 1
    assert sum(bool(line.strip()) for line in shown[0].splitlines()) <= 15
    Path("my_module.py").write_text(shown[0])
    lines = (json.dumps({"text": f"今天天气很好。{number}"}) for number in range(40))
    Path("zh.jsonl").write_text("\n".join(lines), encoding="utf-8")
    run = yaml.safe_load(RUN)
    run["model"]["init_args"]["base"] = str(tiny_base)
    Path("run.yaml").write_text(yaml.safe_dump(run))
    assert main(["fit", "--config", "run.yaml"]) == 0
    assert "my_module.FocusedPretraining" in Path("runs/run/config.yaml").read_text()


def test_it_is_one_page_in_its_order() -> None:
    """What a reader looks for first comes first; everything else has its page in docs/."""
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    head, *rest = re.split(r"^## (.*)$", text, flags=re.MULTILINE)
    assert re.findall(r"^    (make \S+)", head, re.MULTILINE) == ["make demo", "make test"]
    assert rest[::2] == [
        "Who it is for", "Status", "Install", "Your own data", "Hardware", "The demo's result", "Commands",
        "Subclass it", "Speed", "Links",
    ]  # fmt: skip


def hardware() -> list[list[str]]:
    section = README.read_text(encoding="utf-8").split("## Hardware")[1].split("\n## ")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\| .*\d.*$", section, re.M)]


# Of several types, one of which the configuration takes without declaring it.
QWEN: dict[str, Any] = {"num_hidden_layers": 48, "head_dim": 128, "norm_topk_prob": True}
# The defaults are the sizes of Mixtral-8x7B.
PUBLISHED = {
    "Mixtral-8x7B": MixtralConfig(),
    "OLMoE-1B-7B": OlmoeConfig(intermediate_size=1024),
    "Qwen3-30B-A3B": Qwen3MoeConfig(**QWEN),
}
PLANNED = [cells for cells in hardware() if cells[-1] == "planned"]


def test_hardware_rows_say_whether_they_were_measured() -> None:
    assert len(PLANNED) >= 6
    assert {cells[-1] for cells in hardware()} == {"planned", "measured"}


@pytest.mark.parametrize("cells", PLANNED, ids=lambda cells: "-".join(cells[:4]))
def test_planned_memory_is_what_the_plan_says(
    cells: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A plan reads the base's configuration and nothing else."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    card, model, settings, rows, memory, _ = cells
    PUBLISHED[model.split(",")[0]].save_pretrained("base")
    byte_tokenizer().save_pretrained("base")
    options = {
        "model.init_args.base": "base",
        "model.init_args.lora.r": re.search(r"r = (\d+)", model)[1],  # type: ignore[index]  # a row without it is wrong
        "model.init_args.train_embeddings": str("embeddings" in model).lower(),
        "model.init_args.activation_checkpointing": "full" if "`full`" in settings else "selective",
        "data.init_args.micro_batch_size": rows.split()[0],
        "trainer.devices": card.split()[0],
    }
    configs = [next(CONFIGS.rglob(name)) for name in re.findall(r"`(\w+\.yaml)`", settings)]
    if not any(path.name.startswith("pretrain") for path in configs):
        configs.insert(0, CONFIGS / "pretrain_mixtral_8x7b.yaml")
    arguments = [part for path in configs for part in ("--config", str(path))]
    assert main(["fit", *arguments, *(f"--{key}={value}" for key, value in options.items()), "--plan"]) == 0
    planned = re.search(r"^sum +([\d.]+)$", capsys.readouterr().out, re.MULTILINE)
    assert planned
    assert f"{float(planned[1]):.1f} GB" == memory
