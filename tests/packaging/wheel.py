"""Build the project as a release is built, and install it outside the checkout."""

import shutil
import subprocess
import sys
import venv
from pathlib import Path
from site import getsitepackages

ROOT = Path(__file__).parents[2]


def copy_of_tree(target: Path) -> None:
    """Copy what belongs to the project, links as links."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for source in (ROOT / name for name in files.split("\0") if name):
        if source.exists():
            copy = target / source.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy, follow_symlinks=False)


def build(hook: str, tree: Path, out: Path) -> Path:
    """Call a hook of the build backend, without isolation and so without a package index: dev has setuptools."""
    program = "import sys, setuptools.build_meta as backend; getattr(backend, sys.argv[1])(sys.argv[2])"
    out.mkdir()
    subprocess.run([sys.executable, "-c", program, hook, str(out)], cwd=tree, check=True, capture_output=True)
    (built,) = out.iterdir()
    return built


def install_wheel(folder: Path) -> Path:
    """Install the project's wheel in an environment that has this one's other packages; return its ``mixcn``."""
    copy_of_tree(folder / "tree")
    wheel = build("build_wheel", folder / "tree", folder / "wheel")
    venv.create(folder / "venv")
    python = folder / "venv/bin/python"
    (own,) = (folder / "venv/lib").glob("python*/site-packages")
    # A folder that a .pth file adds comes after the environment's own, and its .pth files are not read.
    (own / "others.pth").write_text("\n".join(getsitepackages()) + "\n", encoding="utf-8")
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--ignore-installed"]
    install += ["--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    return folder / "venv/bin/mixcn"
