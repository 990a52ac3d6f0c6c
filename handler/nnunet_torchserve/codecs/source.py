"""What every image codec gives the pipeline: the header at once, the voxels on demand."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..options import OutputFormat
from ..volume import Geometry


class ImageSource(Protocol):
    """One encoded image. Making it reads the header only."""

    @property
    def geometry(self) -> Geometry:
        """The grid, from the header."""

    @property
    def channels(self) -> int:
        """Images in the file: the length of a fourth axis, else 1."""

    @property
    def nifti_header(self) -> Any | None:
        """A NIfTI input's header, whose affine fields a NIfTI answer repeats bit for bit; ``None`` for the others."""

    @property
    def native_format(self) -> OutputFormat:
        """The format that answers in kind."""

    def channels_advice(self, wanted: int) -> str:
        """What would be right for a model of ``wanted`` channels, which this file has not; see :mod:`.channels`."""

    def read(self) -> npt.NDArray[np.float32]:
        """Decode the voxels: float32 (C, Z, Y, X), scaled as the header says. May be called once."""
