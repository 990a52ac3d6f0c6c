"""Arguments of several verbs, and what is made of an argument's text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from ..errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from nnunet_torchserve.backend import Backend, Choice
    from nnunet_torchserve.options import FoldName

    from ..validation_cases import Tolerance, Validation

_Named = TypeVar("_Named", bound=str)

MIB = 1024**2
STATE_DIR = typer.Option(help="The server's state directory.")
MANAGEMENT_URL = typer.Option(help="Management URL of a server on this machine, instead of its state directory.")
MODEL = typer.Option(help="NAME or NAME/VERSION; default: every model.")

_LARGEST_HTTP_PORT = 65534  # TorchServe refuses 65535


def port(default: int, largest: int = 65535) -> Any:
    """An option for one of the server's ports."""
    return typer.Option(min=1, max=largest, help=f"Default: from --config, else {default}.")


def http_port(default: int) -> Any:
    """The same for a port of TorchServe's HTTP servers."""
    return port(default, _LARGEST_HTTP_PORT)


def postprocessing_of(text: str | None) -> Any:
    """The option of that name: a file, ``"auto"``, ``"none"`` or nothing."""
    return text if text in {None, "auto", "none"} else Path(str(text))


def backend_of(text: str) -> Backend:
    """The option of that name.

    Raises:
        UsageError: no backend is called so.
    """
    from nnunet_torchserve.backend import parse_backend

    return _named(text, parse_backend)


def choice_of(text: str) -> Choice:
    """The same, or ``auto``.

    Raises:
        UsageError: no backend is called so.
    """
    from nnunet_torchserve.backend import parse_choice

    return _named(text, parse_choice)


def _named(text: str, parse: Callable[[str], _Named]) -> _Named:
    try:
        return parse(text)
    except ValueError as error:
        msg = f"--backend: {error}"
        raise UsageError(msg) from error


def tolerance_of(text: str | None) -> Tolerance | None:
    """``--max-dice-loss``: one number or two, from 0 to 1.

    Raises:
        UsageError: something else.
    """
    from ..validation_cases import Tolerance

    if text is None:
        return None
    try:
        numbers = [float(number) for number in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in {1, 2} or not all(0 <= number <= 1 for number in numbers):
        msg = f"--max-dice-loss {text}: a number from 0 to 1 was expected, or two of them as in 0.001,0.005"
        raise UsageError(msg)
    return Tolerance(numbers[0], numbers[-1])


def validation_of(images: list[Path] | None, labels: Path | None, max_dice_loss: str | None) -> Validation | None:
    """``--validate`` and what belongs to it.

    Raises:
        UsageError: that is given without it, or cannot be meant.
    """
    from ..validation_cases import Validation

    tolerance = tolerance_of(max_dice_loss)
    if images:
        return Validation(tuple(images), labels, tolerance)
    for name, value in (("--labels", labels), ("--max-dice-loss", tolerance)):
        if value is not None:
            msg = f"{name} belongs to --validate, which names the images"
            raise UsageError(msg)
    return None


def folds_of(text: str | None) -> tuple[FoldName, ...] | None:
    """Numbers, or ``"all"``.

    Raises:
        UsageError: neither.
    """
    if text is None:
        return None
    try:
        return tuple("all" if fold.strip() == "all" else int(fold) for fold in text.split(","))
    except ValueError as error:
        msg = f"--folds {text}: numbers separated by commas, or all, were expected"
        raise UsageError(msg) from error


def device_ids_of(text: str | None) -> tuple[int, ...] | None:
    """Numbers.

    Raises:
        UsageError: something else.
    """
    if text is None:
        return None
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError as error:
        msg = f"--device-ids {text}: numbers separated by commas were expected"
        raise UsageError(msg) from error
