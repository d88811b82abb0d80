"""Results of steps, kept under names that stay, and made again when what they were made from changed."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

# Inside a result: what it was made from.
_RECORD = "made_from.json"


def reuse_or_make(result: Path, made_from: Mapping[str, str], make: Callable[[Path], object]) -> bool:
    """Have a folder that was made from exactly these inputs.

    The folder appears under its name only when it is complete; an older one is there until then.

    Args:
        result: Folder.
        made_from: Digests of the inputs, and the parameters, by name.
        make: Fills the folder it is given, which does not exist yet.

    Returns:
        Whether it was there already.
    """
    if (result / _RECORD).is_file() and json.loads((result / _RECORD).read_text(encoding="utf-8")) == dict(made_from):
        return True
    scratch = result.with_name(f".making-{result.name}")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.parent.mkdir(parents=True, exist_ok=True)
    make(scratch)
    (scratch / _RECORD).write_text(json.dumps(dict(made_from), indent=2) + "\n", encoding="utf-8")
    if result.exists():
        shutil.rmtree(result)
    os.replace(scratch, result)
    return False


def digest_of_sources(package: Path) -> str:
    """Sha256 over a package's Python files: a result of other code is another result."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
