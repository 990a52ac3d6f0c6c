"""NIfTI-1 and NIfTI-2 single files, by nibabel, from memory to memory.

Voxels and spacing are what nnU-Net's own readers give for the same file, and the place in the patient is the one
that the plan's reader sees. ITK (``SimpleITKIO``) converts the header's length unit to mm, takes the sform or the
qform by rules of its own and the spacing always from ``pixdim``; nibabel (``NibabelIO``) takes the numbers as they
stand and prefers the sform. Both are reproduced (:mod:`.nifti_affine`).
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header
from nibabel.spatialimages import HeaderDataError

from ..errors import Malformed, TooLarge, UnknownFormat, WrongChannels
from ..limits import Limits
from ..options import OutputFormat
from ..volume import RAS_TO_LPS, Geometry
from .channels import series_advice, vector_advice
from .geometry import LARGEST_MM, SMALLEST_MM, check_size, check_spacing, make_geometry
from .inflate import ByteSource
from .nifti_affine import affine_of_itk, affine_of_nibabel
from .voxels import read_voxels

HEADER_BYTES = 540
"""The longer of the two headers; the shorter has 348."""

_UNIT_IN_MM = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}
"""NIfTI xyzt_units & 7: unknown, metre, millimetre, micrometre."""

_FLAT = 1e-6
"""How far from the patient's own axis, in mm, a slice may lie that was written as a 2-D image: float32."""

_MATRIX_INTENTS = range(1004, 1007)
"""NIFTI_INTENT_GENMATRIX, SYMMATRIX and DISPVECT: numbers of a voxel that are no channels, or that ITK turns round."""

_VECTOR_INTENT = 1007
"""NIFTI_INTENT_VECTOR: what ITK writes for several numbers a voxel, along the fifth dimension."""

_COLOURS = {("R", "G", "B"): 3, ("R", "G", "B", "A"): 4}
"""nibabel's names of the parts of an RGB24 and an RGBA32 voxel, and how many they are."""

_LAST_FORM = 5
"""NIFTI_XFORM_TEMPLATE_OTHER; nibabel writes codes above as 0."""


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

    def __init__(self, source: ByteSource, kind: Any, limits: Limits, *, as_nibabel: bool = False) -> None:
        """Read and check the header; the voxels stay compressed.

        Args:
            source: at the first byte of the header.
            kind: what :func:`header_class` said.
            limits: voxels and expanded bytes are checked here.
            as_nibabel: follow nibabel (``NibabelIO``); otherwise ITK, where integers that are scaled also pass
                through float32.

        Raises:
            Malformed, TooLarge, UnknownFormat, BadSpacing, WrongChannels: see :mod:`..errors`.
        """
        self._source, self._as_nibabel = source, as_nibabel
        try:
            head = source.peek(kind.template_dtype.itemsize)  # no more: what follows would be read as extensions
            self._header = kind.from_fileobj(io.BytesIO(head), check=False)
            self._dtype = self._header.get_data_dtype()
        except (HeaderDataError, KeyError, ValueError):
            msg = "the NIfTI header names a voxel type that does not exist"
            raise Malformed(msg) from None
        self._colours = _COLOURS.get(self._dtype.names or (), 0)
        if self._colours:
            self._dtype = np.dtype(np.uint8)
        if self._dtype.kind not in "iuf" or self._dtype.itemsize > 8:
            msg = f"voxels of type {self._dtype} are not supported; send integers or floats of at most 64 bits"
            raise UnknownFormat(msg)
        self._vectors = False
        shape, self.channels = self._shape()
        advice = self._advice(self.channels, None)
        data_bytes = check_size(shape, self.channels, self._dtype.itemsize, limits, advice)
        self._data_offset = self._offset()
        if self._data_offset + data_bytes > limits.expanded_bytes:
            msg = f"the image would expand to {self._data_offset + data_bytes} bytes; the limit is "
            raise TooLarge(msg + str(limits.expanded_bytes))
        self._scale = self._scaling()
        self._check_forms()
        self.geometry = self._geometry(shape)

    @property
    def nifti_header(self) -> Any:
        """The header, whose affine fields a NIfTI answer repeats."""
        return self._header

    @property
    def native_format(self) -> OutputFormat:
        """``nii.gz`` if the input was compressed."""
        return OutputFormat.NIFTI_GZ if self._source.compressed else OutputFormat.NIFTI

    def channels_advice(self, wanted: int) -> str:
        """What would be right for a model of so many channels."""
        return self._advice(self.channels, wanted)

    @property
    def _advice(self) -> Callable[[int, int | None], str]:
        return vector_advice if self._colours or self._vectors else series_advice

    def read(self) -> npt.NDArray[np.float32]:
        """Decode the voxels: float32 (C, Z, Y, X); may be called once.

        Raises:
            Malformed: the bytes end early or the gzip stream is damaged.
            TooLarge: far more bytes than declared.
        """
        self._source.skip(self._data_offset)
        scale = None if self._scale == (1.0, 0.0) else self._scaled
        shape = (self.channels, *self.geometry.shape)
        return read_voxels(self._source, self._dtype, shape, channels_fastest=bool(self._colours), scale=scale)

    def _scaled(self, stored: npt.NDArray[Any]) -> npt.NDArray[Any]:
        slope, intercept = self._scale
        if not self._as_nibabel and stored.dtype.kind in "iu":
            stored = stored.astype(np.float32)  # as ITK does, which rounds integers above 2**24
        return stored.astype(np.float64) * slope + intercept

    def _shape(self) -> tuple[tuple[int, ...], int]:
        """((z,) y, x) and the number of channels."""
        dim = [int(n) for n in self._header["dim"]]
        if not 2 <= dim[0] <= 7 or any(n < 1 for n in dim[1 : dim[0] + 1]):
            msg = f"the NIfTI header declares dimensions {dim}; two to seven of at least 1 were expected"
            raise Malformed(msg)
        sizes = dim[1 : dim[0] + 1]
        while len(sizes) > 4 and sizes[-1] == 1:
            sizes.pop()
        intent = int(self._header["intent_code"])
        if intent in _MATRIX_INTENTS:
            msg = "the NIfTI header declares matrices or displacements; send 4-D with the channels last, or a file each"
            raise WrongChannels(msg)
        if len(sizes) == 5 and sizes[3] == 1 and intent == _VECTOR_INTENT and not self._colours:
            self._vectors = True
            return tuple(sizes[: 2 if self._is_plane(sizes[2]) else 3][::-1]), sizes[4]
        if len(sizes) > 4 or (self._colours and len(sizes) == 4 and sizes[3] > 1):
            what = " of colours" if self._colours else ""
            msg = f"an image of {len(sizes)} dimensions {sizes}{what}; send 3-D, or 4-D with the channels last"
            raise WrongChannels(msg)
        if self._colours:
            return tuple(sizes[:3][::-1]), self._colours
        return tuple(sizes[:3][::-1]), sizes[3] if len(sizes) == 4 else 1

    def _is_plane(self, slices: int) -> bool:
        """Whether vectors, which have three axes in space in NIfTI, are those of a 2-D image.

        ITK writes its single slice 1 mm thick, at 0, across the patient's own axis, and reads every single slice as a
        2-D image. Here a slice with another thickness or place stays a volume, as it does in other formats.
        """
        if slices != 1 or float(self._header["pixdim"][3]) != 1 or self._unit != 1:
            return False
        with np.errstate(all="ignore"):
            affine = affine_of_nibabel(self._header) if self._as_nibabel else affine_of_itk(self._header)
        return np.allclose(affine[2], (0, 0, 1, 0), atol=_FLAT) and np.allclose(affine[:2, 2], 0, atol=_FLAT)

    @property
    def _unit(self) -> float:
        """Of length, in mm."""
        return _UNIT_IN_MM.get(int(self._header["xyzt_units"]) & 7, 1.0)

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

    def _check_forms(self) -> None:
        for name in ("qform_code", "sform_code"):
            if not 0 <= int(self._header[name]) <= _LAST_FORM:
                msg = f"the NIfTI header's {name} must be 0 to {_LAST_FORM}; readers disagree on others"
                raise Malformed(msg)

    def _geometry(self, shape: tuple[int, ...]) -> Geometry:
        ndim = len(shape)
        pixdim = [float(size) for size in self._header["pixdim"][1 : ndim + 1]]
        unit = self._unit
        spacing = [size * unit for size in pixdim]
        check_spacing(spacing, ndim)  # before the qform is made of it
        with np.errstate(all="ignore"):
            affine = affine_of_nibabel(self._header) if self._as_nibabel else affine_of_itk(self._header)
            lengths = np.linalg.norm(affine[:3, :3], axis=0)
            turn = (RAS_TO_LPS @ affine)[:3, :3] / lengths
        usable = all(SMALLEST_MM <= length * unit <= LARGEST_MM for length in lengths)
        if not usable or not np.isfinite(affine).all() or not np.isfinite(turn).all():
            msg = "the NIfTI header's sform or qform is no usable affine: it has zero, NaN, tiny or huge columns"
            raise Malformed(msg)
        if ndim == 2:
            return self._flat_geometry(shape, spacing, affine, turn, unit)
        return make_geometry(
            shape,
            [float(length) * unit for length in lengths] if self._as_nibabel else spacing,
            ((RAS_TO_LPS @ affine)[:3, 3] * unit).tolist(),
            turn.ravel().tolist(),
            pixdim if self._as_nibabel else spacing,
        )

    def _flat_geometry(
        self, shape: tuple[int, ...], spacing: list[float], affine: Any, turn: Any, unit: float
    ) -> Geometry:
        """Of a 2-D image, which keeps its place in space for a NIfTI answer only."""
        flat = make_geometry(shape, spacing, (0, 0), (1, 0, 0, 1))
        solid = make_geometry((1, *shape), (*spacing, 1.0), (RAS_TO_LPS @ affine)[:3, 3] * unit, turn.ravel())
        return Geometry(flat.shape, flat.spacing_zyx, flat.spacing, solid.origin, solid.direction, ndim=2)
