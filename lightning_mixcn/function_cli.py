"""Subcommands that are one function: their options come from its signature, their help from its docstring."""

import argparse
from collections.abc import Callable
from importlib import import_module

from jsonargparse import ArgumentParser

from lightning_mixcn.cli import UsageError

FUNCTIONS = {
    "upcycle": "lightning_mixcn.model.upcycle",
    "quantize": "lightning_mixcn.model.quantize",
    "export": "lightning_mixcn.model.export",
    "chat": "lightning_mixcn.chat",
}


def function_parser(command: str) -> tuple[ArgumentParser, Callable[..., object]]:
    """Parser of a subcommand and the function it calls; arguments without a default are positional.

    Args:
        command: A name in the table of this file.
    """
    function: Callable[..., object] = getattr(import_module(FUNCTIONS[command]), command)
    summary = (function.__doc__ or "").partition("\n")[0]
    parser = ArgumentParser(prog=f"mixcn {command}", description=summary, exit_on_error=False)
    parser.add_function_arguments(function, as_group=False, as_positional=True)
    return parser, function


def run_function(command: str, arguments: list[str]) -> None:
    """Parse the arguments of a subcommand and run it.

    Args:
        command: A name in the table of this file.
        arguments: Those behind the subcommand.

    Raises:
        UsageError: the arguments cannot be used.
    """
    parser, function = function_parser(command)
    try:
        parsed = parser.parse_args(arguments)
    except argparse.ArgumentError as error:
        raise UsageError(f"{error}; see mixcn {command} --help") from error
    function(**parsed.as_dict())
