"""An export in other people's programs: a server that the openai client asks, and lm-evaluation-harness."""

import importlib
import json
import math
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_mixcn.model.export.command import export
from tests.model.adapters_on_disk import save_adapter
from tests.model.export.test_folder import logits_of

TEMPLATE = "{{ bos_token }}{% for message in messages %}[INST] {{ message['content'] }} [/INST]{% endfor %}"


@pytest.fixture
def exported(tiny: Path, tmp_path: Path) -> tuple[Path, Any]:
    """Return an exported folder with a chat template, and the model that was trained."""
    trained = save_adapter(tiny, tmp_path / "adapter")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "adapter" / name).write_bytes((tiny / name).read_bytes())
    (tmp_path / "adapter/chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    export(str(tmp_path / "adapter"), str(tmp_path / "out"))
    return tmp_path / "out", trained


@pytest.fixture
def server(exported: tuple[Path, Any]) -> Iterator[str]:
    """Start ``transformers serve`` on the folder, and return its address once it answers."""
    for package in ("openai", "fastapi", "uvicorn"):
        pytest.importorskip(package, reason="transformers serve needs transformers[serving], which is not installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(exported[0])]
    process = subprocess.Popen([*command, "--port", str(port), "--device", "cpu", "--dtype", "float32"])
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert process.poll() is None, "the server ended"
                assert time.monotonic() < deadline, "the server does not answer"
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(timeout=30)


@pytest.mark.slow
def test_transformers_serve_answers_the_openai_client(exported: tuple[Path, Any], server: str) -> None:
    openai: Any = pytest.importorskip("openai", reason="the package openai is not installed")
    client = openai.OpenAI(base_url=server, api_key="none", timeout=60)
    answer = client.chat.completions.create(
        model=str(exported[0]), messages=[{"role": "user", "content": "你好"}], max_tokens=8, temperature=0
    )
    assert answer.choices[0].message.content is not None


@pytest.mark.slow
def test_lm_eval_scores_what_the_trained_model_scores(exported: tuple[Path, Any], tmp_path: Path) -> None:
    """A task of one's own, offline: the log-likelihood of each continuation against our own model's."""
    lm_eval: Any = pytest.importorskip("lm_eval", reason="the package lm-eval (extra `eval`) is not installed")
    hflm = importlib.import_module("lm_eval.models.huggingface").HFLM
    task_manager = importlib.import_module("lm_eval.tasks").TaskManager

    records = [
        {"question": "abc", "answers": ["def", "xyz"], "label": 0},
        {"question": "中", "answers": ["国", "间"], "label": 1},
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n", encoding="utf-8")
    task = {
        "task": "tiny",
        "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}},
        "output_type": "multiple_choice", "test_split": "test", "doc_to_text": "{{question}}",
        "doc_to_choice": "answers", "doc_to_target": "label", "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/tiny.yaml").write_text(json.dumps(task), encoding="utf-8")  # JSON is YAML
    folder, trained = exported
    model = hflm(pretrained=str(folder), device="cpu", dtype="float32")
    found = lm_eval.simple_evaluate(
        model=model, tasks=["tiny"], task_manager=task_manager(include_path=str(tmp_path / "tasks")), log_samples=True
    )
    for sample in found["samples"]["tiny"]:
        for (context, continuation), (score, _) in zip(
            [argument[:2] for argument in sample["arguments"]],
            sample["filtered_resps"],
            strict=True,
        ):
            expected = likelihood(trained, model.tokenizer, context, continuation)
            assert math.isclose(float(score), expected, rel_tol=1e-4)


def likelihood(model: Any, tokenizer: Any, context: str, continuation: str) -> float:
    """Natural logarithm of the continuation's probability."""
    before = tokenizer(context).input_ids
    ids = [*before, *tokenizer(continuation, add_special_tokens=False).input_ids]
    scores = logits_of(model, torch.tensor([ids]))[0].double().log_softmax(-1)
    return sum(float(scores[place - 1, ids[place]]) for place in range(len(before), len(ids)))
