"""The notebook runs from its first cell to its last, and trains what the command and a plain script train."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_mixcn.cli import main
from tests.callbacks.test_defaults import scalars

NOTEBOOK = Path(__file__).parents[2] / "examples/adapt_in_a_notebook.ipynb"
TIMED = ("throughput/", "data/seconds_waiting", "data/wait_share")
STEPS, LENGTH = 4, 96


def cells() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return found


def parameters(base: Path, folder: Path, run: str) -> str:
    values = {"base": str(base), "text": str(folder / "text"), "run": str(folder / run)}
    return "".join(
        f"{name} = {value!r}\n" for name, value in {**values, "max_steps": STEPS, "sequence_length": LENGTH}.items()
    )


def write_text(folder: Path) -> None:
    """Write text as `make demo` does, of two languages."""
    for part, count in (("train", 60), ("held_out", 6)):
        (folder / "text" / part).mkdir(parents=True)
        for name, text in (("zh", "今天天气很好，我们去公园。"), ("en", "the quick brown fox jumps over the lazy dog")):
            lines = [json.dumps({"text": f"{number}{part} {text * (1 + number % 3)}"}) for number in range(count)]
            (folder / "text" / part / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")


def run_notebook(base: Path, folder: Path) -> Any:
    """Execute it as Jupyter does, with other parameters behind its own."""
    nbformat = pytest.importorskip("nbformat", reason="nbclient is not installed; the dev extra has it")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed; the dev extra has it")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (place,) = [n for n, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])]
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(parameters(base, folder, "notebook")))
    return nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()


def run_command(base: Path, folder: Path) -> None:
    text = folder / "text"
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate", "w1", "w2", "w3"]
    config = {
        "model": {
            "class_path": "PretrainModule",
            "init_args": {
                "base": str(base),
                "lora": {"r": 16, "lora_alpha": 32, "target_modules": targets},
                "activation_checkpointing": "none",
                "optimizer": {
                    "class_path": "torch.optim.AdamW",
                    "init_args": {"lr": 1.0e-3, "weight_decay": 0.0, "fused": True},
                },
                "lr_scheduler": {"class_path": "WarmupCosine", "init_args": {"warmup_fraction": 0.05}},
            },
        },
        "data": {
            "class_path": "PretrainDataModule",
            "init_args": {
                "sources": [
                    {"name": name, "path": str(text / f"train/{name}.jsonl"), "weight": weight}
                    for name, weight in (("zh", 0.8), ("en", 0.2))
                ],
                "val_sources": [{"name": name, "path": str(text / f"held_out/{name}.jsonl")} for name in ("zh", "en")],
                "sequence_length": LENGTH,
                "micro_batch_size": 1,
                "num_workers": 0,
            },
        },
        "trainer": {
            "accelerator": "cpu", "default_root_dir": str(folder / "command"), "max_steps": STEPS,
            "val_check_interval": STEPS, "check_val_every_n_epoch": None, "gradient_clip_val": 1.0,
            "callbacks": [
                {
                    "class_path": "SampleText",
                    "init_args": {"prompts": ["今年春节期间，", "The history of science is"], "max_new_tokens": 16},
                },
                {"class_path": "ExpertLoadMonitor"},
            ],
        },
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    assert main(["fit", "--config", str(folder / "run.yaml")]) == 0


def run_script(base: Path, folder: Path) -> None:
    """Run the notebook's cells up to the training in a plain interpreter."""
    code = ["".join(cell["source"]) for cell in cells() if cell["id"] in ("imports", "module", "fit")]
    (folder / "script.py").write_text("\n".join([parameters(base, folder, "script"), *code]), encoding="utf-8")
    subprocess.run([sys.executable, "script.py"], check=True, cwd=folder, capture_output=True)


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Jupyter's own packages
def test_notebook_script_and_command_are_one_run(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[1]))
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    write_text(tmp_path)
    shown = outputs(run_notebook(tiny_base, tmp_path))
    run_script(tiny_base, tmp_path)
    run_command(tiny_base, tmp_path)
    ways = [tmp_path / name for name in ("command", "notebook", "script")]
    files = [(way / "adapter/adapter_model.safetensors").read_bytes() for way in ways]
    assert files[0] == files[1] == files[2]
    logged = [{tag: values for tag, values in scalars(way).items() if not tag.startswith(TIMED)} for way in ways]
    assert {"train/loss", "val/zh/bits_per_byte", "val/en/bits_per_byte", "lr-AdamW"} <= set(logged[0])
    assert logged[0] == logged[1] == logged[2]
    samples = [(way / "samples.jsonl").read_text(encoding="utf-8") for way in ways]
    assert samples[0] == samples[1] == samples[2]
    printed = "".join(output.text for output in shown if output.output_type == "stream")
    assert "\r" not in printed  # bars are widgets, not lines that are written over
    for name in ("zh", "en"):
        ((_, value),) = logged[0][f"val/{name}/bits_per_byte"]
        assert f"{name}: {value:.3f} bits per byte" in printed
    assert any("image/png" in output.get("data", {}) for output in shown)
    assert (tmp_path / "notebook/merged/config.json").is_file()


def test_its_cells_are_committed_as_they_were_written() -> None:
    """Parameters come in one cell, for whoever runs it with other ones, and no path of a machine is in its output."""
    assert [cell["id"] for cell in cells() if "parameters" in cell["metadata"].get("tags", [])] == ["parameters"]
    assert "Traceback" not in NOTEBOOK.read_text(encoding="utf-8")
