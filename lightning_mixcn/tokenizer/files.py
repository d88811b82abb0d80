"""The files that go with a checkpoint's weights, copied as they are: transformers would change some of them."""

from pathlib import Path
from typing import Any

from lightning_mixcn.files.json_object import read_object
from lightning_mixcn.files.schema import NULL, each, either, record, whole

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
GENERATION_FILE = "generation_config.json"
_ID = whole(0, 2**24)
_GENERATION = record({}, {"eos_token_id": either(NULL, each(_ID), _ID)})


def tokenizer_files(folder: Path) -> list[Path]:
    """List the tokenizer's files that a folder has, its chat template among them."""
    return [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]


def generation_files(*folders: Path) -> list[Path]:
    """Find the generation config of the first folder that has one: none or one file."""
    return [folder / GENERATION_FILE for folder in folders if (folder / GENERATION_FILE).is_file()][:1]


def generation_end_ids(*folders: Path) -> frozenset[int]:
    """Return the tokens that end an answer by the generation config of the first folder that has one."""
    for file in generation_files(*folders):
        ends = read_generation(file).get("eos_token_id")
        return frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])
    return frozenset()


def read_generation(file: Path) -> dict[str, Any]:
    """Read a generation config. Raises: ValueError if it is broken, or its ``eos_token_id`` is no id."""
    return read_object(file, _GENERATION)
