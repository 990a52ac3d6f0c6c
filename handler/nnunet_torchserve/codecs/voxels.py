"""From stored numbers to float32 voxels, slab by slab, so that a volume is never held twice."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from .inflate import ByteSource

_SLAB_BYTES = 256 * 1024
"""Of stored numbers: fits a core's cache beside its float32 copy."""


def read_voxels(
    source: ByteSource,
    dtype: np.dtype[Any],
    shape: tuple[int, int, int, int],
    *,
    channels_fastest: bool = False,
    scale: Callable[[npt.NDArray[Any]], npt.NDArray[Any]] | None = None,
) -> npt.NDArray[np.float32]:
    """Read the rest of a source as voxels, to its end.

    Args:
        source: at the first stored number.
        dtype: of the stored numbers.
        shape: (C, Z, Y, X), of which X varies fastest as stored.
        channels_fastest: the channels of a voxel lie side by side instead.
        scale: makes values of stored numbers, each by itself.

    Returns:
        float32 (C, Z, Y, X).

    Raises:
        Malformed: the bytes end early or their compression is damaged.
        TooLarge: far more bytes than declared.
    """
    channels, voxels = shape[0], math.prod(shape[1:])
    out = np.empty((channels, voxels), np.float32)
    rows = out.T if channels_fastest else out.reshape(-1, 1)
    width = rows.shape[1]
    step = max(1, _SLAB_BYTES // (width * dtype.itemsize))
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, len(rows), step):
            slab = rows[start : start + step]
            stored = source.read_exactly(slab.size * dtype.itemsize).view(dtype)
            slab[...] = (stored if scale is None else scale(stored)).reshape(slab.shape)
    source.finish()
    return out.reshape(shape)
