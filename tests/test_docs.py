"""README and docs: links lead somewhere, snippets parse by the real parsers, files that are named are there."""

import ast
import itertools
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_mixcn.cli import main
from lightning_mixcn.cli.trainer import MixcnCLI
from lightning_mixcn.commands.functions import parse_function
from lightning_mixcn.commands.table import COMMANDS, FUNCTIONS
from tests.callbacks.test_defaults import scalars

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [*(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")), *DOCS]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def snippets(path: Path, language: str) -> list[str]:
    return [body for _, found, body in FENCE.findall(path.read_text(encoding="utf-8")) if found == language]


def prose(path: Path) -> str:
    """Return the page without its fenced blocks."""
    return FENCE.sub("", path.read_text(encoding="utf-8"))


def anchors(path: Path) -> set[str]:
    """Return the ids that mkdocs gives a page's headings, and those of its API entries."""
    headings = re.findall(r"^#+ +(.*)$", prose(path), re.MULTILINE)
    slugs = {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}
    return slugs | set(re.findall(r"^::: (\S+)$", prose(path), re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_link_and_image_leads_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?:|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        # mkdocs knows what is under docs/ only, and shows pictures through the link docs/figures.
        outside = page in DOCS and not file.absolute().is_relative_to(ROOT / "docs")
        if not file.exists() or outside or (anchor and anchor not in anchors(file)):
            broken.append(target)
    broken += [link for link in re.findall(r"\]\[(lightning_mixcn[\w.]*)\]", prose(page)) if link not in API]
    assert not broken


API = anchors(ROOT / "docs/api.md")


def test_every_page_is_in_the_navigation_once() -> None:
    def pages(entry: Any) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        else:
            for child in entry.values() if isinstance(entry, dict) else entry:
                yield from pages(child)

    listed = list(pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    assert sorted(listed) == sorted(str(path.relative_to(ROOT / "docs")) for path in DOCS)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_that_are_named_are_there(page: Path) -> None:
    folders = "lightning_mixcn|callbacks|configs|benchmarks|tests|docs"
    named = re.findall(rf"`((?:{folders})/[\w./]+\.\w+)`", prose(page))
    assert not [path for path in named if not (ROOT / path).exists()]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_python_compiles(page: Path) -> None:
    for snippet in snippets(page, "python"):
        ast.parse(snippet)


def test_the_house_is_the_tree() -> None:
    """The map names every file of every folder, and no other."""
    house = (ROOT / "docs/architecture/house.md").read_text(encoding="utf-8")
    drawn, parent = dict[str, set[str]](), ""
    for indent, folder, listed in re.findall(r"^( {2,4})(\w+)/ +(.+)$", house, re.MULTILINE):
        parent = parent if len(indent) == 4 else folder
        names = set(re.findall(r"\w+", listed.partition(" — ")[0]))
        drawn[folder if parent == folder else f"{parent}/{folder}"] = names
    there: dict[str, set[str]] = {}
    for path in (ROOT / "lightning_mixcn").rglob("*.py"):
        parts = path.relative_to(ROOT / "lightning_mixcn").parts
        if len(parts) > 1 and parts[0] not in ("callbacks", "configs") and not path.stem.startswith("__"):
            there.setdefault("/".join(parts[:-1]), set()).add(path.stem)
    assert {folder: drawn.get(folder) for folder in there} == there


def test_every_public_name_is_in_the_api_reference() -> None:
    import lightning_mixcn
    import lightning_mixcn.callbacks

    public = {f"lightning_mixcn.{public}" for public in lightning_mixcn.__all__ if not public.startswith("_")}
    assert public | {f"lightning_mixcn.callbacks.{public}" for public in lightning_mixcn.callbacks.__all__} <= API


class ParsedError(Exception):
    """Raised where a run would begin to read files."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a folder like a reader's: the configurations of the snippets are there; runs stop once they are parsed."""

    def stop(cli: MixcnCLI) -> None:
        raise ParsedError

    monkeypatch.setattr(MixcnCLI, "before_instantiate_classes", stop)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "RUN.yaml").symlink_to(ROOT / "configs/pretrain_mixtral_8x7b.yaml")
    (tmp_path / "zh.yaml").write_text(snippets(ROOT / "README.md", "yaml")[0], encoding="utf-8")
    (tmp_path / "my_module.py").write_text(snippets(ROOT / "README.md", "python")[0], encoding="utf-8")
    return tmp_path


YAML = [(page, snippet) for page in PAGES for snippet in snippets(page, "yaml")]


@pytest.mark.parametrize(("page", "snippet"), YAML, ids=[f"{name(page)}-{n}" for n, (page, _) in enumerate(YAML)])
def test_a_run_accepts_a_yaml(page: Path, snippet: str, folder: Path) -> None:
    content = yaml.safe_load(snippet)
    if "sources" in content:  # arguments of a data module
        content = {"data": {"init_args": content}}
    assert content.keys() <= {"model", "data", "trainer"}
    module = content.get("model", {}).get("class_path", "PretrainModule")
    base = {"InstructModule": "instruct", "PreferenceModule": "preference"}.get(module, "pretrain")
    (folder / "snippet.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    # What a snippet leaves out comes from a shipped configuration.
    whole = [] if content.keys() == {"model", "data", "trainer"} else ["--config", f"configs/{base}_mixtral_8x7b.yaml"]
    with pytest.raises(ParsedError):
        main(["fit", *whole, "--config", "snippet.yaml"])


def commands(page: Path) -> Iterator[list[str]]:
    """Every command line of a page, in fenced blocks and in indented ones."""
    indented = re.findall(r"^    (\S.*)$", prose(page), re.MULTILINE)
    fenced = itertools.chain.from_iterable(
        snippet.replace("\\\n", " ").splitlines() for kind in ("bash", "text") for snippet in snippets(page, kind)
    )
    for line in (*indented, *fenced):
        if re.match(r"(\$ )?(mixcn|srun|torchrun|make) ", line):
            yield shlex.split(line.removeprefix("$ "), comments=True)


COMMAND_LINES = sorted({(page, tuple(words)) for page in PAGES for words in commands(page)})


def test_there_are_command_lines() -> None:
    used = {words[1] for _, words in COMMAND_LINES if words[0] == "mixcn"}
    assert used == COMMANDS.keys() - {"quantize", "upcycle", "test"}
    assert {words[0] for _, words in COMMAND_LINES} == {"mixcn", "srun", "torchrun", "make"}


@pytest.mark.parametrize("page", sorted({page for page, _ in COMMAND_LINES}), ids=name)
def test_commands_parse(page: Path, folder: Path) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for words in dict.fromkeys(words for other, words in COMMAND_LINES if other == page):
        if words[0] == "make":
            assert next(word for word in words[1:] if "=" not in word) in targets
            continue
        rest = list(words[next(i for i, word in enumerate(words) if word in ("mixcn", "lightning_mixcn")) + 1 :])
        if "--help" in rest:
            assert main(rest) == 0
        elif rest[0] in FUNCTIONS:
            parse_function(rest[0], rest[1:])
        else:
            with pytest.raises(ParsedError):
                main(rest)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_subcommands_that_are_named_exist(page: Path) -> None:
    named = re.findall(r"`mixcn ([a-z]+)", prose(page))
    assert set(named) <= COMMANDS.keys()


def test_the_own_data_module_trains(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that shows the contract of a batch, by the command, with tags of its source."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    (shown,) = snippets(ROOT / "docs/data.md", "python")
    Path("own_data.py").write_text(shown, encoding="utf-8")
    Path("zh.txt").write_text(
        "".join(f"{number}: 今天天气很好 the quick brown fox jumps\n" for number in range(110)), encoding="utf-8"
    )
    run = {
        "model": {
            "class_path": "PretrainModule",
            "init_args": {"base": str(tiny_base), "dtype": "float32", "lora": {"r": 4, "target_modules": "all-linear"}},
        },
        "data": {
            "class_path": "own_data.LinesDataModule",
            "init_args": {"path": "zh.txt", "tokenizer": str(tiny_base)},
        },
        "trainer": {"accelerator": "cpu", "max_steps": 3, "val_check_interval": 3, "limit_val_batches": 2},
    }
    Path("run.yaml").write_text(yaml.safe_dump(run), encoding="utf-8")
    assert main(["fit", "--config", "run.yaml"]) == 0
    validated = {tag for tag in scalars(Path("runs/run")) if tag.startswith("val/")}
    assert validated == {"val/zh/nll_nats_per_token"}  # of a batch without `label_bytes`


def texts_of_the_code() -> str:
    """Return all string constants of the package, without backticks, one a line."""
    files = [*(ROOT / "lightning_mixcn").rglob("*.py"), *(ROOT / "callbacks").rglob("*.py")]
    trees = (ast.parse(file.read_text(encoding="utf-8")) for file in files)
    nodes = (node for tree in trees for node in ast.walk(tree))
    constants = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return "\n".join(text.replace("`", "") for text in constants)


def test_troubleshooting_has_the_words_of_the_messages() -> None:
    """Each piece of a message between two `…`, which stand for what differs, is written in the code."""
    page = prose(ROOT / "docs/troubleshooting.md")
    rows = [line.split(" | ")[0] for line in page.splitlines() if line.startswith("| `")]
    messages = [message for row in rows for message in re.findall(r"`([^`]+)`", row)]
    assert len(messages) > 100
    code = texts_of_the_code()
    pieces = {piece.strip(" '") for message in messages for piece in message.split("…")}
    assert not sorted(piece for piece in pieces if piece not in code)
