"""pydicom, loaded when the first series comes, and kept from talking.

Its warnings and its log repeat values of a header, which can name a patient, so neither is heard.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from ...errors import DicomUnavailable, ServingError
from ..inflate import refuse_damage
from .elements import Encoding

_DAMAGED = "a DICOM file is damaged: an element holds no value of its kind"


@cache
def _load() -> Any:
    """``pydicom.filereader``.

    Raises:
        DicomUnavailable: it is not installed.
    """
    try:
        from pydicom import config, filereader
    except ModuleNotFoundError:
        msg = "this server does not read DICOM: send NIfTI, or have its owner install nnunet-torchserve's extra dicom"
        raise DicomUnavailable(msg) from None
    config.settings.reading_validation_mode = config.IGNORE
    logger = logging.getLogger("pydicom")
    logger.propagate = False
    logger.addHandler(logging.NullHandler())
    return filereader


def require_pydicom() -> None:
    """Raise :class:`DicomUnavailable` unless it is installed."""
    _load()


class quietly(refuse_damage):  # noqa: N801 (reads as a statement)
    """What pydicom says is not heard, and whatever it raises becomes :class:`~...errors.Malformed`.

    The bytes are the client's. Our own errors stay what they are.
    """

    def __init__(self, message: str = _DAMAGED) -> None:
        super().__init__((Exception,), message)
        self._silence = warnings.catch_warnings()

    def __enter__(self) -> None:
        self._silence.__enter__()
        warnings.simplefilter("ignore")

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._silence.__exit__(None, None, None)
        if not isinstance(error, ServingError):
            super().__exit__(kind, error, traceback)


@contextmanager
def silenced() -> Iterator[None]:
    """What pydicom says is not heard; what it raises stays what it is, for the bytes are ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def data_set(elements: list[bytes], encoding: Encoding) -> Any:
    """A ``pydicom.Dataset`` of some elements, as they stand in a file.

    Raises:
        Malformed: they are damaged.
    """
    with quietly():
        return _load().read_dataset(io.BytesIO(b"".join(elements)), encoding.implicit, encoding.little)
