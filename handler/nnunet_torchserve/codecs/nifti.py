"""NIfTI-1 and NIfTI-2 single files, by nibabel, from memory to memory.

Voxels and spacing are what nnU-Net's own readers give for the same file. ``SimpleITKIO`` converts the header's
length unit to mm, ``NibabelIO`` takes the numbers as they stand; both are reproduced. A label map is written with
the input's own affine fields, bit for bit, and nothing else of its header: no description, no names.
"""

from __future__ import annotations

import io
import math
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header
from nibabel.spatialimages import HeaderDataError

from ..errors import BadSpacing, Malformed, TooLarge, UnknownFormat, WrongChannels
from ..limits import Limits
from ..options import OutputFormat
from ..volume import Geometry, LabelArray
from .inflate import ByteSource

HEADER_BYTES = 540
"""The longer of the two headers; the shorter has 348."""

_UNIT_IN_MM = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}
"""NIfTI xyzt_units & 7: unknown, metre, millimetre, micrometre."""

_2D_SPACING_FACTOR = 999
"""SimpleITKIO's spacing between the slices of a 2-D image, in multiples of the in-plane spacing."""

_GEOMETRY_FIELDS = (
    "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d",
    "qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z", "xyzt_units",
)  # fmt: skip

_SMALLEST_MM, _LARGEST_MM = 1e-6, 1e6

_VECTOR_INTENTS = range(1004, 1008)
"""NIFTI_INTENT_GENMATRIX to NIFTI_INTENT_VECTOR: voxels that are no numbers, whatever the dimensions say."""

_RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0])


def header_class(head: bytes) -> Any:
    """The header type that the first bytes announce, ``None`` if they are no single-file NIfTI.

    Raises:
        UnknownFormat: one half of a NIfTI pair (.hdr/.img).
    """
    if len(head) >= 348 and head[344:348] == b"ni1\0":
        msg = "this is the header of a .hdr/.img pair; send a single-file NIfTI (.nii or .nii.gz)"
        raise UnknownFormat(msg)
    if len(head) >= 348 and head[344:348] == b"n+1\0":
        return Nifti1Header
    if len(head) >= 540 and head[4:8] == b"n+2\0":
        return Nifti2Header
    return None


class NiftiSource:
    """One NIfTI image, as an :class:`~.source.ImageSource`."""

    def __init__(self, head: bytes, kind: Any, source: ByteSource, limits: Limits, *, itk: bool) -> None:
        """Read and check the header; the voxels stay compressed.

        Args:
            head: the first ``HEADER_BYTES`` bytes, already taken from ``source``.
            kind: what :func:`header_class` said.
            source: positioned after ``head``.
            limits: voxels and expanded bytes are checked here.
            itk: follow ITK (``SimpleITKIO``): the header's length unit counts, and integers that are scaled pass
                through float32. Otherwise nibabel (``NibabelIO``).

        Raises:
            Malformed, TooLarge, UnknownFormat, BadSpacing, WrongChannels: see :mod:`..errors`.
        """
        self._head, self._source, self._itk = head, source, itk
        try:
            self._header = kind.from_fileobj(io.BytesIO(head), check=False)
            self._dtype = self._header.get_data_dtype()
        except (HeaderDataError, KeyError, ValueError):
            msg = "the NIfTI header names a voxel type that does not exist"
            raise Malformed(msg) from None
        if self._dtype.kind not in "iuf" or self._dtype.itemsize > 8:
            msg = f"voxels of type {self._dtype} are not supported; send integers or floats of at most 64 bits"
            raise UnknownFormat(msg)
        shape, ndim = self._shape()
        self.channels = shape[3]
        voxels = shape[0] * shape[1] * shape[2]
        if voxels > limits.voxels:
            msg = f"the header declares {voxels} voxels, this server takes at most {limits.voxels}"
            raise TooLarge(msg)
        self._data_bytes = voxels * self.channels * self._dtype.itemsize
        self._data_offset = self._offset()
        if self._data_offset + self._data_bytes > limits.expanded_bytes:
            msg = f"the image would expand to {self._data_bytes} bytes; the limit is {limits.expanded_bytes}"
            raise TooLarge(msg)
        self._scale = self._scaling()
        self.geometry = self._geometry(shape, ndim)

    @property
    def native_format(self) -> OutputFormat:
        """``nii.gz`` if the input was compressed."""
        return OutputFormat.NIFTI_GZ if self._source.compressed else OutputFormat.NIFTI

    def read(self) -> npt.NDArray[np.float32]:
        """Decode the voxels: float32 (C, Z, Y, X); may be called once.

        Raises:
            Malformed: the bytes end early or the gzip stream is damaged.
            TooLarge: far more bytes than declared.
        """
        self._source.skip(max(0, self._data_offset - len(self._head)))
        raw = self._source.read_exactly(self._data_bytes, self._head[self._data_offset :][: self._data_bytes])
        self._source.finish()
        depth, height, width = self.geometry.shape
        stored = raw.view(self._dtype).reshape(self.channels, depth, height, width)
        slope, intercept = self._scale
        with np.errstate(over="ignore", invalid="ignore"):
            if (slope, intercept) != (1.0, 0.0):
                if self._itk and stored.dtype.kind in "iu":
                    stored = stored.astype(np.float32)  # as ITK does, which rounds integers above 2**24
                stored = stored.astype(np.float64) * slope + intercept
            voxels: npt.NDArray[np.float32] = stored.astype(np.float32)
        return voxels

    def encode_nifti(self, labels: LabelArray) -> bytes:
        """``labels`` (Z, Y, X) as an uncompressed NIfTI file with this image's affine fields."""
        header = type(self._header)()
        for field in _GEOMETRY_FIELDS:
            header[field] = self._header[field]
        ndim = self.geometry.ndim
        voxels = labels.T if ndim == 3 else labels[0].T
        header.set_data_dtype(labels.dtype)
        header.set_data_shape(voxels.shape)
        header["pixdim"][: ndim + 1] = self._header["pixdim"][: ndim + 1]
        image = nib.Nifti2Image if isinstance(header, Nifti2Header) else nib.Nifti1Image
        return bytes(image(voxels, None, header).to_bytes())

    def _shape(self) -> tuple[tuple[int, int, int, int], int]:
        """(x, y, z, channels) and the number of spatial dimensions."""
        dim = [int(n) for n in self._header["dim"]]
        if not 2 <= dim[0] <= 7 or any(n < 1 for n in dim[1 : dim[0] + 1]):
            msg = f"the NIfTI header declares dimensions {dim}; two to seven of at least 1 were expected"
            raise Malformed(msg)
        if int(self._header["intent_code"]) in _VECTOR_INTENTS:
            msg = "the NIfTI header declares vectors or matrices; send one number a voxel"
            raise WrongChannels(msg)
        sizes = dim[1 : dim[0] + 1]
        while len(sizes) > 4 and sizes[-1] == 1:
            sizes.pop()
        if len(sizes) > 4:
            msg = f"an image of {len(sizes)} dimensions {sizes}; send 3-D, or 4-D with the channels last"
            raise WrongChannels(msg)
        ndim = min(len(sizes), 3)
        width, height, depth, channels = sizes + [1] * (4 - len(sizes))
        return (width, height, depth, channels), ndim

    def _offset(self) -> int:
        declared = float(self._header["vox_offset"])
        smallest = self._header.sizeof_hdr + 4
        if not math.isfinite(declared) or not smallest <= declared < 2**31:
            msg = f"the NIfTI header puts the voxels at byte {declared}; {smallest} or more was expected"
            raise Malformed(msg)
        return int(declared)

    def _scaling(self) -> tuple[float, float]:
        """NIfTI-1 scl_slope and scl_inter; both 0 or NaN mean none.

        Raises:
            Malformed: one of them alone is unusable. Readers then disagree: ITK applies an intercept without a slope,
                nibabel does not.
        """
        slope, intercept = float(self._header["scl_slope"]), float(self._header["scl_inter"])
        if (slope == 0 or math.isnan(slope)) and (intercept == 0 or math.isnan(intercept)):
            return 1.0, 0.0
        if not math.isfinite(slope) or not math.isfinite(intercept) or abs(slope) < np.finfo(np.float64).eps:
            msg = f"the NIfTI header's scaling, slope {slope} and intercept {intercept}, is read differently by readers"
            raise Malformed(msg)
        return slope, intercept

    def _geometry(self, shape: tuple[int, int, int, int], ndim: int) -> Geometry:
        pixdim = [float(size) for size in self._header["pixdim"][1 : ndim + 1]]
        unit = _UNIT_IN_MM.get(int(self._header["xyzt_units"]) & 7, 1.0) if self._itk else 1.0
        spacing = [size * unit for size in pixdim]
        if not all(_SMALLEST_MM <= size <= _LARGEST_MM for size in spacing):
            msg = f"voxel spacing {spacing} mm; every spacing must be a positive number, at most {_LARGEST_MM:g}"
            raise BadSpacing(msg)
        with np.errstate(all="ignore"):
            affine = self._affine()
            columns = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
        if not np.isfinite(affine).all() or not np.allclose(np.linalg.norm(columns, axis=0), 1):
            msg = "the NIfTI header's sform or qform is no usable affine: it has zero, NaN or infinite columns"
            raise Malformed(msg)
        between = spacing[2] if ndim == 3 else max(spacing) * _2D_SPACING_FACTOR
        width, height, depth, _ = shape
        x, y, z = (float(v) for v in _RAS_TO_LPS @ affine[:3, 3] * unit)
        return Geometry(
            shape=(depth, height, width),
            spacing_zyx=(between, spacing[1], spacing[0]),
            spacing=(spacing[0], spacing[1], spacing[2] if ndim == 3 else 1.0),
            origin=(x, y, z),
            direction=_RAS_TO_LPS @ columns,
            ndim=ndim,
        )

    def _affine(self) -> npt.NDArray[np.float64]:
        """Voxel (x, y, z) to RAS, from the form that ITK takes.

        The sform if its code is 1 or there is no qform, else the qform; without either, no turn and no origin, in LPS.
        """
        qform, sform = int(self._header["qform_code"]), int(self._header["sform_code"])
        try:
            if sform == 1 or (sform > 0 and qform <= 0):
                return np.asarray(self._header.get_sform(), np.float64)
            if qform > 0:
                return np.asarray(self._header.get_qform(), np.float64)
        except (HeaderDataError, ValueError):
            msg = "the NIfTI header's qform is no rotation"
            raise Malformed(msg) from None
        return np.diag([-1.0, -1.0, 1.0, 1.0])
