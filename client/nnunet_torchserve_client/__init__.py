"""The client of a nnunet-torchserve server: ``nnUNetPredictor``'s methods, and a plain client below them.

Neither PyTorch nor nnU-Net is needed where it runs. Names are imported when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .answers import Answer
    from .asynchronous import AsyncRemotePredictor
    from .client import Case, Client
    from .description import Description, ServedModel
    from .errors import ClientError
    from .events import Event, Kind
    from .flight import Outcome
    from .predictor import RemotePredictor

__all__ = [
    "Answer",
    "AsyncRemotePredictor",
    "Case",
    "Client",
    "ClientError",
    "Description",
    "Event",
    "Kind",
    "Outcome",
    "RemotePredictor",
    "ServedModel",
]

_HOME = {
    "Answer": "answers",
    "AsyncRemotePredictor": "asynchronous",
    "Case": "client",
    "Client": "client",
    "ClientError": "errors",
    "Description": "description",
    "Event": "events",
    "Kind": "events",
    "Outcome": "flight",
    "RemotePredictor": "predictor",
    "ServedModel": "description",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value
