"""No family's name is in the model's code but in its record."""

import re
from pathlib import Path

import lightning_mixcn.model
from lightning_mixcn.model.architectures import MODEL_TYPES, architecture_named

# The first family's functions keep their names; measured sizes are those of a published model.
ALLOWED = re.compile("load_mixtral|build_mixtral|mixtral-8x7b|chinese-mixtral")


def test_families_are_named_in_their_records_only() -> None:
    root = Path(lightning_mixcn.model.__file__).parent
    files = [file for file in root.rglob("*.py") if file.parent.name != "architectures"]
    assert len(files) > 50
    names = {name.lower() for of in MODEL_TYPES for name in (of, architecture_named(of).title)}
    for file in files:
        text = ALLOWED.sub("", file.read_text(encoding="utf-8").lower())
        assert not [name for name in names if name in text], file
