"""Read what a class takes from its source, without importing it: its help must not wait for torch.

jsonargparse and `inspect` need the class itself. griffe reads sources, too, but is a tool of documentation, no
dependency of a run, and does not know this project's `Annotated` aliases.
"""

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from inspect import cleandoc
from pathlib import Path
from typing import NamedTuple

from docstring_parser import Docstring, parse

from lightning_mixcn.errors import UserError


class ClassSource(NamedTuple):
    """A class in the source of a module.

    Args:
        module: Full name of the module.
        node: Definition of the class.
    """

    module: str
    node: ast.ClassDef


@dataclass(frozen=True)
class Argument:
    """An argument of a class.

    Args:
        name: Name.
        kind: Type as it is written, aliases of this package resolved; empty where there is none.
        default: Default in YAML's words, ``absent`` for a key that may be left out; None where one must be given.
        about: Description.
    """

    name: str
    kind: str
    default: str | None
    about: str


def find_class(path: str) -> ClassSource | None:
    """Find a class by the path it is imported by, which need not be the module that defines it.

    Args:
        path: Full path, such as ``torch.optim.AdamW``.

    Returns:
        Its definition; None where there is none, or only a compiled one.
    """
    module, _, name = path.rpartition(".")
    try:
        found = _definition(module, name)
    except (SyntaxError, UnicodeDecodeError) as error:
        raise UserError(f"`{path}` cannot be read: {error}. Mend the module") from error
    return ClassSource(found[0], found[1]) if found is not None and isinstance(found[1], ast.ClassDef) else None


def exported_names(package: str) -> list[str]:
    """List the names that a package's ``__init__`` imports or defines and that are written like classes."""
    names = []
    for statement in _statements(package):
        if isinstance(statement, ast.ImportFrom):
            names += [alias.asname or alias.name for alias in statement.names]
        elif isinstance(statement, ast.ClassDef):
            names.append(statement.name)
    return [name for name in dict.fromkeys(names) if re.match(r"[A-Z]+\w*[a-z]|[A-Z]{3,}$", name)]


@cache
def ancestry(found: ClassSource) -> tuple[ClassSource, ...]:
    """List a class and its bases whose source is there, the nearest first."""
    line = [found]
    for base in found.node.bases:
        module, _, name = ast.unparse(base).partition("[")[0].rpartition(".")
        parent = _definition(module or found.module, name)
        if parent is not None and isinstance(parent[1], ast.ClassDef) and parent[1] is not found.node:
            line += [each for each in ancestry(ClassSource(parent[0], parent[1])) if each not in line]
    return tuple(line)


def base_names(found: ClassSource) -> set[str]:
    """Return the last names of all bases, whether their source is there or not."""
    return {ast.unparse(base).partition("[")[0].split(".")[-1] for each in ancestry(found) for base in each.node.bases}


def is_abstract(found: ClassSource) -> bool:
    """Tell whether a class says of itself that it is a base only."""
    return "ABC" in {ast.unparse(base) for base in found.node.bases}


def documentation(found: ClassSource) -> Docstring:
    """Return the docstring of a class, or of its constructor, or of the nearest base that has one."""
    for each in ancestry(found):
        if text := _docstring(each) or _docstring_of_init(each):
            return parse(_plain(text))
    return parse("")


def arguments_of(found: ClassSource) -> list[Argument]:
    """Return the arguments of a class: those of its constructor, or the fields of a dataclass or typed mapping."""
    line, about = ancestry(found), dict[str, str]()
    for each in reversed(line):
        for text in (_docstring_of_init(each), _docstring(each)):
            about |= {part.arg_name: " ".join((part.description or "").split()) for part in parse(_plain(text)).params}
    has_fields = any("dataclass" in ast.unparse(each) for each in found.node.decorator_list)
    if has_fields or "TypedDict" in base_names(found):
        return _fields(line, about)
    arguments = dict[str, Argument]()
    for each in line:
        constructor = _constructor(each)
        if constructor is None:
            continue
        for argument in _parameters(each.module, constructor.args, about):
            arguments.setdefault(argument.name, argument)
        if constructor.args.kwarg is None:  # else the bases' own follow
            break
    return list(arguments.values())


def mentioned_classes(found: ClassSource) -> list[str]:
    """Return the names in the types of a class's arguments."""
    kinds = " ".join(re.sub(r"'[^']*'", "", argument.kind) for argument in arguments_of(found))
    return list(dict.fromkeys(re.findall(r"\b[A-Z]\w+", kinds)))


# ---- sources ----


@cache
def _file(module: str) -> Path | None:
    """Return the file of a module. `find_spec` imports a dotted name's parents: only the first part is asked."""
    first, *rest = module.split(".")
    try:
        spec = find_spec(first) if first else None
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    folders = [Path(place).joinpath(*rest) for place in spec.submodule_search_locations or ()]
    places = [path for folder in folders for path in (folder / "__init__.py", folder.with_suffix(".py"))]
    if not rest and not folders:
        places = [Path(spec.origin or "")]
    return next((path for path in places if path.suffix == ".py" and path.is_file()), None)


@cache
def _statements(module: str) -> tuple[ast.stmt, ...]:
    """Return the statements of a module, those inside of ``if`` and ``try`` too; none where it has no source."""
    file = _file(module)
    return () if file is None else tuple(_flat(ast.parse(file.read_bytes()).body))


def _flat(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    for statement in body:
        yield statement
        for part in ("body", "handlers", "orelse", "finalbody"):
            if isinstance(statement, ast.If | ast.Try | ast.ExceptHandler):
                yield from _flat(getattr(statement, part, ()))


def _definition(
    module: str, name: str, seen: frozenset[tuple[str, str]] = frozenset()
) -> tuple[str, ast.ClassDef | ast.expr] | None:
    """Find what a name means in a module, through its imports: a class, or the value that is assigned to it."""
    if (module, name) in seen:
        return None
    seen |= {(module, name)}
    for statement in _statements(module):
        if isinstance(statement, ast.ClassDef) and statement.name == name:
            return module, statement
        if isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value is not None:
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                return module, statement.value
        if isinstance(statement, ast.ImportFrom):
            for alias in statement.names:
                if name == (alias.asname or alias.name) or alias.name == "*":
                    wanted = name if alias.name == "*" else alias.name
                    if (found := _definition(_source_of(module, statement), wanted, seen)) is not None:
                        return found
    return None


def _source_of(module: str, statement: ast.ImportFrom) -> str:
    """Return the full name of the module that an ``import`` names."""
    if not statement.level:
        return statement.module or ""
    file = _file(module)
    parts = module.split(".")
    kept = len(parts) - statement.level + (file is not None and file.name == "__init__.py")
    return ".".join([*parts[:kept], *filter(None, [statement.module])])


# ---- docstrings ----


def _docstring(found: ClassSource) -> str:
    """Return a class's docstring, also where the module assigns it below the class, as torch's optimizers do."""
    if text := ast.get_docstring(found.node):
        return text
    name = f"{found.node.name}.__doc__"
    for statement in _statements(found.module):
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == name:
            return cleandoc(_text(found.module, statement.value))
    return ""


def _text(module: str, value: ast.expr) -> str:
    """Return a text that is put together of constants; what is computed is left out."""
    match value:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(_text(module, part) for part in parts)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _text(module, left) + _text(module, right)
        case ast.FormattedValue(value=inner):
            return _text(module, inner)
        case ast.Name(id=name):
            found = _definition(module, name)
            return _text(found[0], found[1]) if found is not None and isinstance(found[1], ast.expr) else ""
    return ""


def _docstring_of_init(found: ClassSource) -> str:
    constructor = _constructor(found)
    return "" if constructor is None else ast.get_docstring(constructor) or ""


def _constructor(found: ClassSource) -> ast.FunctionDef | None:
    own = (node for node in found.node.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    return next(own, None)


def _plain(text: str) -> str:
    """Take Sphinx's roles and formulas out of a docstring."""
    text = re.sub(r"(?m)^\.\. math::.*(?:\n(?: +.*| *))*", "", text)
    return re.sub(r":[\w:]+:`~?\.?([^`]+)`", r"`\1`", text)


# ---- arguments ----


def _parameters(module: str, signature: ast.arguments, about: dict[str, str]) -> Iterator[Argument]:
    positional = [*signature.posonlyargs, *signature.args]
    defaults = [*[None] * (len(positional) - len(signature.defaults)), *signature.defaults, *signature.kw_defaults]
    for parameter, default in zip([*positional, *signature.kwonlyargs], defaults, strict=True):
        if parameter.arg != "self":
            yield _argument(module, parameter.arg, parameter.annotation, default, about)


def _fields(line: Sequence[ClassSource], about: dict[str, str]) -> list[Argument]:
    fields = dict[str, Argument]()
    for each in reversed(line):
        is_optional = any(keyword.arg == "total" for keyword in each.node.keywords)
        for node in each.node.body:
            if not isinstance(node, ast.AnnAssign) or "ClassVar" in ast.unparse(node.annotation):
                continue
            name, default, given = ast.unparse(node.target), node.value, dict[str | None, ast.expr]()
            if isinstance(default, ast.Call) and ast.unparse(default.func).endswith("field"):
                given = {keyword.arg: keyword.value for keyword in default.keywords}
                default = given.get("default", given.get("default_factory"))
            if "init" not in given:
                told = _help_of(each.module, given.get("metadata"))
                field = _argument(each.module, name, node.annotation, default, {name: told} | about)
                fields[name] = replace(field, default="absent") if is_optional else field
    return list(fields.values())


def _help_of(module: str, metadata: ast.expr | None) -> str:
    """Return what a field's metadata says under ``help``, as PEFT's and transformers' do."""
    if not isinstance(metadata, ast.Dict):
        return ""
    named = zip(metadata.keys, metadata.values, strict=True)
    texts = [_text(module, value) for key, value in named if isinstance(key, ast.Constant) and key.value == "help"]
    return " ".join("".join(texts).split())


def _argument(
    module: str, name: str, annotation: ast.expr | None, default: ast.expr | None, about: dict[str, str]
) -> Argument:
    kind = "" if annotation is None else _in_yaml(ast.unparse(_Resolved(module).visit(_copied(annotation))))
    return Argument(name, kind, None if default is None else _default(module, default), about.get(name, ""))


def _default(module: str, value: ast.expr) -> str:
    """Write a default as YAML would; a constant of this package by its value."""
    if isinstance(value, ast.Lambda):
        return ast.unparse(value.body)
    if isinstance(value, ast.Constant) and isinstance(value.value, str):
        return value.value or "''"
    if isinstance(value, ast.Name) and module.startswith("lightning_mixcn."):
        found = _definition(module, value.id)
        if found is not None and isinstance(found[1], ast.expr):
            return _default(*found)  # type: ignore[arg-type]  # mypy does not narrow the pair
    return _in_yaml(ast.unparse(value))


def _in_yaml(text: str) -> str:
    for python, yaml in (("None", "null"), ("True", "true"), ("False", "false")):
        text = re.sub(rf"\b{python}\b", yaml, text)
    return text


def _copied(node: ast.expr) -> ast.expr:
    return ast.parse(ast.unparse(node), mode="eval").body


class _Resolved(ast.NodeTransformer):
    """Replaces this package's aliases by what they mean, and `Annotated` and `Literal` by what they hold."""

    def __init__(self, module: str) -> None:
        self.module = module

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        return node

    def visit_Name(self, node: ast.Name) -> ast.expr:
        found = _definition(self.module, node.id) if self.module.startswith("lightning_mixcn") else None
        if found is None or not isinstance(found[1], ast.expr) or not found[0].startswith("lightning_mixcn"):
            return node
        meant: ast.expr = _Resolved(found[0]).visit(_copied(found[1]))
        return meant

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        kind = ast.unparse(node.value)
        if kind == "Annotated":
            held: ast.expr = self.visit(inner[0])
            return held
        if kind in ("Literal", "Union", "Optional"):
            parts = list(inner) if kind == "Literal" else [self.visit(part) for part in inner]
            parts += [ast.Constant(None)] * (kind == "Optional")
            union = parts[0]
            for part in parts[1:]:
                union = ast.BinOp(union, ast.BitOr(), part)
            return union
        self.generic_visit(node)
        return node
