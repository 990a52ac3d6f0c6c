"""From stored numbers to values: Modality LUT or rescale (PS3.3, C.11.1), each image or frame by its own.

What is for the screen only is left out: windows, Presentation LUTs, the inversion that MONOCHROME1 means. So are real
world values (``RealWorldValueMappingSequence``): nnU-Net was trained on the modality's own, Hounsfield units of CT.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

_EXACT_IN_FLOAT32 = 2**23
"""Sums of two integers below it are exact in float32."""


class Rescale(Protocol):
    """What makes values of stored numbers."""

    def apply(self, stored: npt.NDArray[Any], out: npt.NDArray[np.float32]) -> None:
        """Fill ``out``, float32, from integers of the same shape."""


@dataclass(frozen=True, slots=True)
class Linear:
    """Slope × stored + intercept, in float64, rounded once."""

    slope: float
    intercept: float

    def apply(self, stored: npt.NDArray[Any], out: npt.NDArray[np.float32]) -> None:
        """Fill ``out``; integers that only shift are summed in float32, which is exact."""
        shift = self.intercept
        if self.slope == 1 and stored.dtype.itemsize <= 2 and shift.is_integer() and abs(shift) < _EXACT_IN_FLOAT32:
            np.add(stored, np.float32(shift), out=out, dtype=np.float32)
            return
        with np.errstate(over="ignore"):
            out[...] = stored.astype(np.float64) * self.slope + shift


UNSCALED = Linear(1.0, 0.0)
"""Where a header says nothing; one that says slope 1 and intercept 0 is another object."""


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """A Modality LUT.

    Attributes:
        first: the stored number that the first entry is for; smaller ones have it too.
        values: float32, one for each number from there on; larger ones have the last.
    """

    first: int
    values: npt.NDArray[np.float32]

    def apply(self, stored: npt.NDArray[Any], out: npt.NDArray[np.float32]) -> None:
        """Fill ``out``."""
        index = np.clip(stored.astype(np.int64) - self.first, 0, len(self.values) - 1)
        np.take(self.values, index, out=out)
