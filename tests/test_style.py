"""The sizes and names of style: what rots first is the tail."""

import ast
import itertools
import re
import subprocess
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from lightning_mixcn.commands.table import NESTED

ROOT = Path(__file__).parents[1]
MAX_FILE_LINES, MAX_FUNCTION_LINES, USUAL_FUNCTION_LINES, MAX_FILES_IN_FOLDER = 600, 60, 25, 15
SMALL_FILE_LINES = 60
PYTHON = sorted(
    path
    for folder in ("lightning_mixcn", "callbacks", "configs", "tests", "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
)
PRODUCT = [path for path in PYTHON if path.relative_to(ROOT).parts[0] in ("lightning_mixcn", "callbacks")]
# A short file that one other file imports, and why it is a file of its own.
SMALL_FILES_OF_ONE_IMPORTER = {
    "lightning_mixcn.modules.pretrain": "checkpoints store the path of the class",
    "lightning_mixcn.metrics.answers": "one metric a file; the package exports it",
}


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


def test_nine_of_ten_functions_are_short() -> None:
    lengths = sorted((node.end_lineno or 0) - node.lineno + 1 for path in PRODUCT for node in functions(path))
    assert lengths[len(lengths) * 9 // 10] <= USUAL_FUNCTION_LINES


def test_no_parser_completes_options_by_their_beginning() -> None:
    """A typo would be taken for the option that begins like it, and train."""
    made = [
        (path, node)
        for path in (*PRODUCT, *(ROOT / "benchmarks").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("ArgumentParser")
    ]
    assert len(made) > 10
    for path, node in made:
        assert "allow_abbrev=False" in ast.unparse(node), path


def test_folders_are_small() -> None:
    files = Counter(str(path.parent.relative_to(ROOT)) for path in PYTHON)
    assert not {folder: count for folder, count in files.items() if count > MAX_FILES_IN_FOLDER}


def test_public_names_are_unique() -> None:
    """One name, one thing: a reader who searches for it finds one definition."""
    places = defaultdict(list)
    for path in PRODUCT:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(str(path.relative_to(ROOT)))
    # A subcommand's function has its name, such as `report` of `mixcn vocab` and of `mixcn data`.
    subcommands = {name for name, count in Counter(itertools.chain(*NESTED.values())).items() if count > 1}
    assert not {name: files for name, files in places.items() if len(files) > 1 and name not in subcommands}


def test_short_files_have_several_importers() -> None:
    importers = defaultdict(set)
    for path in PRODUCT:
        for module in imported_modules(path):
            importers[module].add(path)
    found = dict[str, int]()
    for path in PRODUCT:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if path.name in ("__init__.py", "__main__.py") or lines >= SMALL_FILE_LINES:
            continue
        if len(importers[module_name(path)]) == 1:
            found[module_name(path)] = lines
    assert found.keys() == SMALL_FILES_OF_ONE_IMPORTER.keys(), found


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    full = parts if parts[0] == "lightning_mixcn" else ("lightning_mixcn", *parts)
    return ".".join(full).removesuffix(".__init__")


def imported_modules(path: Path) -> set[str]:
    """Return the modules that a file imports from; ``from .x import y`` gives both ``x`` and ``x.y``."""
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    found = set[str]()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*parents, *([node.module] if node.module else [])])
            found.update([origin, *(f"{origin}.{alias.name}" for alias in node.names)])
    return found


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
