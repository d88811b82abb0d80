"""A tiny run with everything that a report can show, trained by the command, in two processes' worth of events."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_mixcn.cli import main
from tests.cli.test_trainer import CONFIG, write_source

CHINESE, ENGLISH = "中文", 'en <b>&"'
PROMPT = "<script>alert('今天')</script>"


def configuration(base: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(CONFIG)
    content["model"]["init_args"]["base"] = str(base)
    sources = [{"name": CHINESE, "path": "zh.jsonl", "weight": 0.9}, {"name": ENGLISH, "path": "en.jsonl"}]
    content["data"]["init_args"] |= {"sources": sources, "test_sources": [], "predict_sources": []}
    content["trainer"] |= {
        "max_steps": 2,
        "accumulate_grad_batches": 1,
        "val_check_interval": 2,
        "default_root_dir": "run",
        "callbacks": [
            {"class_path": "SampleText", "init_args": {"prompts": [PROMPT, "b"], "max_new_tokens": 3}},
            {"class_path": "ExpertLoadMonitor", "init_args": {"every_n_steps": 1}},
            {"class_path": "ThroughputLogger", "init_args": {"every_n_steps": 1}},
            {"class_path": "LongContextEval", "init_args": {"lengths": [16, 32], "documents": 1}},
            {"class_path": "RunFacts"},
        ],
    }
    return content


@pytest.fixture(scope="session")
def whole_run(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return the folder of a run of four steps, resumed after two, beside its texts. Read only."""
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
        write_source(folder / "zh.jsonl", "今天天气很好。")
        write_source(folder / "en.jsonl", "The weather is fine. ")
        content = configuration(tiny_base)
        Path("run.yaml").write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
        before = ["--trainer.default_root_dir", "run/before"]
        assert main(["fit", "--config", "run.yaml"]) == 0
        assert main(["validate", "--config", "run.yaml", "--trainer.callbacks=[]", *before]) == 0
        assert main(["fit", "--config", "run.yaml", "--trainer.max_steps", "4", "--ckpt_path", "last"]) == 0
        metrics = [{"acc,none": 0.25, "acc_stderr,none": 0.05}, {"acc,none": 0.5, "acc_stderr,none": 0.06}]
        lines = [json.dumps({"step": 4 * number, "tasks": {"ceval": part}}) for number, part in enumerate(metrics)]
        Path("run/benchmarks.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        yield folder / "run"
