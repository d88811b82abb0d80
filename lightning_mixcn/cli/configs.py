"""``mixcn configs``: the configurations that ride in the package, to be listed, read and copied."""

import re
from importlib.resources import files
from pathlib import Path
from textwrap import shorten

from lightning_mixcn.arguments import Name
from lightning_mixcn.errors import ExistingFileError, MissingFileError, did_you_mean
from lightning_mixcn.files.atomic import write_text

_OVERLAY = "mixcn fit --config YOURS --config {}"
_USES = {
    "": "mixcn fit --config {} --plan",
    "model": _OVERLAY,
    "trainer": _OVERLAY,
    "studies": "mixcn compare {} --out DIR",
}
_WIDTH = 120


def configs(name: Name | None = None, *, out: Name | None = None) -> None:
    """List the configurations of this package, print one, or write it to a file of your own.

    Args:
        name: Name of one, such as ``pretrain_mixtral_8x7b`` or ``trainer/gpu``; without it all are listed.
        out: File to write it to, which must not exist; null prints it.

    Raises:
        ValueError: there is no such configuration, or the file exists.
    """
    carried = carried_configs()
    if name is None:
        print("\n".join(_listed(carried)))
        return
    key = name.removeprefix("configs/").removesuffix(".yaml")
    if key not in carried:
        raise MissingFileError(
            f"`mixcn configs {name}`: there is no such configuration{did_you_mean(key, carried)}. Give one of "
            f"{', '.join(carried)}"
        )
    text = carried[key].read_text(encoding="utf-8")
    if out is None:
        print(text, end="")
        return
    path = Path(out).expanduser()
    if path.exists():
        raise ExistingFileError(f"`out={out}` exists. Give another file, or remove it")
    # A recipe names its configurations from where it is.
    write_text(path, re.sub(r"\.\./(?=[\w/]+\.yaml)", f"{carried[key].parents[1]}/", text))
    use = _USES[key.rpartition("/")[0]].format(path)
    print(f"{path} is written. Set the paths in it, then: {use}")


def carried_configs() -> dict[str, Path]:
    """Return the configurations of the package by name, such as ``trainer/gpu``."""
    folder = Path(str(files("lightning_mixcn.configs")))
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}


def _listed(carried: dict[str, Path]) -> list[str]:
    width, lines = max(map(len, carried)), list[str]()
    for folder in _USES:
        copy = " with the file of a copy" if folder == "studies" else ""
        lines += [f"{folder or 'tasks'}: {_USES[folder].format('NAME')}{copy}"]
        for name in carried:
            if name.rpartition("/")[0] == folder:
                about = shorten(_about(carried[name]), _WIDTH - width - 4, placeholder=" …")
                lines.append(f"  {name:<{width}}  {about}")
        lines.append("")
    return [*lines, "`mixcn configs NAME` prints one; `--out FILE` writes it to a file to edit."]


def _about(path: Path) -> str:
    """Return the first sentence of a configuration's own comment."""
    comment = re.match(r"(?:# [^\n]*\n)+", path.read_text(encoding="utf-8"))
    text = "" if comment is None else " ".join(line.lstrip("# ") for line in comment[0].splitlines())
    return re.split(r"(?<!al)[.?](?:\s|$)|:$|: --config", text, maxsplit=1)[0]
