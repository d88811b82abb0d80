"""A base's small files with other values: one line that names file and key, before memory is taken."""

import json
import random
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_mixcn.errors import UserError
from lightning_mixcn.model import find_model, load_found, load_mixtral
from lightning_mixcn.model.checkpoints.folder import Checkpoint
from lightning_mixcn.model.checkpoints.identity import write_identity
from lightning_mixcn.text import load_tokenizer
from lightning_mixcn.tokenizer.files import generation_end_ids
from tests.model.adapters_on_disk import save_adapter

ODD: dict[str, list[Any]] = {
    "hidden_size": [-1, 0, 10**9, 10**21, "x", None, 1.5, True],
    "num_hidden_layers": [-1, 0, 1, 3, 10**6, None],
    "num_local_experts": [0, -1, 10**6, "8"],
    "num_experts_per_tok": [0, 99, -1],
    "vocab_size": [0, -1, 10**12],
    "num_attention_heads": [0, 3, -8],
    "num_key_value_heads": [0, 3],
    "head_dim": [0, -1, "x", 7],
    "intermediate_size": [0, -1],
    "rms_norm_eps": ["x", -1, 1e999],
    "rope_theta": [0, "x", -1],
    "rope_scaling": [7, {"type": "nope"}, {"rope_type": "dynamic", "factor": 0}, {"rope_type": "yarn"}],
    "hidden_act": ["nope", None, "__import__"],
    "max_position_embeddings": [0, -1, None],
    "sliding_window": [0, -1, "x"],
    "model_type": ["llama", None, 7],
    "architectures": [7],
    "tie_word_embeddings": ["x", None],
    "quantization_config": [7, {}, {"quant_method": "evil"}, {"quant_method": 7}, {"bits": 4}, "x"],
    "attention_dropout": [5, "x"],
    "torch_dtype": ["evil", 7],
    "eos_token_id": ["x", {}, 10**30],
}


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture
def copied(tiny: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny, tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in ODD.items() for value in values])
def test_an_odd_value_is_one_line(key: str, value: Any, copied: Path) -> None:
    change(copied / "config.json", **{key: value})
    with pytest.raises(UserError) as raised:
        load_mixtral(copied, quantization="none", dtype="float32")
    assert "\n" not in str(raised.value)
    assert "config.json" in str(raised.value) or key.partition("_")[0] in ("model", "quantization")


def test_config_json_names_the_key(copied: Path) -> None:
    change(copied / "config.json", num_hidden_layers=10**6)
    with pytest.raises(
        UserError, match=r"config\.json': num_hidden_layers is 1000000, expected a whole number of 1 to"
    ):
        Checkpoint(copied)
    change(copied / "config.json", num_hidden_layers=1000)
    with pytest.raises(UserError, match=r"num_hidden_layers=1000, but the weights are of 2 layers"):
        load_mixtral(copied)


@pytest.mark.parametrize(
    ("key", "value", "fault"),
    [
        ("bos_token", 7, "bos_token is 7, expected text"),
        ("bos_token", ["<s>"], "bos_token is a list of 1 entries, expected text"),
        ("eos_token", {}, "eos_token is a mapping of 0 entries, expected text"),
        ("pad_token", {"content": 7}, "pad_token is a mapping of 1 entries, expected text"),
        ("chat_template", {"a": 1}, "chat_template is a mapping of 1 entries, expected text"),
        ("model_max_length", "x", "model_max_length is 'x', expected a finite number of 1 to 1e"),
        ("tokenizer_class", 7, "tokenizer_class is 7, expected text"),
        ("add_bos_token", "x", "add_bos_token is 'x', expected true or false"),
    ],
)
def test_tokenizer_config_names_the_key(key: str, value: Any, fault: str, copied: Path) -> None:
    change(copied / "tokenizer_config.json", **{key: value})
    with pytest.raises(UserError, match=rf"tokenizer_config\.json': {fault}"):
        load_tokenizer(copied)


@pytest.mark.parametrize("value", ["x", {}, -1, [1, "x"], 1.5, 10**30, True])
def test_the_end_of_an_answer_is_an_id(value: Any, copied: Path) -> None:
    (copied / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(UserError, match=r"generation_config\.json': eos_token_id is .*, expected a whole number"):
        generation_end_ids(copied)


# ---- random damage ----

FILES = ("config.json", "tokenizer_config.json", "tokenizer.json", "generation_config.json", "model.safetensors")


def flip(data: bytearray, draw: random.Random) -> None:
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)


def cut(data: bytearray, draw: random.Random) -> None:
    start = draw.randrange(len(data))
    del data[start : start + draw.randrange(1, 50)]


def truncate(data: bytearray, draw: random.Random) -> None:
    del data[draw.randrange(len(data)) :]


def repeat(data: bytearray, draw: random.Random) -> None:
    start = draw.randrange(len(data))
    data[start:start] = data[start : start + draw.randrange(1, 50)]


def fill_in(data: bytearray, draw: random.Random) -> None:
    start = draw.randrange(len(data))
    data[start : start + 8] = draw.randbytes(8)


DAMAGES: tuple[Callable[[bytearray, random.Random], None], ...] = (flip, flip, cut, truncate, repeat, fill_in)
WORDS: tuple[Any, ...] = (None, True, -1, 0, 1.5, 10**21, "", "x", [], {}, [[]], {"a": {}}, 1e300, "\x00", -(10**21))


def set_another_value(content: Any, draw: random.Random) -> Any:
    """Set a value somewhere in JSON's data to another of any type, leave a key out, or add one."""
    if isinstance(content, dict | list) and content and draw.random() < 0.8:
        key: Any = draw.choice(list(content)) if isinstance(content, dict) else draw.randrange(len(content))
        if isinstance(content, dict) and draw.random() < 0.1:
            del content[key]
        else:
            content[key] = set_another_value(content[key], draw)
        return content
    return draw.choice(WORDS)


def use_base(folder: Path) -> None:
    """Read all that a run reads of a base, and encode with its tokenizer."""
    load_mixtral(folder, quantization="none", dtype="float32")
    load_tokenizer(folder).encode_batch(["Once upon a time, 很久以前"])
    generation_end_ids(folder)


def use_adapter(folder: Path) -> None:
    """Read all that chat and export read of an adapter, beside its tokenizer."""
    found = find_model(str(folder))
    load_found(found, quantization="none", dtype="float32")
    (adapter,) = found.adapters
    for name in adapter.names:
        adapter.delta(name)


def what_it_says(use: Callable[[Path], None], folder: Path) -> str:
    """Return the one line, or many where it is no error of the user's."""
    try:
        use(folder)
    except UserError as error:
        return str(error)
    except BaseException:  # a panic of the tokenizers library is no Exception
        return traceback.format_exc()
    return ""


def damage_and_use(file: Path, count: int, use: Callable[[Path], None]) -> None:
    draw = random.Random(f"{file.name} {count}")
    whole = file.read_bytes()
    for number in range(count):
        data = bytearray(whole)
        if number % 2 and file.suffix == ".json":
            data = bytearray(json.dumps(set_another_value(json.loads(whole), draw)).encode())
        else:
            draw.choice(DAMAGES)(data, draw)
        file.write_bytes(data)
        said = what_it_says(use, file.parent)
        assert "\n" not in said, (number, said, bytes(data[:3000]))


def counted(names: tuple[str, ...]) -> list[Any]:
    return [(name, 12) for name in names] + [pytest.param(name, 300, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize(("name", "count"), counted(FILES))
def test_damaged_files_of_a_base_are_read_or_refused(name: str, count: int, copied: Path) -> None:
    (copied / "generation_config.json").write_text('{"eos_token_id": 2, "bos_token_id": 1}')
    damage_and_use(copied / name, count, use_base)


def test_a_damaged_index_is_read_or_refused(copied: Path) -> None:
    weights = copied / "model.safetensors"
    names = Checkpoint(copied).names()
    weights.rename(copied / "a.safetensors")
    index = copied / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "a.safetensors")}))
    use_base(copied)
    damage_and_use(index, 40, use_base)


ADAPTER_FILES = ("adapter_config.json", "base_identity.json", "adapter_model.safetensors")


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, of settings that it does not know
@pytest.mark.parametrize(("name", "count"), counted(ADAPTER_FILES))
def test_damaged_files_of_an_adapter_are_read_or_refused(name: str, count: int, tiny: Path, tmp_path: Path) -> None:
    save_adapter(tiny, tmp_path)
    write_identity(tmp_path, {"path": str(tiny), "sha256": Checkpoint(tiny).sha256})
    use_adapter(tmp_path)
    damage_and_use(tmp_path / name, count, use_adapter)
