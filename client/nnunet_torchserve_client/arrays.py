"""An array on its way to a server: in few bytes, and without losing a bit of what nnU-Net would see.

nnU-Net makes float32 of every image before it does anything else, and so does the server. So float32 is what an array
has to say, and whatever smaller type says the same is sent instead.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import WrongUse

Array = npt.NDArray[Any]

_SMALLER = (np.uint8, np.int8, np.uint16, np.int16, np.float16)
"""In the order in which they are tried; an integer is preferred to a float of its size, for it packs better."""

_SAMPLE = 4096
"""Numbers that are looked at first: most types are ruled out by them."""


def smallest(array: npt.ArrayLike) -> Array:
    """The array in the smallest type that holds each of its values as float32 has it.

    Args:
        array: numbers or truth values of any type and order, in this machine's memory.

    Returns:
        The same shape, C-contiguous, native byte order: uint8, int8, uint16, int16, float16 or float32. Minus zero may
        become zero.

    Raises:
        WrongUse: it holds no real numbers.
    """
    given = np.asarray(array)
    if given.dtype.kind not in "biuf":
        msg = f"an array of type {given.dtype} is no image; it should hold integers, floats or truth values"
        raise WrongUse(msg)
    if given.dtype.kind == "b" or given.dtype == np.uint8:
        return np.ascontiguousarray(given, np.uint8)
    if given.dtype == np.int8:
        return np.ascontiguousarray(given)
    with np.errstate(over="ignore", invalid="ignore"):
        exact = np.ascontiguousarray(given, np.float32)  # as nnU-Net's run_case_npy; no copy of a float32 array
    flat = exact.reshape(-1)
    sample = flat[:: max(1, flat.size // _SAMPLE)]
    for candidate in _SMALLER:
        if _holds(sample, candidate) and _holds(flat, candidate):
            return exact.astype(candidate)
    return exact


def _holds(values: npt.NDArray[np.float32], dtype: type[np.generic]) -> bool:
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.array_equal(values.astype(dtype), values, equal_nan=True))


def npy_header(array: Array) -> bytes:
    """What stands before the numbers of a C-contiguous array in a .npy file."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
    return file.getvalue()
