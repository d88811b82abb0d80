"""pip is real here, its index a folder; nothing is downloaded."""

import hashlib
import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from lightning_mixcn.demo.fetch import (
    PACKAGES,
    Package,
    fetch,
    missing,
)

SETUP = "import pathlib; pathlib.Path({marker!r}).write_text('ran'); from setuptools import setup; setup()"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def package_of(path: Path, name: str) -> Package:
    content = path.read_bytes()
    return Package(name, "1.0", path.name, hashlib.sha256(content).hexdigest(), len(content), "a test")


def source_archive(index: Path, marker: Path, backend: str = "") -> Package:
    path = index / "dummy-source-1.0.tar.gz"
    files = {
        "PKG-INFO": "Metadata-Version: 2.1\nName: dummy-source\nVersion: 1.0\n\nName: of nothing\n",
        "setup.py": SETUP.format(marker=str(marker)),
    }
    if backend:
        files["pyproject.toml"] = f'[build-system]\nrequires = []\nbuild-backend = "{backend}"\n'
    with tarfile.open(path, "w:gz") as members:
        for name, text in files.items():
            member = tarfile.TarInfo(f"dummy-source-1.0/{name}")
            member.size = len(text.encode())
            members.addfile(member, io.BytesIO(text.encode()))
    return package_of(path, "dummy-source")


def wheel(index: Path) -> Package:
    path = index / "dummy_wheel-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as members:
        members.writestr(
            "dummy_wheel-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: dummy-wheel\nVersion: 1.0\n"
        )
        members.writestr(
            "dummy_wheel-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        members.writestr("dummy_wheel-1.0.dist-info/RECORD", "")
    return package_of(path, "dummy-wheel")


@pytest.mark.parametrize("backend", ["", "setuptools.build_meta", "hatchling.build"])
def test_files_come_checked_and_a_source_archive_is_not_run(
    backend: str, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    marker, cache = tmp_path / "marker", Path("cache")
    packages = [source_archive(index, marker, backend), wheel(index)]
    assert missing(cache, packages) == packages
    files = fetch(cache, packages)
    assert not marker.exists()
    assert missing(cache, packages) == []
    for package in packages:
        assert files[package.name].read_bytes() == (index / package.filename).read_bytes()
    assert {path.name for path in cache.iterdir()} == {package.filename for package in packages}


def test_what_is_cached_is_not_fetched_again_and_damage_is_seen(index: Path, tmp_path: Path) -> None:
    package = wheel(index)
    cached = fetch(tmp_path, [package])[package.name]
    (index / package.filename).rename(index / "gone")
    assert fetch(tmp_path, [package]) == {package.name: cached}
    cached.write_bytes(b"damaged")
    assert missing(tmp_path, [package]) == [package]


def test_no_index_is_one_clear_line(index: Path, tmp_path: Path) -> None:
    package = wheel(index)
    (index / package.filename).unlink()
    with pytest.raises(ConnectionError, match=r"dummy-wheel==1\.0.*Connect to a package index, or put") as caught:
        fetch(tmp_path / "cache", [package])
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_other_bytes_are_refused(index: Path, tmp_path: Path) -> None:
    package = wheel(index)
    with zipfile.ZipFile(index / package.filename, "a") as members:
        members.writestr("more", "")
    with pytest.raises(ValueError, match=f"does not have sha256 {package.sha256}"):
        fetch(tmp_path / "cache", [package])


def test_the_packages_of_the_demo_are_pinned() -> None:
    for package in PACKAGES:
        assert len(package.sha256) == 64
        assert package.version in package.filename
