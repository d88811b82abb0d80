"""What answers were trained with, in the folders that leave, read by stock tools: template, end tokens, tokenizer."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import lightning_mixcn.cli.conversation
from lightning_mixcn.cli import main
from lightning_mixcn.data import InstructDataModule
from lightning_mixcn.testing import save_tiny_mixtral
from lightning_mixcn.text import ConversationSource, load_tokenizer

SHARED = Path(__file__).parents[2] / "shared/data"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OWN = (
    "{{ bos_token }}{% for m in messages %}### {{ m.role }}:\n{{ m.content }}"
    "{{ eos_token if m.role == 'assistant' }}{% endfor %}{% if add_generation_prompt %}### assistant:\n{% endif %}"
)
# PEFT's own conversion of w1 and w3 leaves patterns for what is not adapted.
pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    """Real conversations, of one and of several turns, as messages."""
    if not (SHARED / "sft").is_dir():
        pytest.skip("the instructions of shared/data/sft lie outside the project and are not here")
    alpaca = json.loads((SHARED / "sft/alpaca_zh_demo.json").read_text(encoding="utf-8"))[:25]
    asked = [(record["instruction"] + ("\n" + record["input"]) * bool(record["input"])) for record in alpaca]
    made = [talk(question, record["output"]) for question, record in zip(asked, alpaca, strict=True)]
    oasst = json.loads((SHARED / "sft/oasst1_zh.json").read_text(encoding="utf-8"))
    several = [record for record in oasst if record.get("history")][:5]
    for record in several:
        turns = [text for pair in record["history"] for text in pair]
        made.append(talk(*turns, record["instruction"], record["output"]))
    made.append({"messages": [{"role": "system", "content": "Be brief."}, *talk("  two ", " blanks\n")["messages"]]})
    assert len(made) > 25
    return made


def talk(*texts: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[place % 2], "content": text} for place, text in enumerate(texts)]}


def with_special_tokens(base: Path, *names: str) -> None:
    """Give a tokenizer of bytes special tokens, in rows that the model has to spare."""
    file = base / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    first = max(content["model"]["vocab"].values()) + 1
    for index, name in enumerate(names, first):
        content["added_tokens"].append(
            {"id": index, "content": name, "special": True} | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
            | {"normalized": False}
        )  # fmt: skip
    file.write_text(json.dumps(content), encoding="utf-8")


def bytes_base(folder: Path) -> Path:
    """Its tokenizer has ChatML's tokens and template."""
    save_tiny_mixtral(folder, max_position_embeddings=4096)
    with_special_tokens(folder, "<|im_start|>", "<|im_end|>")
    (folder / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    (folder / "generation_config.json").write_text('{"eos_token_id": 2, "temperature": 0.6, "do_sample": true}')
    return folder


def sentencepiece_base(folder: Path, *files: str, tokenizer_class: str) -> Path:
    """With Mixtral's own tokenizer, of which some files are there."""
    if not (SHARED / "tokenizers").is_dir():
        pytest.skip("the tokenizers of shared/data lie outside the project and are not here")
    save_tiny_mixtral(folder, vocab_size=32000, max_position_embeddings=4096)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)
    for name in (*files, "tokenizer_config.json"):
        shutil.copyfile(SHARED / "tokenizers/mixtral-8x7b" / name, folder / name)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": tokenizer_class}))
    return folder


BASES: dict[str, Callable[[Path], Path]] = {
    "bytes": bytes_base,
    "fast": lambda folder: sentencepiece_base(folder, "tokenizer.json", tokenizer_class="PreTrainedTokenizerFast"),
    "llama": lambda folder: sentencepiece_base(
        folder, "tokenizer.json", "tokenizer.model", tokenizer_class="LlamaTokenizer"
    ),
    "model alone": lambda folder: sentencepiece_base(folder, "tokenizer.model", tokenizer_class="LlamaTokenizer"),
}
CASES = [("bytes", "mixtral"), ("bytes", "own.jinja"), ("bytes", "tokenizer"), ("fast", "mixtral"),
         ("llama", "own.jinja"), ("model alone", "mixtral")]  # fmt: skip


def config_of(base: Path, template: str, **model: Any) -> dict[str, Any]:
    lora = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"}
    return {
        "model": {
            "class_path": "InstructModule",
            "init_args": {"base": str(base), "dtype": "float32", "quantization": "none", "lora": lora} | model,
        },
        "data": {
            "class_path": "InstructDataModule",
            "init_args": {
                "sources": [{"name": "a", "path": "s.jsonl"}], "template": template, "sequence_length": 4096,
                "micro_batch_size": 1, "num_streams": 2, "num_workers": 0, "val_fraction": 0.2,
            },
        },
        "trainer": {
            "accelerator": "cpu", "max_steps": 2, "val_check_interval": 1, "num_sanity_val_steps": 0, "logger": False,
            "enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 1,
        },
    }  # fmt: skip


def fit(records: list[dict[str, Any]], config: dict[str, Any], run: str) -> None:
    Path("s.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    Path("own.jinja").write_text(OWN, encoding="utf-8")
    Path("c.yaml").write_text(json.dumps(config), encoding="utf-8")
    assert main(["fit", "--config", "c.yaml", "--trainer.default_root_dir", run]) == 0


def training_documents(tokenizer: Path, template: str) -> list[list[int]]:
    """Take the conversations that training rows are made of out of the rows again."""
    data = InstructDataModule(
        sources=[ConversationSource("a", "s.jsonl")], template=template, tokenizer=str(tokenizer), sequence_length=4096,
        micro_batch_size=4, num_streams=1, num_workers=0, val_fraction=0.0,
    )  # fmt: skip
    data.setup("fit")
    documents = []
    batch = next(iter(data.train_dataloader()))
    for ids, numbers in zip(batch["input_ids"], batch["document_ids"], strict=True):
        documents += [ids[numbers == number].tolist() for number in range(int(numbers.max()) + 1)]
    assert len(documents) > 10
    return documents


@pytest.mark.parametrize(("base", "template"), CASES)
def test_stock_transformers_lays_out_what_was_trained(
    base: str, template: str, records: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = BASES[base](tmp_path / "base")
    fit(records, config_of(folder, template), "run")
    names = ["run/adapter", "run/adapter_best", "merged"]
    formats = {"merged": "hf"} | ({"fused": "peft", "experts": "peft-per-expert"} if base == "bytes" else {})
    for out, format in formats.items():
        assert main(["export", "run", out, f"--format={format}"]) == 0
    trained = training_documents(folder, template)
    ends = [2, 260] if template == "tokenizer" else 2  # </s>, <|im_end|>
    for name in dict.fromkeys([*names, *formats]):
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(name)
        laid_out = [
            tokenizer.apply_chat_template(record["messages"], tokenize=True, return_dict=False) for record in records
        ]
        assert all(document in laid_out for document in trained), name
        settings = json.loads(Path(name, "generation_config.json").read_text())
        assert settings["eos_token_id"] == ends, name
        assert tokenizer("a")["input_ids"][0] == 1
        if base == "bytes":
            assert settings["temperature"] == 0.6
            own = {"mixtral": "[INST]", "own.jinja": "###", "tokenizer": "<|im_start|>"}[template]
            assert own in tokenizer.chat_template
    model: Any = transformers.AutoModelForCausalLM.from_pretrained("merged")
    assert model.generation_config.eos_token_id == ends
    row = torch.tensor([trained[0][:200]])
    auto = peft.AutoPeftModelForCausalLM.from_pretrained("run/adapter", dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(model.eval().float()(row).logits, auto(row).logits, rtol=1e-4, atol=1e-4)


def chat_prompt(source: str, monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], set[int]]:
    """Return what `mixcn chat` gives the model, and where it stops, for the question 你好."""
    seen: list[tuple[list[int], set[int]]] = []

    def stream(model: Any, ids: list[int], *_: Any, stop_ids: Any, **__: Any) -> Any:
        seen.append((list(ids), set(stop_ids)))
        return iter([5])

    monkeypatch.setattr(lightning_mixcn.cli.conversation, "stream_tokens", stream)
    monkeypatch.setattr("sys.stdin", io.StringIO("你好\n"))
    assert main(["chat", source, "--quantization=none", "--dtype=float32", "--device=cpu"]) == 0
    return seen[0]


@pytest.mark.parametrize("template", ["mixtral", "own.jinja", "tokenizer"])
def test_chat_asks_as_it_was_trained(
    template: str, records: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fit(records, config_of(bytes_base(tmp_path / "base"), template), "run")
    assert main(["export", "run", "merged"]) == 0
    tokenizer = load_tokenizer("base")
    text = {
        "mixtral": "<s>[INST] 你好 [/INST]",
        "own.jinja": "<s>### user:\n你好### assistant:\n",
        "tokenizer": "<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n",
    }[template]
    expected = tokenizer.hf(text, add_special_tokens=False)["input_ids"]
    ends = {2, 260} if template == "tokenizer" else {2}
    for source in ("run", "run/adapter", "merged"):
        assert chat_prompt(source, monkeypatch) == (expected, ends)


def test_a_pretraining_run_says_that_the_template_is_the_bases(
    records: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = config_of(bytes_base(tmp_path / "base"), "")
    config["model"]["class_path"], config["data"]["class_path"] = "PretrainModule", "PretrainDataModule"
    config["data"]["init_args"] |= {"sequence_length": 64}
    config["data"]["init_args"].pop("template")
    texts: list[dict[str, Any]] = [{"text": record["messages"][0]["content"]} for record in records]
    fit(texts, config, "run")
    assert main(["export", "run", "merged"]) == 0
    for name in ("run/adapter", "merged"):
        assert transformers.AutoTokenizer.from_pretrained(name).chat_template == CHATML
        assert "a chat template here is the base's, and was not trained on" in Path(name, "README.md").read_text()
        assert json.loads(Path(name, "generation_config.json").read_text())["eos_token_id"] == 2


def test_other_templates_of_the_base_are_gone(
    records: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One in tokenizer_config.json, where older readers look first, would contradict the one that was trained on."""
    monkeypatch.chdir(tmp_path)
    base = bytes_base(tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    settings = json.loads((base / "tokenizer_config.json").read_text())
    named = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": "tools"}]
    (base / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": named}))
    (base / "chat_template.json").write_text(json.dumps({"chat_template": CHATML}))
    fit(records, config_of(base, "own.jinja"), "run")
    assert not Path("run/adapter/chat_template.json").exists()
    assert "chat_template" not in json.loads(Path("run/adapter/tokenizer_config.json").read_text())
    assert Path("run/adapter/chat_template.jinja").read_text() == OWN
