"""Subcommands that are one function: their options come from its signature, their help from its docstring."""

import argparse
import json
from collections.abc import Callable, Mapping
from importlib import import_module
from inspect import Parameter, signature
from itertools import pairwise
from typing import Any, get_origin, get_type_hints

from jsonargparse import ArgumentParser

from lightning_mixcn.errors import UserError

from .table import FUNCTIONS, NESTED


def function_parser(command: str) -> tuple[ArgumentParser, Callable[..., object]]:
    """Parser of a subcommand and the function it calls; arguments without a default are positional.

    Args:
        command: A name in the table of this file, with one of the second table behind it where there are any; without,
            the parser leads to all of these.
    """
    command, _, nested = command.partition(" ")
    module = import_module(FUNCTIONS[command])
    if command in NESTED and not nested:
        return _parser_of_several(command), lambda **parsed: getattr(module, parsed["subcommand"])(
            **parsed[parsed["subcommand"]]
        )
    function: Callable[..., object] = getattr(module, nested or command)
    command = f"{command} {nested}".strip()
    summary = (function.__doc__ or "").partition("\n")[0]
    parser = ArgumentParser(prog=f"mixcn {command}", description=summary, exit_on_error=False)
    parser.add_function_arguments(function, as_group=False, as_positional=True)
    return parser, function


def add_function_subcommands(subcommands: Any, helps: Mapping[str, str]) -> None:
    """Add all of them to another program's subcommands.

    Args:
        subcommands: What jsonargparse's ``add_subcommands`` gave.
        helps: One line for each.
    """
    for command in FUNCTIONS:
        # jsonargparse wants a parser in its place before it gets subcommands of its own.
        parser = ArgumentParser(exit_on_error=False) if command in NESTED else function_parser(command)[0]
        subcommands.add_subcommand(command, parser, help=helps[command])
        if command in NESTED:
            _add_nested(parser, command)


def _parser_of_several(command: str) -> ArgumentParser:
    parser = ArgumentParser(prog=f"mixcn {command}", exit_on_error=False)
    _add_nested(parser, command)
    return parser


def _add_nested(parser: ArgumentParser, command: str) -> None:
    subcommands = parser.add_subcommands(dest="subcommand")
    for name in NESTED[command]:
        nested, function = function_parser(f"{command} {name}")
        subcommands.add_subcommand(name, nested, help=(function.__doc__ or "").partition("\n")[0])


def run_function(command: str, arguments: list[str]) -> None:
    """Parse the arguments of a subcommand and run it.

    Args:
        command: A name in the table of this file.
        arguments: Those behind the subcommand.

    Raises:
        UserError: the arguments cannot be used.
    """
    function, parsed = parse_function(command, arguments)
    function(**parsed)


def parse_function(command: str, arguments: list[str]) -> tuple[Callable[..., object], dict[str, Any]]:
    """Parse the arguments of a subcommand.

    Args:
        command: A name in the table of this file.
        arguments: Those behind the subcommand.

    Returns:
        The function, and what to call it with.

    Raises:
        UserError: the arguments cannot be used.
    """
    if arguments and arguments[0] in NESTED.get(command, ()):
        return parse_function(f"{command} {arguments[0]}", arguments[1:])
    parser, function = function_parser(command)
    try:
        parsed = parser.parse_args(_positional_list(_list_items(_flags(arguments, function), function), function))
    except argparse.ArgumentError as error:
        raise UserError(f"{error}; see mixcn {command} --help") from error
    return function, parsed.as_dict()


def _flags(arguments: list[str], function: Callable[..., object]) -> list[str]:
    """Write ``--option``, where it is true or false and neither follows, as jsonargparse has it: ``--option=true``."""
    flags = {f"--{name}" for name, hint in get_type_hints(function).items() if hint is bool}
    return [
        f"{argument}=true" if argument in flags and following not in ("true", "false") else argument
        for argument, following in pairwise([*arguments, ""])
    ]


def _list_items(arguments: list[str], function: Callable[..., object]) -> list[str]:
    """Write ``--option a b``, where the option is a list, as jsonargparse has it: ``--option+ a --option+ b``."""
    lists = {f"--{name}" for name, hint in get_type_hints(function).items() if get_origin(hint) is list}
    written: list[str] = []
    option = ""
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name in lists and value and not value.startswith("["):  # `--option=a`
            written.append(f"{name}+={value}")
            option = ""
            continue
        if argument.startswith("-"):
            option = argument if argument in lists else ""
        if not option:
            written.append(argument)
        elif argument != option:
            # As one list, jsonargparse reads it itself.
            written += [option if argument.startswith("[") else f"{option}+", argument]
    return written


def _positional_list(arguments: list[str], function: Callable[..., object]) -> list[str]:
    """Write ``a b --option c``, where the positional argument is a list, as one: ``["a", "b"] --option c``."""
    first = next(iter(signature(function).parameters.values()), None)
    if first is None or first.kind is Parameter.KEYWORD_ONLY:
        return arguments
    if get_origin(get_type_hints(function).get(first.name)) is not list:
        return arguments
    positional, options, takes_value = list[str](), list[str](), False
    for argument in arguments:
        if argument.startswith("-") or takes_value:
            takes_value = argument.startswith("--") and "=" not in argument and argument != "--help"
            options.append(argument)
        else:
            positional.append(argument)
    if positional and not positional[0].startswith("["):
        positional = [json.dumps(positional, ensure_ascii=False)]
    return positional + options
