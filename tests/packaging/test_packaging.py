"""What is installed is what is in the tree."""

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

from tests.packaging.wheel import build, copy_of_tree, install_wheel

ROOT = Path(__file__).parents[2]
LINKS = ("callbacks", "configs")


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def packages_in_tree() -> set[str]:
    inside = {path.parent for path in (ROOT / "lightning_mixcn").rglob("__init__.py")}
    names = {".".join(path.relative_to(ROOT).parts) for path in inside}
    # rglob does not follow links in every version of Python.
    linked = {path.parent.relative_to(ROOT) for name in LINKS for path in (ROOT / name).rglob("__init__.py")}
    return names | {".".join(["lightning_mixcn", *path.parts]) for path in linked}


def test_packages_are_those_of_the_tree() -> None:
    assert set(pyproject()["tool"]["setuptools"]["packages"]) == packages_in_tree()


def test_every_python_folder_is_a_package() -> None:
    folders = {path.parent for path in (ROOT / "lightning_mixcn").rglob("*.py")}
    assert not [str(folder) for folder in folders if not (folder / "__init__.py").is_file()]


@pytest.mark.parametrize("name", LINKS)
def test_top_level_folders_are_linked_into_the_package(name: str) -> None:
    link = ROOT / "lightning_mixcn" / name
    assert link.is_symlink()
    assert str(link.readlink()) == f"../{name}"
    assert pyproject()["tool"]["setuptools"]["package-dir"][f"lightning_mixcn.{name}"] == name


def test_tests_have_no_init() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_constraints_pin_names_and_versions_only() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert pins
    assert not [line for line in pins if not re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9A-Za-z.]*", line)]


def test_constraints_pin_every_dependency() -> None:
    project = pyproject()["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["demo"]]
    wanted += project["optional-dependencies"]["dev"]
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8").lower()
    pinned = {line.partition("==")[0] for line in text.splitlines()}
    assert not [name for name in wanted if re.split(r"[\[<>=]", name)[0].lower() not in pinned]


def test_version_is_the_installed_one() -> None:
    import lightning_mixcn

    try:
        installed = version("lightning-mixcn")
    except PackageNotFoundError:
        pytest.skip("the package is not installed; `make venv` does")
    assert lightning_mixcn.__version__ == installed


PAGES = ("sharing/report", "studies/hygiene/report", "studies/preference/sheet")


@pytest.mark.slow
def test_wheel_from_source_archive_has_everything_once(tmp_path: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: which files belong to the project is unknown")
    copy_of_tree(tmp_path / "tree")
    archive = build("build_sdist", tmp_path / "tree", tmp_path / "sdist")
    with tarfile.open(archive) as members:
        members.extractall(tmp_path, filter="data")
    wheel = build("build_wheel", tmp_path / archive.name.removesuffix(".tar.gz"), tmp_path / "wheel")
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", archive, wheel], check=True)
    with zipfile.ZipFile(wheel) as files:
        came = files.namelist()
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "lightning_mixcn").rglob("*.py")}
    expected |= {f"lightning_mixcn/{path.relative_to(ROOT)}" for name in LINKS for path in (ROOT / name).rglob("*.py")}
    expected |= {f"lightning_mixcn/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.yaml")}
    expected |= {"lightning_mixcn/py.typed", *(f"lightning_mixcn/{page}.html.jinja" for page in PAGES)}
    expected |= {"lightning_mixcn/model/experts/fastest.json", "lightning_mixcn/studies/task_groups.json"}
    assert len(came) == len(set(came))
    assert {name for name in came if ".dist-info/" not in name} == expected


@pytest.mark.slow
def test_an_installed_wheel_finds_its_configs_by_name(tmp_path: Path) -> None:
    """Outside the checkout, in an environment that has this one's other packages."""
    mixcn = install_wheel(tmp_path)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    shown = {
        "fit --config demo --config trainer/fsdp2.yaml --print_config": "FSDP2Strategy",
        "configs trainer/fsdp2": "FSDP2Strategy",
        "upcycle --help": "--num_experts",
        "fit --help": "--model.lora.r",
        "help ExpertLoadMonitor": "every_n_steps",
    }
    for command, text in shown.items():
        done = subprocess.run(
            [mixcn, *command.split()],
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert text in done.stdout
