"""The files that go with a checkpoint's weights, copied as they are: transformers would write some of them anew."""

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
    """Those of the tokenizer, its chat template among them, that a folder has."""
    return [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
