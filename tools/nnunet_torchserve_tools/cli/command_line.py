"""The command line itself: its errors, warnings and exit codes; the verbs are in the modules beside this one.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 stopped although not everything was answered.
"""

from __future__ import annotations

import importlib.metadata
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Annotated, Any, ParamSpec

import typer

from ..console import explained
from ..errors import ModelWarning, ToolError

app = typer.Typer(
    help="Serve trained nnU-Net v2 models with TorchServe.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_P = ParamSpec("_P")


def reports_errors(command: Callable[_P, None]) -> Callable[_P, None]:
    """A :class:`ToolError` becomes one line on stderr and its exit code."""

    @wraps(command)
    def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except (ToolError, ModuleNotFoundError) as error:
            line, code = explained(error)
            typer.echo(line, err=True)
            raise typer.Exit(code) from error

    return wrapper


@contextmanager
def warnings_as_lines() -> Iterator[None]:
    """A :class:`ModelWarning` becomes one line on stderr; others are shown as ever."""
    show = warnings.showwarning

    def show_one(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, ModelWarning):
            typer.echo(f"warning: {message}", err=True)
        else:
            show(message, category, *where, **more)

    with warnings.catch_warnings():
        warnings.simplefilter("always", ModelWarning)
        warnings.showwarning = show_one
        yield


def say(line: str) -> None:
    """One line on stderr: what is a program's to read goes to stdout."""
    typer.echo(line, err=True)


def warn(text: str) -> None:
    """One line on stderr."""
    say(f"warning: {text}")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(importlib.metadata.version("nnunet-torchserve"))
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass
