"""An instruct model's difference from the base, added at export: formula in float64, files, refusals, training on."""

import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_mixcn.cli import main
from lightning_mixcn.model import MoePeftModel, load_moe
from lightning_mixcn.model.architectures import MODEL_TYPES, architecture_named
from lightning_mixcn.model.convert.quantize import quantize
from lightning_mixcn.model.export.command import export
from lightning_mixcn.model.export.gguf import CONVERTER
from lightning_mixcn.testing import random_batch, save_tiny_mixtral, save_tiny_model
from lightning_mixcn.text import Turn, load_template, load_tokenizer
from tests.extended_tokenizers import HAN, extend, qwen_like
from tests.model.trained_values import draw_trained

Weights = dict[str, Tensor]
_EXPERT = re.compile(r"(model\.layers\.\d+)\.\w+\.experts\.(\d+)\.(\w+)")
_PLACES = {"w1": 0, "gate_proj": 0, "w3": 1, "up_proj": 1, "w2": None, "down_proj": None}
TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")


def stock_weights(folder: Path) -> Weights:
    """Return the state dict of stock transformers in float64, which has each layer's experts in two tensors."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    return dict(model.state_dict())


def save_lora(base: Path, folder: Path, *, train_embeddings: bool = False, tokenizer: Path | None = None) -> Path:
    """Save an adapter with random factors on every matrix, and moved embeddings if they train."""
    family = json.loads((base / "config.json").read_text())["model_type"]
    lora = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=list(architecture_named(family).short_names),
        init_lora_weights=False,
    )
    model = load_moe(
        base,
        quantization="none",
        dtype="float32",
        lora=lora,
        train_embeddings=train_embeddings,
        tokenizer=tokenizer,
    )
    assert isinstance(model, MoePeftModel)
    draw_trained(model, 0.05)
    model.save_pretrained(folder)
    for file in [] if tokenizer is None else tokenizer.glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)
    return folder


def adapted(weights: Weights, adapter: Path) -> Weights:
    """Return W + 2·BA, α/r being 8/4, and the embeddings that the adapter saved whole."""
    weights = {name: values.clone() for name, values in weights.items()}
    stored = load_file(adapter / "adapter_model.safetensors")
    tensors = {key.removeprefix("base_model.model."): values.double() for key, values in stored.items()}
    for key, values in tensors.items():
        if key in weights:
            weights[key] = values
        if not key.endswith(".lora_B.weight"):
            continue
        name = key.removesuffix(".lora_B.weight")
        update = 2 * values @ tensors[f"{name}.lora_A.weight"]
        if (match := _EXPERT.fullmatch(name)) is None:
            weights[re.sub(r"\.block_sparse_moe\.gate$", ".mlp.gate", name) + ".weight"] += update
        elif (half := _PLACES[match[3]]) is None:
            weights[f"{match[1]}.mlp.experts.down_proj"][int(match[2])] += update
        else:
            weights[f"{match[1]}.mlp.experts.gate_up_proj"][int(match[2])].chunk(2)[half].add_(update)
    return weights


def expected(base: Path, instruct: Path, adapter: Path | None, weight: float, rows: int | None = None) -> Weights:
    """Compute the formula; of the embeddings only ``rows`` have a difference."""
    start, tuned = stock_weights(base), stock_weights(instruct)
    result = dict(start) if adapter is None else adapted(start, adapter)
    for name in result:
        part = slice(None) if name not in EMBEDDINGS else slice(rows or len(tuned[name]))
        values = result[name].clone()
        values[part] += weight * (tuned[name][part] - start[name][part])
        result[name] = values
    return result


def assert_equal(folder: Path, wanted: Weights) -> None:
    """Compare what stock transformers reads, in float32 of float64: sums of three terms below 4."""
    found = stock_weights(folder)
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        torch.testing.assert_close(found[name], values, rtol=1e-6, atol=1e-6, msg=name)


def pair(folder: Path, family: str = "mixtral", **changes: Any) -> tuple[Path, Path]:
    """Write a base, and a model of the same shape with other weights in all tensors, norms included."""
    base = save_tiny_model(folder / "base", family, **changes)
    instruct = save_tiny_model(folder / "instruct", family, seed=1, **changes)
    generator = torch.Generator().manual_seed(2)
    stored = load_file(instruct / "model.safetensors")
    stored = {key: t + torch.randn(t.shape, generator=generator) * 0.01 for key, t in stored.items()}
    save_file(stored, instruct / "model.safetensors", metadata={"format": "pt"})
    return base, instruct


def with_chat(instruct: Path) -> Path:
    (instruct / "chat_template.jinja").write_text(TEMPLATE)
    (instruct / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7], "temperature": 0.5}))
    return instruct


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", MODEL_TYPES)
def test_every_tensor_is_the_formula(family: str, tied: bool, tmp_path: Path) -> None:
    base, instruct = pair(tmp_path, family, tie_word_embeddings=tied)
    adapter = save_lora(base, tmp_path / "adapter", train_embeddings=True)
    export(str(adapter), str(tmp_path / "out"), instruct_delta=str(instruct))
    wanted = expected(base, instruct, adapter, 1.0)
    assert_equal(tmp_path / "out", wanted)
    start = stock_weights(base)
    assert all(not torch.equal(wanted[name], start[name]) for name in wanted)  # no tensor is left out


@pytest.mark.parametrize("family", MODEL_TYPES)
@pytest.mark.parametrize(("of_base", "of_instruct"), [("fused", "per-expert"), ("per-expert", "fused")])
def test_layouts_may_differ(family: str, of_base: Any, of_instruct: Any, tmp_path: Path) -> None:
    plain = pair(tmp_path, family)
    folders = [tmp_path / "b", tmp_path / "i"]
    for source, folder, layout in zip(plain, folders, (of_base, of_instruct), strict=True):
        export(str(source), str(folder), layout=layout)
    base, instruct = folders
    adapter = save_lora(base, tmp_path / "adapter")
    export(str(adapter), str(tmp_path / "out"), instruct_delta=str(instruct), instruct_weight=0.5, layout=of_instruct)
    assert_equal(tmp_path / "out", expected(*plain, adapter, 0.5))


def test_a_base_without_adapter(tmp_path: Path) -> None:
    base, instruct = pair(tmp_path)
    export(str(base), str(tmp_path / "out"), instruct_delta=str(instruct), instruct_weight=0.5)
    assert_equal(tmp_path / "out", expected(base, instruct, None, 0.5))
    assert "base, adapted" in (tmp_path / "out/README.md").read_text()


def test_rounded_once(tmp_path: Path) -> None:
    """In bfloat16 it is the float32 result, rounded; also where the files are in bfloat16."""
    base, instruct = pair(tmp_path)
    halves = [str(tmp_path / name) for name in ("half_base", "half_instruct")]
    for source, half in zip((base, instruct), halves, strict=True):
        export(str(source), half, dtype="bfloat16")
    adapter = save_lora(Path(halves[0]), tmp_path / "adapter")
    for dtype in (None, "float32"):
        export(str(adapter), str(tmp_path / str(dtype)), instruct_delta=halves[1], dtype=dtype)
    rounded, exact = (load_file(tmp_path / name / "model.safetensors") for name in ("None", "float32"))
    assert all(torch.equal(rounded[name], values.bfloat16()) for name, values in exact.items())


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_rows_beyond_the_instruct_vocabulary_keep_theirs(tied: bool, tmp_path: Path) -> None:
    base, instruct = pair(tmp_path, tie_word_embeddings=tied)
    extended = extend(base, tmp_path / "t", HAN, 90)
    adapter = save_lora(base, tmp_path / "adapter", train_embeddings=True, tokenizer=extended)
    export(str(adapter), str(tmp_path / "out"), instruct_delta=str(with_chat(instruct)))
    saved = load_file(adapter / "adapter_model.safetensors")["base_model.model.model.embed_tokens.weight"]
    found, start, tuned = (stock_weights(folder)[EMBEDDINGS[0]] for folder in (tmp_path / "out", base, instruct))
    assert len(found) == len(saved) > 300
    assert torch.equal(found[259:].float(), saved[259:])
    torch.testing.assert_close(found[:259], saved[:259].double() + tuned[:259] - start[:259], rtol=1e-6, atol=1e-6)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(tokenizer) == len(saved)
    assert tokenizer.chat_template == TEMPLATE
    assert load_tokenizer(tmp_path / "out").encode_batch(["中国"]) == load_tokenizer(extended).encode_batch(["中国"])


def test_pieces_in_spare_rows_keep_theirs(tmp_path: Path) -> None:
    """Qwen3 has rows to spare, which new pieces took: the instruct model's rows there were never trained."""
    base, instruct = pair(tmp_path, "qwen3_moe", vocab_size=640)
    for folder in (base, instruct):
        qwen_like(folder)
    settings = json.loads((instruct / "tokenizer_config.json").read_text())
    settings |= {"chat_template": TEMPLATE, "eos_token": "<|im_start|>"}
    (instruct / "tokenizer_config.json").write_text(json.dumps(settings))
    extended = extend(base, tmp_path / "t", HAN, 90)
    (extended / "chat_template.jinja").write_text("a run's own")
    adapter = save_lora(base, tmp_path / "adapter", train_embeddings=True, tokenizer=extended)
    export(str(adapter), str(tmp_path / "out"), instruct_delta=str(instruct))
    assert_equal(tmp_path / "out", expected(base, instruct, adapter, 1.0, rows=305))
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (tokenizer.chat_template, tokenizer.eos_token) == (TEMPLATE, "<|im_start|>")
    assert len(tokenizer) > 305


def test_an_extended_base_keeps_its_further_rows(tmp_path: Path) -> None:
    base, instruct = save_tiny_mixtral(tmp_path / "base", vocab_size=300), save_tiny_mixtral(tmp_path / "i", seed=1)
    export(str(base), str(tmp_path / "out"), instruct_delta=str(instruct), instruct_weight=0.5)
    found, start, tuned = (stock_weights(folder) for folder in (tmp_path / "out", base, instruct))
    for name in EMBEDDINGS:
        assert torch.equal(found[name][272:], start[name][272:])
        torch.testing.assert_close(found[name][:272], (start[name][:272] + tuned[name]) / 2, rtol=1e-6, atol=1e-6)


def test_files_and_card_are_the_instruct_model_s(tmp_path: Path) -> None:
    base, instruct = pair(tmp_path)
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    settings = json.loads((with_chat(instruct) / "config.json").read_text()) | {"eos_token_id": 7}
    (instruct / "config.json").write_text(json.dumps(settings))
    adapter = save_lora(base, tmp_path / "adapter")
    for out in ("one", "two"):
        export(str(adapter), str(tmp_path / out), instruct_delta=str(instruct), instruct_weight=0.7)
    one, two = ({file.name: file.read_bytes() for file in (tmp_path / out).iterdir()} for out in ("one", "two"))
    assert one == two
    for name in ("chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert one[name] == (instruct / name).read_bytes()
    assert json.loads(one["config.json"])["eos_token_id"] == 7
    card = one["README.md"].decode()
    assert "To every weight 0.7 times the difference between `instruct` and the base was added" in card
    assert str(tmp_path) not in card
    with pytest.raises(FileNotFoundError, match="'nowhere' is not there"):
        export(str(adapter), str(tmp_path / "out"), instruct_delta="nowhere")


def test_an_adapter_trained_on_4_bits_takes_the_original_s_difference(tmp_path: Path) -> None:
    base, instruct = pair(tmp_path)
    quantize(str(base), str(tmp_path / "small"), dtype="float32")
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "w1"], init_lora_weights=False)
    model = load_moe(tmp_path / "small", lora=lora, dtype="float32")
    assert isinstance(model, MoePeftModel)
    model.save_pretrained(tmp_path / "adapter")
    export(str(tmp_path / "adapter"), str(tmp_path / "out"), instruct_delta=str(instruct))
    assert_equal(tmp_path / "out", expected(base, instruct, tmp_path / "adapter", 1.0))


def test_a_gguf_has_the_difference_and_the_instruct_model_s_tokenizer(tmp_path: Path) -> None:
    """llama.cpp's converter, here one that lists what it was given, gets the folder of `format=hf`."""
    base, instruct = pair(tmp_path)
    converter = tmp_path / "llama" / CONVERTER
    converter.parent.mkdir()
    converter.write_text(
        "import pathlib, sys\nfolder = pathlib.Path(sys.argv[1])\n"
        "text = [folder.name, (folder / 'chat_template.jinja').read_text()]\n"
        "pathlib.Path(sys.argv[sys.argv.index('--outfile') + 1]).write_text('\\n'.join(text))\n"
    )
    out, llama_cpp = tmp_path / "model.gguf", str(converter.parent)
    export(str(base), str(out), format="gguf", instruct_delta=str(with_chat(instruct)), llama_cpp=llama_cpp)
    assert out.read_text().splitlines() == ["base-adapted", TEMPLATE]


def test_what_is_exported_is_a_base_to_train_and_to_talk_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, instruct = pair(tmp_path)
    adapter = save_lora(base, tmp_path / "adapter")
    export(str(adapter), str(tmp_path / "out"), instruct_delta=str(with_chat(instruct)))
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "w1", "w2", "w3"])
    model: Any = load_moe(tmp_path / "out", lora=lora, dtype="float32")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    batch = random_batch([20, 24])
    losses = []
    for _ in range(2):
        output = model(input_ids=batch["input_ids"], labels=batch["labels"])
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(output.loss.detach()))
    assert losses[1] < losses[0]
    tokenizer = load_tokenizer(tmp_path / "out")
    turns = [Turn("user", "你好")]
    expected_ids = tokenizer.hf.apply_chat_template([{"role": "user", "content": "你好"}], return_dict=False)
    assert load_template("tokenizer", tokenizer).encode_prompt(turns, tokenizer) == expected_ids
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO("你好\n"))
    assert main(["chat", str(tmp_path / "out"), "--device=cpu", "--max_new_tokens=4", "--temperature=0"]) == 0
    assert capsys.readouterr().out.strip()


def other_family(folder: Path) -> Path:
    return save_tiny_model(folder / "i", "olmoe", seed=1)


def in_4_bits(folder: Path) -> Path:
    save_tiny_mixtral(folder / "whole", seed=1)
    quantize(str(folder / "whole"), str(folder / "i"))
    return folder / "i"


def changed(**changes: Any) -> Callable[[Path], Path]:
    return lambda folder: save_tiny_mixtral(folder / "i", seed=1, **changes)


def without_tokenizer(folder: Path) -> Path:
    (save_tiny_mixtral(folder / "i", seed=1) / "tokenizer.json").unlink()
    return folder / "i"


def other_pieces(folder: Path) -> Path:
    file = save_tiny_mixtral(folder / "i", seed=1) / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    pieces = {index: piece for piece, index in content["model"]["vocab"].items()}
    content["model"]["vocab"] |= {pieces[10]: 11, pieces[11]: 10}
    file.write_text(json.dumps(content), encoding="utf-8")
    return folder / "i"


@pytest.mark.parametrize(
    ("instruct", "message"),
    [
        (other_family, "is of the family olmoe, the base of mixtral. Give the instruct model that was tuned from this"),
        (in_4_bits, "is in 4 bits. Give the unquantised instruct model"),
        (changed(hidden_size=64), "has hidden_size=64, the base has 32"),
        (changed(intermediate_size=40), "has intermediate_size=40, the base has 48"),
        (changed(num_hidden_layers=1), "has num_hidden_layers=1, the base has 2"),
        (changed(num_attention_heads=2, num_key_value_heads=1, head_dim=16), "has num_attention_heads=2"),
        (changed(num_local_experts=8), "has num_local_experts=8, the base has 4"),
        (changed(num_experts_per_tok=1), "has num_experts_per_tok=1, the base has 2"),
        (changed(rope_theta=5e5), "has rope_parameters="),
        (changed(vocab_size=300), "has 300 rows of embedding and head, the base has 272"),
        (changed(tie_word_embeddings=True), "one matrix for embed_tokens and lm_head (tie_word_embeddings=True), the"),
        (without_tokenizer, "has no tokenizer, which the exported model needs"),
        (other_pieces, "for the id 10, the model to export has"),
        (lambda folder: folder / "base", "is the base itself, so there is no difference to add"),
        (lambda folder: folder / "adapter", "has no config.json"),
    ],
)  # fmt: skip
def test_another_model_is_refused_in_one_line(
    instruct: Callable[[Path], Path], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_tiny_mixtral(tmp_path / "base")
    save_lora(base, tmp_path / "adapter")
    refused(tmp_path, [f"--instruct_delta={instruct(tmp_path)}"], message, capsys)


def refused(folder: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(folder.iterdir())
    capsys.readouterr()
    assert main(["export", str(folder / "adapter"), str(folder / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("mixcn: error: ")
    assert error.count("\n") == 1
    assert sorted(folder.iterdir()) == before


def test_an_untied_instruct_model_of_a_tied_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_lora(save_tiny_mixtral(tmp_path / "base", tie_word_embeddings=True), tmp_path / "adapter")
    save_tiny_mixtral(tmp_path / "i", seed=1)
    message = "the base has one matrix. Train on a copy of the base that has a head of its own"
    refused(tmp_path, [f"--instruct_delta={tmp_path / 'i'}"], message, capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--base=dequantised"], "the difference from weights that 4 bits rounded holds the rounding, too"),
        (["--format=peft"], "`format=peft` merges nothing"),
        (["--format=peft-per-expert"], "instruct_delta and instruct_weight"),
        (["--instruct_weight=0"], "`instruct_weight=0.0`: expected more than 0"),
        (["--instruct_weight=-0.5"], "expected more than 0"),
        (["--instruct_weight=2.5"], "expected at most 2"),
    ],
)
def test_arguments_that_do_not_go_together(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_lora(save_tiny_mixtral(tmp_path / "base"), tmp_path / "adapter")
    refused(tmp_path, ["--instruct_delta=instruct", *arguments], message, capsys)


def test_a_weight_without_an_instruct_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(tmp_path, ["--instruct_weight=0.5"], "`instruct_weight=0.5` needs `instruct_delta`", capsys)


@pytest.mark.parametrize(("weight", "message"), [(3, "at most 2"), (float("nan"), "a finite number")])
def test_a_weight_from_python_is_checked(weight: float, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"`instruct_weight={weight}`: expected {message}"):
        export("base", str(tmp_path / "out"), instruct_delta="i", instruct_weight=weight)
