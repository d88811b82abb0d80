"""The sizes and names of style: what rots first is the tail."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAX_FILE_LINES, MAX_FUNCTION_LINES = 600, 60
PYTHON = sorted(
    path
    for folder in ("lightning_mixcn", "callbacks", "configs", "tests", "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
)


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def code_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function below its signature, its docstring not counted: shapes and errors may take their room."""
    first = node.body[0]
    has_docstring = (
        isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    )
    start = (first.end_lineno or 0) + 1 if has_docstring else first.lineno
    return (node.end_lineno or 0) - start + 1


def tracked_text() -> list[Path]:
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    paths = [ROOT / name for name in names.split("\0") if name]
    return [path for path in paths if path.is_file() and not path.is_symlink()]


def test_files_are_short() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in PYTHON}
    assert not {name: length for name, length in lengths.items() if length > MAX_FILE_LINES}


def test_functions_are_short() -> None:
    long = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {code_lines(node)} lines"
        for path in PYTHON
        for node in functions(path)
        if code_lines(node) > MAX_FUNCTION_LINES
    ]
    assert not long


def test_modules_are_named_for_what_is_in_them() -> None:
    banned = re.compile(r"^(utils?|helpers?|common|misc)\.py$|_v\d+\.py$")
    assert not [str(path.relative_to(ROOT)) for path in PYTHON if banned.search(path.name)]


@pytest.mark.parametrize("folder", ["home", "root", "Users", "work", "tmp"])
def test_no_path_of_a_machine(folder: str) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: which files belong to the project is unknown")
    found = [
        f"{path.relative_to(ROOT)}: {match.group()}"
        for path in tracked_text()
        for match in re.finditer(f"/{folder}/", path.read_text(encoding="utf-8", errors="ignore"))
    ]
    assert not found


def test_lightning_is_imported_by_its_new_name() -> None:
    old = re.compile(r"^\s*(from|import) pytorch_lightning", re.MULTILINE)
    assert not [str(path.relative_to(ROOT)) for path in PYTHON if old.search(path.read_text(encoding="utf-8"))]
