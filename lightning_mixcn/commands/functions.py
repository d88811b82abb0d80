"""Subcommands that are one function: their options come from its signature, their help from its docstring."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from importlib import import_module
from inspect import Parameter, signature
from itertools import pairwise
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from docstring_parser import parse
from jsonargparse import ArgumentParser

from lightning_mixcn.arguments import check_arguments
from lightning_mixcn.errors import UserError

from .messages import readable
from .table import FUNCTIONS, NESTED


def function_parser(command: str) -> tuple[ArgumentParser, Callable[..., object]]:
    """Build the parser of a subcommand; those before the `*` of its function are positional.

    Args:
        command: Name in the table `FUNCTIONS`, followed by a blank and one of `NESTED` where there are any; without it,
            the parser leads to all of these.

    Returns:
        The parser, and the function to call.
    """
    command, _, nested = command.partition(" ")
    module = import_module(FUNCTIONS[command])
    if command in NESTED and not nested:
        parser = ArgumentParser(prog=f"mixcn {command}", exit_on_error=False, allow_abbrev=False)
        _add_nested(parser, command)
        return parser, lambda: None
    function: Callable[..., object] = getattr(module, nested or command)
    parser = ArgumentParser(
        prog=f"mixcn {command} {nested}".strip(),
        description=parse(function.__doc__ or "").description,
        exit_on_error=False,
        allow_abbrev=False,
    )
    helps, hints = _helps(function), get_type_hints(function)
    for name, parameter in signature(function).parameters.items():
        _add_parameter(parser, parameter, hints[name], helps)
    return parser, function


def add_function_subcommands(subcommands: Any, helps: Mapping[str, str]) -> None:
    """Add all of them to another program's subcommands.

    Args:
        subcommands: Result of jsonargparse's ``add_subcommands``.
        helps: One line for each.
    """
    for command in FUNCTIONS:
        # jsonargparse wants a parser in its place before it gets subcommands of its own.
        parser = (
            ArgumentParser(exit_on_error=False, allow_abbrev=False)
            if command in NESTED
            else function_parser(command)[0]
        )
        subcommands.add_subcommand(command, parser, help=helps[command])
        if command in NESTED:
            _add_nested(parser, command)


def parse_function(command: str, arguments: list[str]) -> tuple[Callable[..., object], dict[str, Any]]:
    """Parse the arguments of a subcommand.

    Args:
        command: Name in the table `FUNCTIONS`.
        arguments: Those after the subcommand.

    Returns:
        The function, and its arguments.

    Raises:
        UserError: the arguments cannot be used.
    """
    if arguments and arguments[0] in NESTED.get(command, ()):
        return parse_function(f"{command} {arguments[0]}", arguments[1:])
    parser, function = function_parser(command)
    try:
        given = parser.parse_args(_flags(arguments, function)).as_dict()
    except argparse.ArgumentError as error:
        options = [name for action in parser._actions for name in action.option_strings]
        raise UserError(f"{readable(str(error), options)}; see mixcn {command} --help") from error
    hints = get_type_hints(function)
    values = {name: _value(name, hints[name], given) for name in signature(function).parameters}
    check_arguments(function, values)
    return function, values


def _flags(arguments: list[str], function: Callable[..., object]) -> list[str]:
    """Write ``--option`` of a flag as ``--option=true`` where no value follows, lest it take a positional argument."""
    hints = get_type_hints(function).items()
    fields = [pair for _, hint in hints if is_dataclass(hint) for pair in get_type_hints(hint).items()]
    flags = {f"--{name}" for name, hint in (*hints, *fields) if hint is bool}
    return [
        f"{argument}=true" if argument in flags and following not in ("true", "false") else argument
        for argument, following in pairwise([*arguments, ""])
    ]


def _helps(documented: object) -> dict[str, str]:
    return {
        part.arg_name: " ".join((part.description or "").split()) for part in parse(documented.__doc__ or "").params
    }


def _add_nested(parser: ArgumentParser, command: str) -> None:
    subcommands = parser.add_subcommands(dest="subcommand")
    for name in NESTED[command]:
        nested, function = function_parser(f"{command} {name}")
        subcommands.add_subcommand(name, nested, help=(function.__doc__ or "").partition("\n")[0])


def _add_parameter(parser: ArgumentParser, parameter: Parameter, hint: Any, helps: Mapping[str, str]) -> None:
    """Add one parameter; a dataclass adds its fields, each as an option of its own."""
    if is_dataclass(hint):
        inner, types = _helps(hint), get_type_hints(hint)
        for name, field in signature(hint).parameters.items():  # type: ignore[arg-type]  # a class is callable
            _add_parameter(parser, field.replace(kind=Parameter.KEYWORD_ONLY), types[name], inner)
        return
    required, names = parameter.default is Parameter.empty, [f"--{parameter.name}"]
    options: dict[str, Any] = {"type": hint, "help": helps.get(parameter.name, "")}
    if not required:
        options["default"] = list(default) if isinstance(default := parameter.default, tuple) else default
    if _is_list(hint):
        options |= {"type": str, "nargs": "+" if required else "*", "action": "extend"}
        names.append(f"--{parameter.name}+")  # jsonargparse's own way to append
    elif hint is bool:
        options |= {"nargs": "?", "const": True}
    if parameter.kind is not Parameter.KEYWORD_ONLY:
        parser.add_argument(parameter.name, **options if required else {"nargs": "?"} | options)
    else:
        parser.add_argument(*names, required=required, **options)


def _is_list(hint: Any) -> bool:
    return any(get_origin(part) in (list, Sequence) for part in (hint, *get_args(hint)))


def _value(name: str, hint: Any, given: Mapping[str, Any]) -> Any:
    """Return an argument of the function from what was parsed."""
    if is_dataclass(hint):
        return hint(**{field: _value(field, types, given) for field, types in get_type_hints(hint).items()})  # type: ignore[operator]  # a class
    if _is_list(hint) and given[name] is not None:
        if given[name] == ["null"] and type(None) in get_args(hint):
            return None
        return [item for text in given[name] for item in _items(name, text)]
    return given[name]


def _items(name: str, text: str) -> list[str]:
    """Read one word of a list: an item, or several as ``[a, b]``."""
    if not text.startswith("["):
        return [text]
    try:
        items = yaml.load(text, yaml.BaseLoader)  # it leaves `no` a string
    except (yaml.YAMLError, RecursionError):
        items = None
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise UserError(f"`{name}={text}` is no list. Give its items one by one, or as [a, b]")
    return items
