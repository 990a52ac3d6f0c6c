"""Compressed frames."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy.typing as npt

from .container import Stream
from .header import Pixels


def is_supported(pixels: Pixels) -> bool:
    return False


def compressed_frames(stream: Stream, size: int, pixels: Pixels) -> Iterator[npt.NDArray[Any]]:
    raise NotImplementedError
    yield
