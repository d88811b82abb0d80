"""Fixtures of all tests."""

import io
import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import sentencepiece
from hypothesis import settings

if TYPE_CHECKING:
    from lightning_mixcn.text import TextTokenizer

# Without a GPU, Triton's kernels run in its interpreter. It reads this once, when something first imports it, and
# bitsandbytes does; nothing else here uses Triton on a CPU.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A bound on the time of one example fails on a busy machine.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

SHARED = Path(__file__).parents[1].parent / "shared" / "data"
WORDS = """the of and to in a is that for it 的 一 是 不 了 在 人 有 我 他 这 中 大
    return def self == 12 345 ,。 !"""

Train = Callable[..., Path]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests of a GPU where there is none, and those of several where there is one."""
    needed = {"gpu": 1, "multigpu": 2}
    marked = [(item, count) for item in items for name, count in needed.items() if item.get_closest_marker(name)]
    if marked:
        import torch

        there = torch.cuda.device_count()
        for item, count in marked:
            if there < count:
                reason = (
                    "there is no CUDA device" if count == 1 else f"{count} CUDA devices are needed, {there} are here"
                )
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder of unpacked texts, so that no test reads or writes the cache of whoever runs it."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIXCN_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random Mixtral with a tokenizer of bytes, as stock transformers writes it. Read only."""
    from lightning_mixcn.testing import save_tiny_mixtral

    return save_tiny_mixtral(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="session")
def train_sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Make a folder with `tokenizer.model` (by default as Mixtral's is made, but small) and its configuration."""

    def train(**options: Any) -> Path:
        folder: Path = tmp_path_factory.mktemp("tokenizer")
        draw = random.Random(1)
        lines = [" ".join(draw.choices(WORDS.split(), k=8)) for _ in range(400)] + ["    x  y   z"] * 20
        settings: dict[str, Any] = {
            "model_type": "bpe",
            "vocab_size": 380,
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "minloglevel": 2,
        }
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=model, **(settings | options)
        )
        (folder / "tokenizer.model").write_bytes(model.getvalue())
        (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
        return folder

    return train


@pytest.fixture(scope="session")
def small_folder(train_sentencepiece: Train) -> Path:
    return train_sentencepiece()


@pytest.fixture(scope="session")
def tokenizer(small_folder: Path) -> "TextTokenizer":
    from lightning_mixcn.text import load_tokenizer

    return load_tokenizer(small_folder)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not SHARED.is_dir():
        pytest.skip("the real tokenizers and corpora lie outside the project and are not here")
    return SHARED
