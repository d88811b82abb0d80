"""A tokenizer of bytes and small corpora on disk."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models

from lightning_mixcn.text import Source
from lightning_mixcn.tokenizer.begin import put_bos_first


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Save a tokenizer of bytes that puts BOS before a text; the id of byte b is 3 + b."""
    specials = ["<unk>", "<s>", "</s>"]
    vocab = {token: index for index, token in enumerate([*specials, *(f"<0x{byte:02X}>" for byte in range(256))])}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    put_bos_first(tokenizer, "<s>")
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return str(folder)


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Source]:
    """Write 200 Chinese and 100 English documents, to be read 9 to 1."""
    folder: Path = tmp_path_factory.mktemp("corpora")
    draw = random.Random(0)
    made = []
    for name, alphabet, count, weight in (("zh", "中文大小人天", 200, 0.9), ("en", "abcdefg ", 100, 0.1)):
        texts = ["".join(draw.choices(alphabet, k=draw.randint(0, 60))) + f"#{number}" for number in range(count)]
        lines = (json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{name}.jsonl").write_text("".join(lines))
        made.append(Source(name, str(folder / f"{name}.jsonl"), weight=weight))
    return made


@pytest.fixture(scope="session")
def arguments(sources: list[Source], tokenizer_folder: str) -> Callable[..., dict[str, Any]]:
    """Give arguments of a small data module, some changed."""

    def make(**changes: Any) -> dict[str, Any]:
        defaults = {
            "sources": sources,
            "tokenizer": tokenizer_folder,
            "sequence_length": 32,
            "micro_batch_size": 2,
            "num_streams": 8,
            "num_workers": 0,
            "val_fraction": 0.1,
        }
        return defaults | changes

    return make
