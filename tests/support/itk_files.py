"""What the tests of ITK's text formats share."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk  # noqa: N813 (the name that the field uses)
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunet_torchserve.codecs import ImageSource

DTYPES = ["uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float32", "float64"]


def assert_as_nnunet(image: ImageSource, file: Path) -> None:
    """Voxels, spacing and geometry are those of nnU-Net's reader and SimpleITK for ``file``."""
    expected, properties = SimpleITKIO().read_images([str(file)])
    itk = sitk.ReadImage(str(file))
    np.testing.assert_array_equal(image.read(), expected, strict=True)
    geometry = image.geometry
    n = itk.GetDimension()
    assert list(geometry.spacing_zyx) == list(properties["spacing"])
    assert (geometry.ndim, image.channels, str(image.native_format)) == (n, 1, file.suffix[1:])
    assert geometry.spacing[:n] == itk.GetSpacing()
    assert geometry.origin[:n] == itk.GetOrigin()
    assert tuple(geometry.direction[:n, :n].ravel()) == itk.GetDirection()


def direction(random: np.random.Generator, n: int, *, flip: bool) -> npt.NDArray[np.float64]:
    """A random orthonormal matrix, left-handed if ``flip``."""
    matrix: npt.NDArray[np.float64] = np.linalg.qr(random.standard_normal((n, n)))[0]
    if (np.linalg.det(matrix) < 0) != flip:
        matrix[:, 0] *= -1
    return matrix


def values(random: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> npt.NDArray[np.generic]:
    """Random numbers over the whole range of a type."""
    bits = np.dtype(dtype)
    if bits.kind == "f":
        return (random.standard_normal(shape) * 3000).astype(dtype)
    return random.integers(np.iinfo(bits).min, np.iinfo(bits).max, shape, bits, endpoint=True)


class Watch:
    """Whether a file was opened by anything of this process, C code included (inotify)."""

    IN_OPEN, IN_NONBLOCK = 0x20, os.O_NONBLOCK

    def __init__(self, file: Path) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd = libc.inotify_init1(self.IN_NONBLOCK)
        assert self._fd >= 0
        assert libc.inotify_add_watch(self._fd, os.fsencode(file), self.IN_OPEN) >= 0

    def opened(self) -> bool:
        try:
            return bool(os.read(self._fd, 4096))
        except BlockingIOError:
            return False

    def close(self) -> None:
        os.close(self._fd)
