"""The files that go with a checkpoint's weights, copied as they are: transformers would change some of them."""

import json
from pathlib import Path

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


def tokenizer_files(folder: Path) -> list[Path]:
    """List the tokenizer's files that a folder has, its chat template among them."""
    return [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]


def generation_files(*folders: Path) -> list[Path]:
    """Find the generation config of the first folder that has one: none or one file."""
    return [folder / GENERATION_FILE for folder in folders if (folder / GENERATION_FILE).is_file()][:1]


def generation_end_ids(*folders: Path) -> frozenset[int]:
    """Return the tokens that end an answer by the generation config of the first folder that has one."""
    for file in generation_files(*folders):
        ends = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        return frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])
    return frozenset()
